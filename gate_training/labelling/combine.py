"""Labels of questions by all channels at hand: rules first; where none matches, the surer of classifier and likelihood.

Likelihood speaks where experts are at hand and the question has an answer that they can read.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from fusion.data import train_rows
from fusion.recipe import Recipe
from fusion.sections.data import Domain
from gate_training.labelling.classifier import Classify, recipe_classifier
from gate_training.labelling.likelihood import LikelihoodLabel
from gate_training.labelling.rules import NO_RULE, label_by_rules


@dataclass(frozen=True)
class QuestionLabel:
    """A question's domain, the channel that decided it, what it went by, how sure it is, what each channel says of it.

    Channels are `rules`, `classifier`, `likelihood`, `data`: the row's own domain, and `feedback`: what people said.
    """

    domain: str
    source: str
    evidence: str
    confidence: float
    channels: dict[str, str]

    @property
    def disputed(self) -> bool:
        """Whether the channels disagree."""
        return len(set(self.channels.values())) > 1


def label_questions(
    questions: Sequence[str],
    domains: dict[str, Domain],
    classify: Classify | None,
    rules_first: bool = True,
    likely: Sequence[LikelihoodLabel] | None = None,
) -> list[QuestionLabel]:
    """The label of each question; by the rules alone without a classifier, by it alone without `rules_first`.

    `likely` is what the experts say of each question's answer.
    """
    found = classify(questions) if classify else [None] * len(questions)
    labels = []
    heard: Sequence[LikelihoodLabel | None] = likely or [None] * len(questions)
    for question, said, liked in zip(questions, found, heard, strict=True):
        rule = label_by_rules(question, domains)
        channels = {"rules": rule.domain, **({"classifier": said.domain} if said else {})}
        if liked:  # it knows experts, not domains: which of the expert's is for the other channels to say
            channels["likelihood"] = next((d for d in reversed(channels.values()) if d in liked.serves), liked.domain)
        if said is None or (rules_first and rule.evidence != NO_RULE):
            labels.append(QuestionLabel(rule.domain, "rules", rule.evidence, 1.0, channels))
            continue
        source, sure = "classifier", said.confidence
        if liked and liked.confidence > sure:
            source, sure = "likelihood", liked.confidence
        labels.append(QuestionLabel(channels[source], source, f"{source}: {sure:.0%}", sure, channels))
    return labels


def whole_experts(recipe: Recipe, questions: Sequence[str]) -> list[int]:
    """The expert that a router in front of whole models picks for each question: by rules, else by a classifier."""
    rules = [label_by_rules(question, recipe.domains) for question in questions]
    domains = [rule.domain for rule in rules]
    open_ = [number for number, rule in enumerate(rules) if rule.evidence == NO_RULE]
    if open_:
        settings = recipe.gate_training
        classify = recipe_classifier(recipe, train_rows(recipe, settings.rows, settings.seed))
        for number, said in zip(open_, classify([questions[number] for number in open_]), strict=True):
            domains[number] = said.domain
    return [recipe.expert_of(domain) for domain in domains]
