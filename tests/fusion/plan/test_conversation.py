"""Tokenizers and chat templates against the anchor's: each difference told, and what only looks like one not."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from fusion.checkpoint import read_json, write_json
from fusion.vocabulary import other_token, read_tokens
from tests.families import TEMPLATE
from tests.fusion.plan.planning import change_tokenizer, errors, findings

SYSTEM = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are {NAME}.<|im_end|>\n{% endif %}"
    "{% if tools %}{% for tool in tools %}{WRITTEN}{{ tool.function.name }}\n{% endfor %}{% endif %}"
)


def template(folder: Path, name: str = "Qwen", written: str = "# Tool ") -> None:
    """A template with a default system prompt, which writes tools in its own way."""
    text = SYSTEM.replace("{NAME}", name).replace("{WRITTEN}", written) + TEMPLATE
    (folder / "chat_template.jinja").write_text(text, encoding="utf-8")


@pytest.fixture
def base(tmp_path: Path, anchor: Path) -> Path:
    """An anchor whose template has a default system prompt."""
    folder = Path(shutil.copytree(anchor, tmp_path / "base"))
    template(folder)
    return folder


def test_another_id_for_the_same_token_is_an_error(tmp_path: Path, anchor: Path, other: Path) -> None:
    def swap(data: dict[str, Any]) -> None:
        vocabulary = data["model"]["vocab"]
        vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]

    change_tokenizer(other, swap)
    (error,) = errors(findings(tmp_path, anchor, other))
    assert "expert 'math': its tokenizer gives 'a' id" in error or "its tokenizer gives 'b' id" in error


def test_a_chatml_token_with_another_id_is_named_first(tmp_path: Path, anchor: Path, other: Path) -> None:
    def swap(data: dict[str, Any]) -> None:
        data["added_tokens"][1]["id"], data["added_tokens"][2]["id"] = 258, 257
        vocabulary = data["model"]["vocab"]
        vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]

    change_tokenizer(other, swap)
    (error,) = errors(findings(tmp_path, anchor, other))
    assert "gives '<|im_start|>' id 258, the anchor's 257: which marks the turns of a chat" in error


def test_tokens_that_only_one_has_are_warnings(tmp_path: Path, anchor: Path, other: Path) -> None:
    change_tokenizer(
        other, lambda data: data["added_tokens"].append({**data["added_tokens"][0], "id": 259, "content": "<tool>"})
    )
    (finding,) = findings(tmp_path, anchor, other)
    assert finding.severity == "warning" and "1 tokens that the anchor's lacks ('<tool>'" in finding.what
    (finding,) = findings(tmp_path, other, anchor)
    assert finding.severity == "warning" and "lacks 1 of the anchor's added tokens ('<tool>'" in finding.what


def test_a_missing_chatml_token_is_a_warning_of_its_own(tmp_path: Path, anchor: Path, other: Path) -> None:
    change_tokenizer(other, lambda data: data["added_tokens"].pop())
    (finding,) = findings(tmp_path, anchor, other)
    assert "'<|im_end|>'" in finding.what and "every chat is written with them" in finding.why


def test_other_merges_and_other_splitting_are_a_warning(tmp_path: Path, anchor: Path, other: Path) -> None:
    base = Path(shutil.copytree(other, tmp_path / "base"))
    change_tokenizer(base, lambda data: data["model"].update(merges=[["a", "b"], ["c", "d"]]))
    change_tokenizer(other, lambda data: data["model"].update(merges=["a b", "c d"]))  # the older spelling
    assert findings(tmp_path, base, other) == []
    change_tokenizer(other, lambda data: data["model"].update(merges=["c d", "a b"]))
    (finding,) = findings(tmp_path, base, other)
    assert finding.severity == "warning" and "other merges" in finding.what
    change_tokenizer(other, lambda data: data.update(normalizer={"type": "NFC"}))
    assert "other merges and normalizer" in findings(tmp_path, base, other)[0].what


def test_a_tokenizer_without_its_json_is_read_from_vocab_and_merges(tmp_path: Path, anchor: Path, other: Path) -> None:
    data = read_json(other / "tokenizer.json")
    (other / "tokenizer.json").unlink()
    write_json(other / "vocab.json", data["model"]["vocab"])
    (other / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    added = {str(token["id"]): {"content": token["content"]} for token in data["added_tokens"]}
    settings = read_json(other / "tokenizer_config.json")
    write_json(other / "tokenizer_config.json", {**settings, "added_tokens_decoder": added})
    assert findings(tmp_path, anchor, other) == []
    (other / "vocab.json").unlink()
    (finding,) = findings(tmp_path, anchor, other)
    assert finding.severity == "warning" and "no tokenizer.json to compare" in finding.what


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"model": ', "tokenizer.json cannot be read"),
        ("", "tokenizer.json cannot be read"),
        ("{}", "tokenizer.json cannot be used (it holds no tokens)"),
        ('{"model": {}}', "tokenizer.json cannot be used (it holds no tokens)"),
        ('{"model": {"vocab": 3}}', "tokenizer.json cannot be used (it holds no tokens)"),
        ('{"model": {"vocab": ["a"]}}', "tokenizer.json cannot be used (it holds no tokens)"),
        ("[]", "tokenizer.json cannot be used (it holds no tokens)"),
    ],
)
def test_a_broken_tokenizer_is_an_error(tmp_path: Path, anchor: Path, other: Path, text: str, words: str) -> None:
    (other / "tokenizer.json").write_text(text)
    (error,) = errors(findings(tmp_path, anchor, other))
    assert error.startswith("expert 'math': ") and words in error
    (other / "tokenizer.json").unlink()
    (other / "vocab.json").write_text("[]")
    assert "vocab.json cannot be used (it holds no tokens)" in errors(findings(tmp_path, anchor, other))[0]


@pytest.mark.parametrize("broken", ["anchor", "expert 'math'"])
def test_a_template_that_is_no_text_is_an_error(tmp_path: Path, anchor: Path, other: Path, broken: str) -> None:
    (other / "chat_template.jinja").write_bytes(b"\xff\xfe{{")
    found = findings(tmp_path, *((other, anchor) if broken == "anchor" else (anchor, other)))
    told = [finding for finding in found if "chat_template.jinja cannot be read (it is no UTF-8 text)" in finding.what]
    assert all(finding.severity == "error" for finding in told) and broken in [finding.where for finding in told]


@pytest.mark.parametrize("broken", ["anchor", "expert 'math'"])
def test_broken_tokenizer_settings_are_an_error(tmp_path: Path, anchor: Path, other: Path, broken: str) -> None:
    (other / "chat_template.jinja").unlink()
    for text in ("{", "[]"):
        (other / "tokenizer_config.json").write_text(text)
        found = findings(tmp_path, *((other, anchor) if broken == "anchor" else (anchor, other)))
        assert broken in [finding.where for finding in found if "tokenizer_config.json cannot be" in finding.what]


def test_nothing_is_other_where_there_is_nothing_to_compare(anchor: Path) -> None:
    tokens = read_tokens(anchor)
    assert tokens is not None
    assert other_token(tokens.ids, None) is None and other_token(tokens.ids, tokens.ids) is None


def test_another_default_system_prompt_is_said(tmp_path: Path, base: Path, other: Path) -> None:
    template(other)
    assert findings(tmp_path, base, other) == []
    template(other, "Math")
    (finding,) = findings(tmp_path, base, other)
    assert finding.severity == "warning"
    assert "its default system prompt is 'You are Math.', the anchor's 'You are Qwen.'" in finding.what
    assert "tools" not in finding.what


def test_tools_that_are_written_otherwise_are_said(tmp_path: Path, base: Path, other: Path) -> None:
    template(other, written="* ")
    (finding,) = findings(tmp_path, base, other)
    assert "with tools reads '* get_time' where the anchor's reads '# Tool get_time'" in finding.what
    assert "system prompt" not in finding.what


def test_a_template_that_is_written_otherwise_and_renders_the_same_is_none(
    tmp_path: Path, base: Path, other: Path
) -> None:
    text = (base / "chat_template.jinja").read_text(encoding="utf-8")
    (other / "chat_template.jinja").unlink()
    settings = read_json(other / "tokenizer_config.json")
    named = [{"name": "default", "template": "{# the same #}" + text}, {"name": "tool_use", "template": "no"}]
    write_json(other / "tokenizer_config.json", {**settings, "chat_template": named})
    assert findings(tmp_path, base, other) == []


def test_a_template_that_refuses_a_conversation_is_said(tmp_path: Path, base: Path, other: Path) -> None:
    text = (base / "chat_template.jinja").read_text(encoding="utf-8")
    refusing = "{% if tools %}{{ raise_exception('no tools here') }}{% endif %}" + text
    (other / "chat_template.jinja").write_text(refusing, encoding="utf-8")
    (finding,) = findings(tmp_path, base, other)
    assert "a conversation with tools is refused by its template (no tools here)" in finding.what
    (other / "chat_template.jinja").write_text("{{ nothing.of.that }}", encoding="utf-8")
    (error, *_) = errors(findings(tmp_path, other, base))
    assert error.startswith("anchor: its chat template does not render a plain conversation")


def test_a_template_cannot_reach_out_of_its_sandbox(tmp_path: Path, base: Path, other: Path) -> None:
    evil = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    (other / "chat_template.jinja").write_text(evil, encoding="utf-8")
    (finding,) = findings(tmp_path, base, other)
    assert "is refused by its template" in finding.what


def test_without_a_template_an_anchor_is_an_error_and_an_expert_a_note(
    tmp_path: Path, anchor: Path, other: Path
) -> None:
    (other / "chat_template.jinja").unlink()
    (note,) = findings(tmp_path, anchor, other)
    assert note.severity == "note" and "has no chat template" in note.what
    assert any("has no chat template" in error for error in errors(findings(tmp_path, other, anchor)))
    (other / "tokenizer.json").unlink()
    assert any("has no tokenizer.json" in error for error in errors(findings(tmp_path, other, anchor)))


def test_of_an_expert_that_is_led_back_another_template_is_a_note(tmp_path: Path, base: Path, other: Path) -> None:
    from fusion.plan.preflight import check
    from fusion.recipe import Recipe
    from tests.recipes import recipe_data

    template(other, "Math")
    data = recipe_data(tmp_path, base, {"general": base, "math": other})
    data["experts"][1]["anchor"] = {"method": "logits", "data": data["domains"]["math"]["train"]}
    found = check(Recipe.model_validate(json.loads(json.dumps(data))))
    assert [finding.severity for finding in found] == ["note", "note"]
