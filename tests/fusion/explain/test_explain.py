"""Explanations against transformers' router logits, on random texts; their files and what may lie in a prompt."""

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from fusion.checkpoint import Checkpoint
from fusion.data import chat
from fusion.encoding import END, encode, load_tokenizer, prompt_text
from fusion.errors import UserError
from fusion.explain.asked import explain_asked
from fusion.explain.conversation import Conversation, of_file, of_prompt, tokenize
from fusion.explain.explain import explain, explain_all
from fusion.explain.explanation import Explanation, read_explanation
from fusion.explain.page import DRAWN, page
from fusion.explain.summary import summary
from fusion.layers import checkpoint_gates
from fusion.merge import merge
from fusion.progress import console
from fusion.recipe import Recipe
from fusion.served import expert_shares
from gate_training.trainer import install_gates, train_gates
from tests.families import byte_tokenizer
from tests.recipes import make_recipe

TEXT = st.text(st.characters(codec="utf-8"), min_size=1, max_size=40)
QUESTION = 6  # tokens of <|im_start|>user and the line break, one a byte, before the question
OUT = '</script><!-- <script>alert("out")</script> \u2028\u2029 & 你好 😀'


def fused(
    folder: Path, anchor: Path, experts: dict[str, Path], top_k: int, order: tuple[int, ...] = (0, 1, 2)
) -> Recipe:
    """A merged recipe with random gates, which follow the experts into `order`."""
    folder.mkdir()
    ordered = {list(experts)[i]: list(experts.values())[i] for i in order}
    recipe = make_recipe(folder, anchor, ordered, routing={"top_k": top_k})
    merge(recipe)
    torch.manual_seed(4)
    gates = {layer: torch.randn(gate.shape) / 8 for layer, gate in checkpoint_gates(Checkpoint(recipe.fused)).items()}
    install_gates(recipe.fused, {layer: gate[list(order)] for layer, gate in gates.items()})
    return recipe


@pytest.fixture(scope="module", params=[1, 2])
def recipe(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    anchor: Path,
    anchored_experts: dict[str, Path],
) -> Recipe:
    """Three experts, one or two of them a token."""
    return fused(tmp_path_factory.mktemp("explain") / "run", anchor, anchored_experts, request.param)


@pytest.fixture(scope="module")
def model(recipe: Recipe) -> Any:
    return AutoModelForCausalLM.from_pretrained(recipe.fused, dtype=torch.float32).eval()


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(question=TEXT, answer=st.none() | TEXT)
def test_everything_is_what_transformers_routes(recipe: Recipe, model: Any, question: str, answer: str | None) -> None:
    tokenizer = load_tokenizer(recipe.fused)
    found = explain(Checkpoint(recipe.fused), tokenizer, [{"role": "user", "content": question}], answer)
    encoded = encode(tokenizer, chat(question, answer or "", ""))
    ids = encoded.ids if answer is not None else encoded.ids[: encoded.answer_start]
    assert [token.id for token in found.tokens] == ids
    with torch.no_grad():
        logits = torch.stack(model(torch.tensor([ids]), output_router_logits=True).router_logits)
    probabilities = logits.softmax(-1)  # (layers, tokens, experts)
    ranked = probabilities.sort(descending=True).values
    assume((ranked[..., found.top_k - 1] - ranked[..., found.top_k]).min() > 1e-5)
    assert torch.allclose(torch.tensor(found.probabilities), probabilities, atol=2e-5)

    weights, chosen = probabilities.topk(found.top_k)
    weights = weights / weights.sum(-1, keepdim=True)
    assert torch.tensor(found.chosen).sort().values.equal(chosen.sort().values)
    served = torch.zeros_like(probabilities).scatter(2, chosen, weights)
    ours = torch.zeros_like(probabilities).scatter(2, torch.tensor(found.chosen), torch.tensor(found.weights))
    assert torch.allclose(ours, served, atol=1e-4)
    spans = {
        "prompt": slice(QUESTION, QUESTION + len(question.encode())),
        "answer": slice(encoded.answer_start, None),
        "everything": slice(None),
    }
    for name, span in spans.items():
        shares = getattr(found.shares, name)
        if name == "answer" and answer is None:
            assert shares is None
            continue
        expected = served[:, span].sum(dim=(0, 1))
        assert list(shares) == found.experts == [expert.name for expert in recipe.experts]
        assert torch.allclose(torch.tensor(list(shares.values())), expected / expected.sum(), atol=1e-4)
    judged = probabilities[:, spans[found.judged]]
    assert found.judged == ("prompt" if answer is None else "answer")
    assert found.winner == max(found.shares.judged, key=found.shares.judged.__getitem__)
    assert found.confidence == pytest.approx(judged.amax(-1).mean().item(), abs=1e-4)
    assert found.entropy == pytest.approx(
        (-(judged * judged.log()).sum(-1).mean() / torch.tensor(3.0).log()).item(), abs=1e-4
    )


