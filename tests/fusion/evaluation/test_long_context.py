"""Long contexts: as long as they are said to be, question and key where they should be, losses transformers' own."""

import random
from pathlib import Path

import pytest
import torch

from fusion.data import ChatExample, chat
from fusion.encoding import encode, load_tokenizer
from fusion.evaluation.long_context import DEPTHS, MARGIN, _after, _with_key, evaluate_long, lengths_of, markdown
from fusion.merge import merge
from fusion.sources import ModelSource, load_model
from tests.recipes import make_recipe

FILLERS = [chat(f"What is {i} and {i}?", f"It is {2 * i}.", "general") for i in range(30)]


@pytest.mark.parametrize("length", [256, 400, 3000])
def test_a_question_ends_a_context_of_the_length_that_is_said(anchor: Path, length: int) -> None:
    tokenizer, row = load_tokenizer(anchor), chat("The question?", "The answer.", "math", system="Be brief.")
    found = _after(tokenizer, row, FILLERS, length, random.Random(0))
    longest = max(len(encode(tokenizer, filler).ids) for filler in FILLERS)
    assert length - longest - MARGIN <= len(encode(tokenizer, found).ids) <= length
    assert found.messages[0] == row.messages[0] and found.messages[-2:] == row.messages[-2:]
    assert [m["role"] for m in found.messages[1:]] == ["user", "assistant"] * (len(found.messages) // 2)


@pytest.mark.parametrize("depth", DEPTHS)
def test_a_key_lies_at_its_depth_and_is_asked_for_at_the_end(anchor: Path, depth: float) -> None:
    tokenizer = load_tokenizer(anchor)
    found = _with_key(tokenizer, FILLERS, 4000, depth, random.Random(0))
    assert found.answer.isdecimal() and len(found.answer) == 5
    [place] = [i for i, m in enumerate(found.prompt) if found.answer in m["content"]]
    before = ChatExample((*found.messages[:place], {"role": "assistant", "content": ""}), "passkey")
    share = len(encode(tokenizer, before).ids) / len(encode(tokenizer, found).ids)
    assert abs(share - depth) < 0.06
    assert "pass key" in found.question


def test_lengths_double_up_to_the_last(tmp_path: Path, anchor: Path) -> None:
    def lengths(longest: int) -> list[int]:
        serving = {"max_model_len": longest, "sampling": {"max_tokens": 32}}
        recipe = make_recipe(tmp_path, anchor, {"general": anchor, "math": anchor}, serving=serving)
        return lengths_of(recipe)

    assert lengths(32768) == [256, 512, 1024, 2048, 4096, 8192, 16384, 32704]
    assert lengths(320) == [256]
    assert lengths(200) == [136]


def test_losses_are_transformers_own_and_yarn_is_a_model_of_its_own(tmp_path: Path, anchor: Path) -> None:
    serving = {"max_model_len": 384, "yarn_factor": 2.0, "sampling": {"max_tokens": 32}}
    evaluation = {"long_rows": 2, "rows": 4, "max_new_tokens": 128}
    data = {"general": anchor, "math": anchor}
    recipe = make_recipe(tmp_path, anchor, data, serving=serving, evaluation=evaluation)
    for name in data:  # what is held out must be another file than what is trained on
        source = recipe.domains[name].train.model_copy(update={"path": None, "generated": f"demo.{name}"})
        domain = recipe.domains[name].model_copy(update={"train": source})
        recipe = recipe.model_copy(update={"domains": {**recipe.domains, name: domain}})
    merge(recipe)
    result = evaluate_long(recipe, 2)
    assert list(result["models"]) == ["anchor", "anchor, YaRN 2", "fused", "fused, YaRN 2"]
    plain, stretched = (result["models"][name]["256"]["loss"]["value"] for name in ("anchor", "anchor, YaRN 2"))
    assert plain != stretched
    for column in result["models"].values():  # identical experts: the fused model is the anchor
        assert set(column) == {"256"}
    assert result["models"]["fused"]["256"]["loss"]["value"] == pytest.approx(plain, rel=1e-4)
    assert "| fused, YaRN 2 | 256 |" in markdown(result)


def test_a_stretched_model_is_stretched_as_vllm_stretches_it(anchor: Path) -> None:
    plain = load_model(ModelSource("anchor", anchor))
    model = load_model(ModelSource("anchor", anchor), yarn_factor=4.0)
    assert model.config.rope_parameters["rope_type"] == "yarn" and model.config.rope_parameters["factor"] == 4.0
    assert model.config.max_position_embeddings == 4 * plain.config.max_position_embeddings
    assert not torch.equal(model.model.rotary_emb.inv_freq, plain.model.rotary_emb.inv_freq)
