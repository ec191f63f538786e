"""Label channels: the classifier learns, never labels what it has learnt from, and rules come first."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForSequenceClassification

from fusion.data import train_rows
from fusion.encoding import encode, load_tokenizer, prompt_text
from fusion.errors import UserError
from fusion.merge import merge
from fusion.recipe_file import load_recipe
from fusion.sections.fusing import GateTraining
from gate_training import examples as examples_module
from gate_training.examples import routing_examples
from gate_training.labelling.classifier import (
    ClassifierLabel,
    Classify,
    anchor_classifier,
    pooled_states,
    sequence_classifier,
)
from gate_training.labelling.combine import label_questions
from gate_training.labelling.likelihood import LikelihoodLabel, answer_labels
from gate_training.labelling.measure import confusing_questions
from tests.families import byte_tokenizer, config
from tests.recipes import make_recipe

CONFIGS = Path(__file__).parents[2] / "configs"
SUMS = [f"{a}+{b}=" for a in range(3, 9) for b in range(2, 7)]
WORDS = [f"Tell me of the {w} {t}." for w in ("sea", "sun", "cat", "old", "new") for t in ("day", "man", "way", "one")]


def test_states_are_those_of_transformers(anchor: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(anchor, dtype=torch.float32)
    tokenizer = load_tokenizer(anchor)
    found = pooled_states(anchor, WORDS[:5] + SUMS[:5], GateTraining())
    for row, question in zip(found, WORDS[:5] + SUMS[:5], strict=True):
        ids = tokenizer(prompt_text(tokenizer, [{"role": "user", "content": question}]))["input_ids"]
        with torch.no_grad():
            states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[1]  # after 1 of 3 layers
        assert torch.allclose(row[:-1], states[0].mean(dim=0), atol=1e-4)
        assert row[-1] == 1


def test_the_classifier_learns_and_knows_how_sure_it_is(anchor: Path) -> None:
    domains = ["math"] * len(SUMS[::2]) + ["general"] * len(WORDS[::2])
    classify = anchor_classifier(anchor, SUMS[::2] + WORDS[::2], domains, GateTraining())
    labels = classify(SUMS[1::2] + WORDS[1::2])
    assert [label.domain for label in labels] == ["math"] * len(SUMS[1::2]) + ["general"] * len(WORDS[1::2])
    assert all(0.5 < label.confidence <= 1 for label in labels)


def test_rules_come_first_and_disagreement_is_recorded() -> None:
    domains = load_recipe(CONFIGS / "demo.yaml").domains

    def classify(questions: Sequence[str]) -> list[ClassifierLabel]:
        return [ClassifierLabel("coding", 0.7) for _ in questions]

    ruled, open_ = label_questions(["12+30=", "What is the capital of Peru?"], domains, classify)
    assert (ruled.domain, ruled.source, ruled.confidence, ruled.disputed) == ("math", "rules", 1.0, True)
    assert ruled.channels == {"rules": "math", "classifier": "coding"}
    assert (open_.domain, open_.source, open_.confidence) == ("coding", "classifier", 0.7)
    alone, _ = label_questions(["12+30=", "?"], domains, classify, rules_first=False)
    assert alone.domain == "coding"
    (without,) = label_questions(["12+30="], domains, None)
    assert (without.domain, without.disputed) == ("math", False)


def test_where_no_rule_matches_the_surer_of_classifier_and_likelihood_labels() -> None:
    domains = load_recipe(CONFIGS / "demo.yaml").domains

    def classify(questions: Sequence[str]) -> list[ClassifierLabel]:
        return [ClassifierLabel("coding", 0.7) for _ in questions]

    def liked(confidence: float, *serves: str) -> LikelihoodLabel:
        return LikelihoodLabel("structured", serves or ("structured",), confidence)

    questions = ["12+30=", "Who is it?", "Who is it?", "Who is it?"]
    likely = [liked(0.99), liked(0.8), liked(0.6), liked(0.8, "structured", "coding")]
    ruled, surer, less_sure, same = label_questions(questions, domains, classify, likely=likely)
    assert (ruled.domain, ruled.channels["likelihood"], ruled.disputed) == ("math", "structured", True)
    assert (surer.domain, surer.source, surer.evidence, surer.confidence) == (
        "structured",
        "likelihood",
        "likelihood: 80%",
        0.8,
    )
    assert (less_sure.domain, less_sure.source) == ("coding", "classifier")
    assert (same.domain, same.channels["likelihood"]) == ("coding", "coding")  # one of those that the expert serves


def test_the_likelihood_channel_reads_answers_as_each_expert_would(
    tmp_path: Path, anchor: Path, anchored_experts: dict[str, Path]
) -> None:
    recipe = make_recipe(tmp_path, anchor, anchored_experts, gate_training={"window": 2, "batch_tokens": 90})
    folder, tokenizer = merge(recipe), load_tokenizer(anchor)
    examples = train_rows(recipe, 3, 0)
    expected = []
    for example in examples:
        row = encode(tokenizer, example)
        scores = []
        for path in anchored_experts.values():
            model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
            with torch.no_grad():
                chances = model(torch.tensor([row.ids])).logits[0, :-1].log_softmax(-1)
            of_answer = [
                (position, chances[position - 1, row.ids[position]])
                for position in range(row.answer_start, len(row.ids))
            ]
            scores.append([sum(x for p, x in of_answer if abs(p - q) <= 2) for q, _ in of_answer])
        expected.append(torch.tensor(scores).softmax(dim=0).mean(dim=1))  # (experts,)
    for label, shares in zip(answer_labels(recipe, folder, examples), expected, strict=True):
        assert label.domain == recipe.experts[int(shares.argmax())].domain
        assert label.confidence == pytest.approx(float(shares.max()), abs=1e-4)
        assert label.serves == (label.domain,)


def test_combined_labels_of_a_fused_model_hear_its_experts(
    tmp_path: Path, anchor: Path, anchored_experts: dict[str, Path]
) -> None:
    recipe = make_recipe(tmp_path, anchor, anchored_experts, gate_training={"labels": "combined"})
    folder = merge(recipe)
    alone, heard = routing_examples(recipe, "held_out", 3), routing_examples(recipe, "held_out", 3, folder)
    assert all(set(row.label.channels) == {"rules", "classifier"} for row in alone)
    likely = answer_labels(recipe, folder, [row.example for row in heard])
    for row, said in zip(heard, likely, strict=True):
        assert row.label.channels["likelihood"] == said.domain
        assert row.label.confidence >= said.confidence - 1e-6  # the surer of the two


@pytest.mark.parametrize("labels", ["classifier", "combined"])
def test_no_question_is_labelled_by_what_has_learnt_it(
    tmp_path: Path, anchor: Path, anchored_experts: dict[str, Path], monkeypatch: pytest.MonkeyPatch, labels: str
) -> None:
    recipe = make_recipe(
        tmp_path, anchor, anchored_experts, gate_training={"rows": 4, "held_out_rows": 4, "labels": labels}
    )
    asked: list[str] = []

    def watched(recipe: object, rows: Sequence[object]) -> Classify:
        learnt = {row.question: row.domain for row in rows}  # type: ignore[attr-defined]

        def classify(questions: Sequence[str]) -> list[ClassifierLabel]:
            assert not set(questions) & set(learnt)
            asked.extend(questions)
            domains = ("general", "math", "coding")
            return [ClassifierLabel(domains[i % 3], 0.9) for i in range(len(questions))]

        return classify

    monkeypatch.setattr(examples_module, "recipe_classifier", watched)
    found = routing_examples(recipe, "train", 4)
    assert sorted(asked) == sorted(row.example.question for row in found)
    assert Counter(row.label.source for row in found) == {"classifier": 12}  # the recipe has no rules
    assert all("classifier: 90%" in row.label.evidence for row in found)


def test_a_sequence_classifier_by_path(tmp_path: Path) -> None:
    torch.manual_seed(0)
    for name, labels in (("right", {0: "math", 1: "general"}), ("wrong", {0: "math", 1: "LABEL_1"})):
        settings: Qwen2Config = config(num_labels=2, id2label=labels)
        Qwen2ForSequenceClassification(settings).save_pretrained(tmp_path / name)
        byte_tokenizer().save_pretrained(tmp_path / name)
    label, _ = sequence_classifier(str(tmp_path / "right"), ["math", "general", "coding"])(["1+1=", "Hello!"])
    assert label.domain in ("math", "general") and 0.5 <= label.confidence <= 1
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="is no sequence classifier"):
        sequence_classifier(str(tmp_path / "none"), ["math", "general"])
    with pytest.raises(UserError, match="has a label 'LABEL_1', which is no domain"):
        sequence_classifier(str(tmp_path / "wrong"), ["math", "general"])


def test_the_confusing_set_covers_the_five_domains() -> None:
    found = confusing_questions(load_recipe(CONFIGS / "qwen2.5-7b-five-experts.yaml"))
    counts = Counter(domain for domain, _ in found)
    assert set(counts) == {"general", "coding", "math", "multilingual", "structured"}
    assert min(counts.values()) >= 7
    assert len({question for _, question in found}) == len(found) >= 70
