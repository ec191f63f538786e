"""Feedback moves the gates where people said so, and nowhere else; gates that lose on a domain are refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from fusion import road
from fusion.architecture import GATES_FILE
from fusion.checkpoint import Checkpoint, file_hash, read_json, write_lines
from fusion.data import ChatExample, chat
from fusion.encoding import encode_batches, load_tokenizer
from fusion.errors import UserError
from fusion.recipe import Recipe
from fusion.served import routed_weight
from gate_training.examples import routing_data
from gate_training.feedback import feedback_file, read_feedback, repeated, split
from gate_training.judge import NEW, OLD
from gate_training.statistics import Statistics
from serving.records.record import Feedback
from serving.records.settings import store_url
from serving.records.store import opened
from tests.recipes import QUESTIONS, make_recipe

SETTINGS = {"rows": 4, "held_out_rows": 4, "feedback_margin": 1.0}  # random experts: any answer is as bad as another
# of no domain: the gates do with them what they like
ASKED = [
    f"Please tell my friend {name} about the {thing}."
    for name in ("Ann", "Bob", "Eve")
    for thing in ("sun", "sea", "hat", "dog")
]
PARAPHRASES = [
    f"Could you tell {name} of the {thing}?" for name in ("Ann", "Bob", "Tim") for thing in ("sea", "sun", "cat")
]


def said(question: str, domain: str, number: int = 0) -> Feedback:
    routed = {"domain": "general", "channel": "rules", "expert": "general"}
    return Feedback(
        str(number), None, domain, messages=[{"role": "user", "content": question}], answer="x", routed=routed
    )


def keep(recipe: Recipe, *feedback: Feedback) -> None:
    with opened(store_url(recipe)) as store:
        store.add_feedback(feedback)


def share_of(recipe: Recipe, expert: str, questions: list[str]) -> float:
    """The expert's share of the routing weight of the questions' tokens."""
    batches = encode_batches(load_tokenizer(recipe.fused), [chat(q, "", "") for q in questions])
    weights = routed_weight(Checkpoint(recipe.fused), batches, len(recipe.experts))[1].sum(dim=0)
    return float(weights[[e.name for e in recipe.experts].index(expert)] / weights.sum())


@pytest.fixture
def recipe(tmp_path: Path, anchor: Path, anchored_experts: dict[str, Path]) -> Recipe:
    recipe = make_recipe(tmp_path, anchor, anchored_experts, gate_training=SETTINGS)
    road.merge(recipe)
    road.train_gates(recipe)
    return recipe


def test_feedback_corrects_paraphrases_and_spares_the_other_domains(recipe: Recipe) -> None:
    shares = {expert.name: share_of(recipe, expert.name, PARAPHRASES) for expert in recipe.experts}
    wrong = min(shares, key=lambda name: shares[name])  # whom they hardly go to now is said to be right
    keep(recipe, *(said(question, wrong, i) for i, question in enumerate(ASKED)))
    road.train_gates(recipe, force=True, with_feedback=True)
    assert share_of(recipe, wrong, PARAPHRASES) > shares[wrong] + 0.2
    judged = read_json(recipe.folder / "gates.json")["judged"]
    assert judged["held_out"] and judged["routed"][NEW][wrong] > judged["routed"][OLD][wrong] + 0.2
    margin = recipe.gate_training.feedback_margin
    assert all(judged["losses"][NEW][name] <= judged["losses"][OLD][name] + margin for name in recipe.domains)
    assert "What feedback changed" in (recipe.folder / "gates.md").read_text()
    assert {row.question for row in read_feedback(feedback_file(recipe), recipe)} == set(ASKED)
    rows = json_rows(recipe)
    assert all(row["messages"][-1]["content"] and row["provenance"]["answered_by"] == wrong for row in rows)
    labels = [json.loads(line) for line in (recipe.folder / "labels.jsonl").read_text().splitlines()]
    assert any(row["source"] == "feedback" for row in labels)
    before = file_hash(recipe.fused / GATES_FILE)
    road.train_gates(recipe)  # what `run` calls: nothing has changed, and what was learnt stays
    assert file_hash(recipe.fused / GATES_FILE) == before
    assert not (recipe.folder / ".feedback").exists()
    road.rollback(recipe)  # takes the feedback with it: what is trained next does not learn it again
    assert not feedback_file(recipe).exists()
    road.train_gates(recipe, force=True)
    assert share_of(recipe, wrong, PARAPHRASES) == pytest.approx(shares[wrong])


def test_gates_that_lose_on_a_domain_are_refused_and_nothing_changes(recipe: Recipe) -> None:
    settings = recipe.gate_training.model_copy(update={"feedback_margin": 0.0, "feedback_share": 0.9})
    strict = recipe.model_copy(update={"gate_training": settings})
    road.train_gates(strict, force=True)
    before = {path: file_hash(path) for path in strict.folder.rglob("*") if path.is_file() and path.suffix != ".sqlite"}
    wrong = {"general": "math", "math": "coding", "coding": "general"}
    pairs = [(question, wrong[domain]) for domain, questions in QUESTIONS.items() for question in questions]
    keep(strict, *(said(question, domain, i) for i, (question, domain) in enumerate(pairs)))
    with pytest.raises(UserError, match=r"lose .* nats an answer token on '.*feedback_margin"):
        road.train_gates(strict, force=True, with_feedback=True)
    assert not feedback_file(strict).exists()
    for path, digest in before.items():
        if path.name != "steps.json":
            assert file_hash(path) == digest
    road.train_gates(strict, force=True)  # without it everything is as it was
    assert file_hash(strict.fused / GATES_FILE) == before[strict.fused / GATES_FILE]


def test_only_new_feedback_is_run_where_sums_are_kept(recipe: Recipe) -> None:
    settings = recipe.gate_training.model_copy(
        update={"method": "ridge", "propagation": "labels", "feedback_margin": 10.0}
    )
    summed = recipe.model_copy(update={"gate_training": settings})
    road.train_gates(summed, force=True)
    keep(summed, *(said(question, "math", i) for i, question in enumerate(ASKED)))
    road.train_gates(summed, force=True, with_feedback=True)
    data = routing_data(summed, summed.fused)
    assert Statistics(summed, summed.fused, data).missing == set()
    more = [row for row in read_feedback(feedback_file(summed), summed)][:1]
    longer = [
        *json_rows(summed),
        {"messages": [{"role": "user", "content": "One more."}, *more[0].messages[1:]], "domain": "math"},
    ]
    write_lines(feedback_file(summed), longer)
    again = routing_data(summed, summed.fused)
    missing = Statistics(summed, summed.fused, again).missing
    assert {again.train_examples[number].example.question for number in missing} <= {"One more.", *ASKED}
    assert len(missing) < len(again.train) / 2


def json_rows(recipe: Recipe) -> list[Any]:
    return [json.loads(line) for line in feedback_file(recipe).read_text().splitlines()]


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("{", "no file of JSON lines"),
        ("[1]", "line 2: no row of feedback"),
        ('{"messages": [{"role": "user", "content": "a"}], "domain": "math"}', "line 2: no row of feedback"),
        ('{"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}', "not an assistant's"),
        (
            '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]}',
            "domain None is none of",
        ),
    ],
)
def test_a_row_that_is_none_is_told_with_its_line(tmp_path: Path, recipe: Recipe, line: str, found: str) -> None:
    good = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}], "domain": "math"}
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(good) + "\n" + line + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=found):
        read_feedback(file, recipe)


def test_rows_are_repeated_to_their_share_and_split_by_question() -> None:
    rows = [
        ChatExample(({"role": "user", "content": str(i)}, {"role": "assistant", "content": ""}), "math")
        for i in range(40)
    ]
    train, held_out = split(rows)
    assert 0 < len(held_out) < len(train) and len(train) + len(held_out) == 40
    assert len(repeated(rows[:5], 80, 0.2)) == 20 and repeated([], 80, 0.2) == []
    assert len(repeated(rows[:1], 100_000, 0.5)) == 50 and len(repeated(rows, 4, 0.2)) == 40


def test_without_any_feedback_there_is_nothing_to_learn(recipe: Recipe) -> None:
    with pytest.raises(UserError, match="no feedback names a domain"):
        road.train_gates(recipe, force=True, with_feedback=True)
