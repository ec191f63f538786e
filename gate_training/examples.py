"""Routing examples: a conversation, the domain whose expert should serve it, and where that label came from."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fusion.data import ChatExample, domain_rows
from fusion.encoding import encode_batches, load_tokenizer
from fusion.errors import UserError
from fusion.layers import Batch
from fusion.recipe import Recipe
from gate_training.labelling.classifier import Classify, recipe_classifier
from gate_training.labelling.combine import QuestionLabel, label_questions
from gate_training.labelling.rules import label_by_rules

Split = Literal["train", "held_out"]


@dataclass(frozen=True)
class RoutingExample:
    """One labelled conversation. `source` is the channel (data, rules, classifier), `evidence` what it went by."""

    example: ChatExample
    domain: str
    source: str
    evidence: str


def routing_examples(recipe: Recipe, split: Split, rows: int) -> list[RoutingExample]:
    """`rows` examples a domain from its `train` or `held_out` data, labelled as the recipe's gate_training.labels says.

    Raises UserError where an expert is left without a single example.
    """
    settings = recipe.gate_training
    examples = domain_rows(recipe, split, rows, settings.seed)
    if settings.labels == "data":
        sources = {name: getattr(domain, split).describe() for name, domain in recipe.domains.items()}
        found = [RoutingExample(e, e.domain, "data", sources[e.domain]) for e in examples]
    else:
        labels = _question_labels(recipe, split, examples)
        found = [RoutingExample(e, q.domain, q.source, q.evidence) for e, q in zip(examples, labels, strict=True)]
    served = set(expert_labels(recipe, found))
    for index, expert in enumerate(recipe.experts):
        if index not in served:
            raise UserError(
                f"expert '{expert.name}' has no routing example ({split}): give domain '{expert.domain}' data, "
                "or rules that match its questions"
            )
    return found


def _question_labels(recipe: Recipe, split: Split, examples: list[ChatExample]) -> list[QuestionLabel]:
    """Labels of the examples' questions; a classifier that learns never labels a question it has learnt from."""
    settings = recipe.gate_training
    rules_first = settings.labels != "classifier"

    def label(rows: list[ChatExample], classify: Classify | None) -> list[QuestionLabel]:
        return label_questions([row.question for row in rows], recipe.domains, classify, rules_first)

    if settings.labels == "rules":
        return label(examples, None)
    if split == "held_out" or settings.classifier:
        learnt = domain_rows(recipe, "train", settings.rows, settings.seed)
        return label(examples, recipe_classifier(recipe, learnt))
    halves = examples[::2], examples[1::2]
    labels = [label(half, recipe_classifier(recipe, other)) for half, other in zip(halves, halves[::-1], strict=True)]
    found: list[QuestionLabel] = [labels[0][0]] * len(examples)
    found[::2], found[1::2] = labels
    return found


def rules_agreement(recipe: Recipe, examples: Sequence[RoutingExample]) -> dict[str, float]:
    """Per domain the share of its examples that the recipe's rules alone would send to the same expert."""
    found: dict[str, list[bool]] = {}
    for example in examples:
        ruled = label_by_rules(example.example.question, recipe.domains).domain
        found.setdefault(example.domain, []).append(recipe.expert_of(ruled) == recipe.expert_of(example.domain))
    return {name: sum(hits) / len(hits) for name, hits in found.items()}


def expert_labels(recipe: Recipe, examples: Sequence[RoutingExample]) -> list[int]:
    """The index of the expert that each example's domain is served by."""
    return [recipe.expert_of(example.domain) for example in examples]


def encoded_examples(
    recipe: Recipe, folder: Path, examples: Sequence[RoutingExample], batch_tokens: int | None = None
) -> list[Batch]:
    """The examples as batches labelled with their experts, by the tokenizer in `folder`."""
    settings, rows = recipe.gate_training, [example.example for example in examples]
    labels, size = expert_labels(recipe, examples), batch_tokens or settings.batch_tokens
    return encode_batches(load_tokenizer(folder), rows, labels, settings.max_length, size)
