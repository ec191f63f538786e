"""Routing examples: a conversation, the domain whose expert should serve it, and where that label came from."""

from collections.abc import Sequence
from dataclasses import dataclass

from fusion.data import ChatExample, load_examples
from fusion.errors import UserError
from fusion.recipe import Recipe
from gate_training.labelling.rules import label_by_rules


@dataclass(frozen=True)
class RoutingExample:
    """One labelled conversation. `source` is the channel (data, rules), `evidence` what it went by."""

    example: ChatExample
    domain: str
    source: str
    evidence: str


def routing_examples(recipe: Recipe, split: str, rows: int) -> list[RoutingExample]:
    """`rows` examples a domain from its `train` or `held_out` data, labelled as the recipe's gate_training.labels says.

    Raises UserError where an expert is left without a single example.
    """
    settings = recipe.gate_training
    found: list[RoutingExample] = []
    for name, domain in recipe.domains.items():
        source = domain.train if split == "train" else domain.held_out
        for example in load_examples(source, name, rows, settings.seed):
            if settings.labels == "rules":
                rule = label_by_rules(example.question, recipe.domains)
                found.append(RoutingExample(example, rule.domain, "rules", rule.evidence))
            else:
                found.append(RoutingExample(example, name, "data", source.describe()))
    served = set(expert_labels(recipe, found))
    for index, expert in enumerate(recipe.experts):
        if index not in served:
            raise UserError(
                f"expert '{expert.name}' has no routing example ({split}): give domain '{expert.domain}' data, "
                "or rules that match its questions"
            )
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