@given(system=st.none() | TEXT, question=TEXT, answer=st.none() | TEXT)
def test_the_tokens_texts_are_the_text_and_know_their_part(
    system: str | None, question: str, answer: str | None
) -> None:
    tokenizer = byte_tokenizer()
    messages = (*([{"role": "system", "content": system}] if system else []), {"role": "user", "content": question})
    tokens = tokenize(tokenizer, Conversation(messages, answer))
    ending = "" if answer is None else answer + END
    assert "".join(token.text for token in tokens) == prompt_text(tokenizer, messages) + ending
    for part, text in (("system", system or ""), ("prompt", question), ("answer", ending)):
        assert "".join(token.text for token in tokens if token.part == part) == text
    assert all(token.label for token in tokens)


def test_a_piece_of_a_character_is_named_by_the_character() -> None:
    tokens = tokenize(byte_tokenizer(), of_prompt("a你"))
    assert [(t.text, t.label) for t in tokens if t.part == "prompt"] == [
        ("a", "a"),
        ("", "你 1/3"),
        ("", "你 2/3"),
        ("你", "你 3/3"),
    ]


def test_a_template_that_rewrites_messages_is_refused() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("message.content", "message.content | upper")
    with pytest.raises(UserError, match="changes the text of a message"):
        tokenize(tokenizer, of_prompt("abc"))


CONVERSATIONS = [
    Conversation(({"role": "user", "content": "1+2="},)),
    Conversation(({"role": "user", "content": "Tell me a long story, please."},), "Once, 你好."),
    Conversation(({"role": "system", "content": "Be short."}, {"role": "user", "content": "import os"}), "os"),
]


def test_many_at_once_are_as_one_by_one(recipe: Recipe) -> None:
    checkpoint, tokenizer = Checkpoint(recipe.fused), load_tokenizer(recipe.fused)
    for batch_tokens in (64, 4096):
        for together, conversation in zip(
            explain_all(checkpoint, tokenizer, CONVERSATIONS, batch_tokens), CONVERSATIONS, strict=True
        ):
            alone = explain(checkpoint, tokenizer, conversation.messages, conversation.answer)
            assert together.tokens == alone.tokens and together.chosen == alone.chosen
            assert torch.allclose(torch.tensor(together.probabilities), torch.tensor(alone.probabilities), atol=1e-5)
            assert together.shares.everything == pytest.approx(alone.shares.everything, abs=1e-5)


def test_permuted_experts_permute_the_shares(tmp_path: Path, anchor: Path, anchored_experts: dict[str, Path]) -> None:
    recipes = [fused(tmp_path / f"{order}", anchor, anchored_experts, 2, order) for order in ((0, 1, 2), (2, 0, 1))]
    first, second = (
        explain_all(Checkpoint(recipe.fused), load_tokenizer(recipe.fused), CONVERSATIONS) for recipe in recipes
    )
    for one, other in zip(first, second, strict=True):
        assert one.experts != other.experts and one.winner == other.winner
        for name in ("prompt", "everything"):
            assert getattr(other.shares, name) == pytest.approx(getattr(one.shares, name), abs=1e-4)


@pytest.fixture(scope="module")
def explained(recipe: Recipe) -> Explanation:
    asked = [{"role": "user", "content": f"Hello {OUT}"}]
    return explain(Checkpoint(recipe.fused), load_tokenizer(recipe.fused), asked, OUT)


def test_the_parts_add_up(recipe: Recipe, explained: Explanation) -> None:
    """Layers and thirds of layers give the whole, the answer's shares are those that `ask` names."""
    layers = len(explained.layers)
    assert [layer for group in explained.groups for layer in group.layers] == explained.layers
    for name in explained.experts:
        by_layer = sum(shares.judged[name] for shares in explained.shares_by_layer)
        by_third = sum(group.shares.judged[name] * len(group.layers) for group in explained.groups)
        assert by_layer / layers == pytest.approx(by_third / layers) == pytest.approx(explained.shares.judged[name])
    (asked,) = expert_shares(recipe, [{"question": f"Hello {OUT}", "answer": OUT}])
    assert explained.shares.answer == pytest.approx(asked, abs=1e-5)


def test_the_lead_rose_where_it_is_said(explained: Explanation) -> None:
    winner = explained.experts.index(explained.winner)
    leads = [
        sum(
            layer[t][winner] - max(p for e, p in enumerate(layer[t]) if e != winner)
            for layer in explained.probabilities
        )
        / len(explained.layers)
        for t in range(len(explained.tokens))
    ]
    rises = [lead - before for lead, before in zip(leads, [0.0, *leads], strict=False)]
    own = [t for t, token in enumerate(explained.tokens) if token.part != "template"]
    best = sorted(own, key=lambda t: -rises[t])[: len(explained.decided_by)]
    assert best and [at.token for at in explained.decided_by] == best
    assert [at.rise for at in explained.decided_by] == pytest.approx([rises[t] for t in best], abs=1e-5)


def test_json_there_and_back(explained: Explanation) -> None:
    text = json.dumps(explained.as_dict(), allow_nan=False)
    assert read_explanation(json.loads(text)) == explained


