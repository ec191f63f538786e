"""Classifier labels: a question's domain by a linear model on the anchor's own hidden states.

The states halfway through the anchor, averaged over the question, under multinomial logistic regression by the solver
that also fits gates: nothing to download, and half a forward pass a question. A transformers sequence classifier whose
labels are the recipe's domains can take its place (`gate_training.classifier`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.functional import one_hot

from fusion.checkpoint import Checkpoint
from fusion.data import ChatExample
from fusion.encoding import load_tokenizer, prompt_text
from fusion.errors import UserError
from fusion.hub import resolve_model
from fusion.layers import LayerStream, forced, make_batches
from fusion.recipe import Recipe
from fusion.sections.fusing import GateTraining
from fusion.sources import anchor_source
from gate_training.methods import cross_entropy
from gate_training.methods.tokens import InMemory, Tokens, held_back, moments


@dataclass(frozen=True)
class ClassifierLabel:
    """A domain and its probability."""

    domain: str
    confidence: float


Classify = Callable[[Sequence[str]], list[ClassifierLabel]]


def recipe_classifier(recipe: Recipe, examples: Sequence[ChatExample]) -> Classify:
    """The recipe's classifier, or one on its anchor that learns the domains of `examples`."""
    settings = recipe.gate_training
    if settings.classifier:
        return sequence_classifier(settings.classifier, list(recipe.domains))
    questions, domains = [row.question for row in examples], [row.domain for row in examples]
    return anchor_classifier(anchor_source(recipe).folder, questions, domains, settings)


def anchor_classifier(
    anchor: Path, questions: Sequence[str], domains: Sequence[str], settings: GateTraining
) -> Classify:
    """A classifier by the hidden states of the model in folder `anchor`, from labelled questions."""
    names = list(dict.fromkeys(domains))
    labels = torch.tensor([names.index(domain) for domain in domains])  # (questions,)
    inputs = pooled_states(anchor, questions, settings)
    chosen, _ = held_back(labels)
    tokens = InMemory(Tokens(inputs, one_hot(labels, len(names)).float(), chosen, chosen))
    weight = cross_entropy.fit(tokens, moments(tokens), settings)  # (domains, hidden + 1)

    def classify(asked: Sequence[str]) -> list[ClassifierLabel]:
        chances = torch.softmax(pooled_states(anchor, asked, settings) @ weight.T, dim=1)
        best = chances.max(dim=1)
        return [ClassifierLabel(names[i], p) for i, p in zip(best.indices.tolist(), best.values.tolist(), strict=True)]

    return classify


def pooled_states(anchor: Path, questions: Sequence[str], settings: GateTraining) -> torch.Tensor:
    """The states halfway through the model, averaged over each question in its chat template, and a 1 for the bias.

    `(questions, hidden + 1)`.
    """
    tokenizer, checkpoint = load_tokenizer(anchor), Checkpoint(anchor)
    texts = [prompt_text(tokenizer, [{"role": "user", "content": question}]) for question in questions]
    ids = [row[: settings.max_length] for row in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    batches = make_batches(ids, batch_tokens=settings.batch_tokens)
    stream = LayerStream(checkpoint, batches)
    for layer in stream:
        layer.attend()
        layer.mix(forced(0))
        if layer.index + 1 >= stream.layers // 2:
            break
    pooled = torch.ones(len(questions), stream.hidden + 1)
    for batch in batches:
        states = stream.load(batch).float().cpu() * batch.real[..., None]  # (rows, length, hidden)
        pooled[batch.rows, :-1] = states.sum(dim=1) / batch.real.sum(dim=1, keepdim=True)
    return pooled


def sequence_classifier(model: str, domains: Sequence[str]) -> Classify:
    """A transformers sequence classifier by path or hub id. Raises UserError where its labels are not the domains."""
    from transformers import pipeline

    try:
        classifier = pipeline("text-classification", model=str(resolve_model(model)))
    except (ValueError, OSError) as error:
        raise UserError(
            f"gate_training.classifier {model} is no sequence classifier that transformers can load "
            f"({str(error).splitlines()[0]}): name another, or leave the key out"
        ) from error
    labels = set(classifier.model.config.id2label.values())
    if not labels <= set(domains):
        odd = sorted(labels - set(domains))[0]
        raise UserError(
            f"gate_training.classifier {model} has a label '{odd}', which is no domain of the recipe: "
            "rename its labels (id2label in config.json), or leave the key out"
        )

    def classify(asked: Sequence[str]) -> list[ClassifierLabel]:
        return [ClassifierLabel(found["label"], found["score"]) for found in classifier(list(asked), truncation=True)]

    return classify
