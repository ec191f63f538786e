"""Labels of questions by all channels at hand: rules first, the classifier where no rule matches.

Likelihood labels are of tokens and not of questions (gate_training.labelling.likelihood).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from fusion.recipe import Domain
from gate_training.labelling.classifier import Classify
from gate_training.labelling.rules import NO_RULE, label_by_rules


@dataclass(frozen=True)
class QuestionLabel:
    """A question's domain, the channel that decided it, what it went by, how sure it is, what each channel says of it.

    Channels are `rules`, `classifier`, and `data`: the row's own domain.
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
    questions: Sequence[str], domains: dict[str, Domain], classify: Classify | None, rules_first: bool = True
) -> list[QuestionLabel]:
    """The label of each question; by the rules alone without a classifier, by it alone without `rules_first`."""
    found = classify(questions) if classify else [None] * len(questions)
    labels = []
    for question, said in zip(questions, found, strict=True):
        rule = label_by_rules(question, domains)
        channels = {"rules": rule.domain, **({"classifier": said.domain} if said else {})}
        if said is None or (rules_first and rule.evidence != NO_RULE):
            labels.append(QuestionLabel(rule.domain, "rules", rule.evidence, 1.0, channels))
        else:
            evidence = f"classifier: {said.confidence:.0%}"
            labels.append(QuestionLabel(said.domain, "classifier", evidence, said.confidence, channels))
    return labels
