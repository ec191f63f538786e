"""Routing examples: a conversation, the domain whose expert should serve it, and where that label came from."""

import hashlib
import json
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from fusion.checkpoint import write_text
from fusion.data import ChatExample, choosing_rows, train_rows, trained_on
from fusion.encoding import Encoded, encode, load_tokenizer
from fusion.errors import UserError
from fusion.layers import Batch, make_batches
from fusion.progress import console
from fusion.recipe import Recipe
from gate_training.feedback import feedback_file, read_feedback, repeated, split
from gate_training.labelling.classifier import Classify, recipe_classifier
from gate_training.labelling.combine import QuestionLabel, label_questions
from gate_training.labelling.likelihood import LikelihoodLabel, answer_labels
from gate_training.labelling.rules import label_by_rules

Split = Literal["train", "held_out"]


@dataclass(frozen=True)
class RoutingExample:
    """One labelled conversation."""

    example: ChatExample
    label: QuestionLabel

    @property
    def domain(self) -> str:
        """The domain that it is labelled with."""
        return self.label.domain


def routing_examples(recipe: Recipe, split: Split, rows: int, folder: Path | None = None) -> list[RoutingExample]:
    """`rows` examples a domain from its `train` or `held_out` data, labelled as the recipe's gate_training.labels says.

    Where labels are combined, the experts of the fused model in `folder` have a say. Raises UserError where an expert
    is left without a single example.
    """
    settings = recipe.gate_training
    if split == "train":
        examples = train_rows(recipe, rows, settings.seed)
    else:
        examples = [row for name in recipe.domains for row in choosing_rows(recipe, name, rows, settings.seed + 1)]
    if settings.labels == "data":
        sources = {name: getattr(domain, split).describe() for name, domain in recipe.domains.items()}
        labels = [QuestionLabel(e.domain, "data", sources[e.domain], 1.0, {}) for e in examples]
    else:
        likely = answer_labels(recipe, folder, examples) if folder and settings.labels == "combined" else None
        labels = _question_labels(recipe, split, examples, likely)
    found = [RoutingExample(example, label) for example, label in zip(examples, labels, strict=True)]
    served = set(expert_labels(recipe, found))
    for index, expert in enumerate(recipe.experts):
        if index not in served:
            raise UserError(
                f"expert '{expert.name}' has no routing example ({split}): give domain '{expert.domain}' data, "
                "or rules that match its questions"
            )
    return found


def _question_labels(
    recipe: Recipe, split: Split, examples: list[ChatExample], likely: list[LikelihoodLabel] | None
) -> list[QuestionLabel]:
    """Labels of the examples' questions; a classifier that learns never labels a question it has learnt from."""
    settings = recipe.gate_training
    rules_first = settings.labels != "classifier"

    def label(classify: Classify | None, part: slice = slice(None)) -> list[QuestionLabel]:
        questions = [row.question for row in examples[part]]
        return label_questions(questions, recipe.domains, classify, rules_first, likely[part] if likely else None)

    if settings.labels == "rules":
        return label(None)
    if split == "held_out" or settings.classifier:
        return label(recipe_classifier(recipe, train_rows(recipe, settings.rows, settings.seed)))
    even = label(recipe_classifier(recipe, examples[1::2]), slice(0, None, 2))
    odd = label(recipe_classifier(recipe, examples[::2]), slice(1, None, 2))
    found = [*even, *odd]
    found[::2], found[1::2] = even, odd
    return found


def _feedback_examples(recipe: Recipe, file: Path, others: int) -> list[RoutingExample]:
    rows, _ = split(read_feedback(file, recipe))
    return [
        RoutingExample(row, QuestionLabel(row.domain, "feedback", file.name, 1.0, {}))
        for row in repeated(rows, others, recipe.gate_training.feedback_share)
    ]


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


@dataclass(frozen=True)
class RoutingData:
    """Labelled conversations as token ids: those that gates are fitted on, and those that they are judged by."""

    train_examples: list[RoutingExample]
    train: list[Encoded]
    train_labels: list[int]  # the expert of each
    held_out_examples: list[RoutingExample]
    held_out: list[Encoded]
    held_out_labels: list[int]
    domains: list[str]  # of held-out conversations
    rules_agreement: dict[str, float]  # per domain, of held-out conversations
    batch_tokens: int

    def train_batches(self, numbers: Collection[int] | None = None) -> list[Batch]:
        """What is trained on, labelled; the examples of these numbers alone where they are given."""
        return _batches(self.train, self.train_labels, numbers, self.batch_tokens)

    def digest(self) -> str:
        """A hash of all ids and labels."""
        rows = [[(row.ids, row.answer_start) for row in rows] for rows in (self.train, self.held_out)]
        return hashlib.sha256(repr((rows, self.train_labels, self.held_out_labels)).encode()).hexdigest()

    def held_out_batches(self, experts: Collection[int] | None = None) -> list[Batch]:
        """What is held out, labelled; of these experts alone where they are given."""
        labels = self.held_out_labels
        numbers = None if experts is None else {i for i, label in enumerate(labels) if label in experts}
        return _batches(self.held_out, labels, numbers, self.batch_tokens)


def write_labels(data: RoutingData, path: Path) -> None:
    """Every example's label, a JSON object a line: domain, channel, evidence, confidence, what each channel says."""
    rows = [("train", row) for row in data.train_examples] + [("held_out", row) for row in data.held_out_examples]
    lines = [{"split": split, **asdict(row.label), "question": row.example.question} for split, row in rows]
    write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def _batches(
    rows: Sequence[Encoded], labels: Sequence[int], numbers: Collection[int] | None, batch_tokens: int
) -> list[Batch]:
    kept = [pair for i, pair in enumerate(zip(rows, labels, strict=True)) if numbers is None or i in numbers]
    ids, starts = [row.ids for row, _ in kept], [row.answer_start for row, _ in kept]
    return make_batches(ids, starts, [label for _, label in kept], batch_tokens)


def routing_data(recipe: Recipe, folder: Path, feedback: Path | None = None) -> RoutingData:
    """The recipe's routing examples by the tokenizer of the fused model in `folder`, with those of `feedback`.

    `feedback` None: what gates of this recipe have been trained on before, where there is any. Raises UserError where
    the data leave an expert without examples.
    """
    settings, tokenizer = recipe.gate_training, load_tokenizer(folder)
    train = routing_examples(recipe, "train", settings.rows, folder)
    train += _feedback_examples(recipe, feedback or feedback_file(recipe), len(train))
    held_out = routing_examples(recipe, "held_out", settings.held_out_rows, folder)
    seen = trained_on([row.example for row in train])
    if both := sum(seen(row.example) for row in held_out):
        console.print(
            f"  {both} of {len(held_out)} held-out routing examples are also trained on: what they say flatters",
            highlight=False,
            soft_wrap=True,
        )
    return RoutingData(
        train_examples=train,
        train=[encode(tokenizer, row.example, settings.max_length) for row in train],
        train_labels=expert_labels(recipe, train),
        held_out_examples=held_out,
        held_out=[encode(tokenizer, row.example, settings.max_length) for row in held_out],
        held_out_labels=expert_labels(recipe, held_out),
        domains=[example.domain for example in held_out],
        rules_agreement=rules_agreement(recipe, held_out),
        batch_tokens=settings.batch_tokens,
    )