class Scripts(HTMLParser):
    """The scripts of a page as a browser finds them: type and content."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str | None, str]] = []
        self._inside = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._inside = tag == "script"
        if self._inside:
            self.found.append((dict(attrs).get("type"), ""))

    def handle_endtag(self, tag: str) -> None:
        self._inside = False

    def handle_data(self, data: str) -> None:
        if self._inside:
            kind, text = self.found[-1]
            self.found[-1] = (kind, text + data)


def scripts(text: str) -> list[tuple[str | None, str]]:
    parser = Scripts()
    parser.feed(text)
    return parser.found


def test_a_prompt_cannot_leave_the_pages_data(explained: Explanation) -> None:
    text = page(explained)
    (kind, data), (_, code) = scripts(text)
    assert kind == "application/json" and "use strict" in code
    assert not set(data) & set("<>&\u2028\u2029")
    assert "".join(token["text"] for token in json.loads(data)["tokens"]).endswith(OUT + END)
    assert "http:" not in text and "https:" not in text  # nothing to fetch


def test_of_a_long_text_both_ends_are_drawn(recipe: Recipe) -> None:
    asked = [{"role": "user", "content": "a" * DRAWN + "z" * 500}]
    found = explain(Checkpoint(recipe.fused), load_tokenizer(recipe.fused), asked)
    data = json.loads(scripts(page(found))[0][1])
    at = [token["at"] for token in data["tokens"]]
    assert len(at) == DRAWN == len(data["chosen"][0]) == len(data["probabilities"][-1])
    assert at[0] == 0 and at[-1] == len(found.tokens) - 1
    assert data["left_out"] == len(found.tokens) - DRAWN


@pytest.fixture
def trained(tmp_path: Path, anchor: Path, anchored_experts: dict[str, Path]) -> Recipe:
    """A recipe with rules whose gates are trained."""
    recipe = make_recipe(tmp_path, anchor, anchored_experts)
    domains = recipe.model_dump()["domains"]
    domains["math"]["rules"] = [{"pattern": r"\d\+\d"}]
    recipe = Recipe.model_validate({**recipe.model_dump(), "domains": domains})
    merge(recipe)
    train_gates(recipe, recipe.fused)
    return recipe


def test_the_labels_speak_beside_the_tokens(trained: Recipe) -> None:
    asked = Conversation(({"role": "user", "content": "1+2="},), "math 0")
    found = explain_asked(trained, asked, classifier=True)
    assert [opinion.channel for opinion in found.opinions] == ["rules", "classifier", "likelihood"]
    rules, classifier, likelihood = found.opinions
    assert (rules.expert, rules.evidence) == ("math", "pattern: '1+2'")
    assert classifier.expert == "math" and classifier.probability and classifier.probability > 0.5
    assert likelihood.probability and 1 / 3 < likelihood.probability <= 1
    assert all(opinion.agrees == (opinion.expert == found.winner) for opinion in found.opinions)
    assert [o.channel for o in explain_asked(trained, of_prompt("1+2=")).opinions] == ["rules"]
    with console.capture() as capture:
        console.print(summary(found))
    said = capture.get()
    assert f"{found.winner} took {found.shares.judged[found.winner]:.0%} of the answer" in said
    assert "1+2=" in said and "math 0<|im_end|>" in said and "rules: math (pattern: '1+2')" in said


def test_more_tokens_than_are_served_are_refused(trained: Recipe) -> None:
    room = trained.serving.max_model_len - len(tokenize(byte_tokenizer(), of_prompt("a"))) + 1
    assert explain_asked(trained, of_prompt("a" * room)).shares.answer is None
    with pytest.raises(UserError, match=r"257 tokens and serving\.max_model_len is 256"):
        explain_asked(trained, of_prompt("a" * (room + 1)))


def test_a_recipe_of_other_experts_is_refused(trained: Recipe) -> None:
    fewer = trained.model_copy(update={"experts": trained.experts[:2]})
    with pytest.raises(UserError, match="has the experts general, math, coding, the recipe general, math: run"):
        explain_asked(fewer, of_prompt("1+2="))


def test_what_is_no_text_is_refused() -> None:
    for prompt, words in (("", "the prompt is empty"), ("\ud83d", "half a character")):
        with pytest.raises(UserError, match=words):
            tokenize(byte_tokenizer(), Conversation(({"role": "user", "content": prompt},)))


def test_a_file_is_a_prompt_or_a_conversation(tmp_path: Path) -> None:
    text, rows = tmp_path / "prompt.txt", tmp_path / "row.jsonl"
    text.write_text("def f():\n\treturn 你\n", encoding="utf-8")
    assert of_file(text) == of_prompt("def f():\n\treturn 你\n")
    turns = [{"role": r, "content": r} for r in ("system", "user", "assistant", "user", "assistant")]
    rows.write_text(json.dumps({"messages": turns}) + "\n", encoding="utf-8")
    assert of_file(rows) == Conversation(tuple(turns[:-1]), "assistant")
