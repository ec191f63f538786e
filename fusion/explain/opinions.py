"""The label channels' opinions of a conversation, beside where its tokens went (gate_training/labelling).

for opinion in opinions(recipe, conversation, "math"):
    print(opinion.channel, opinion.expert, opinion.evidence, opinion.agrees)
"""

from fusion.data import ChatExample, train_rows
from fusion.explain.conversation import Conversation
from fusion.explain.explanation import Channel, Opinion
from fusion.recipe import Recipe
from gate_training.labelling.classifier import recipe_classifier
from gate_training.labelling.likelihood import answer_labels
from gate_training.labelling.rules import label_by_rules


def opinions(recipe: Recipe, conversation: Conversation, winner: str, classifier: bool = False) -> list[Opinion]:
    """What each channel at hand says, and whether its domain's expert is `winner`.

    Rules and classifier go by the last user message, likelihood by the answer. A classifier learns from the training
    rows first (half a forward pass of the anchor a row), so it is heard only where the recipe labels by it, or
    `classifier` says so.
    """

    def opinion(channel: Channel, domain: str, evidence: str, probability: float | None) -> Opinion:
        expert = recipe.experts[recipe.expert_of(domain)].name
        return Opinion(channel, domain, expert, evidence, probability, expert == winner)

    settings = recipe.gate_training
    rule = label_by_rules(conversation.question, recipe.domains)
    found = [opinion("rules", rule.domain, rule.evidence, None)]
    if classifier or settings.labels in ("classifier", "combined"):
        learnt = [] if settings.classifier else train_rows(recipe, settings.rows, settings.seed)
        (said,) = recipe_classifier(recipe, learnt)([conversation.question])
        evidence = settings.classifier or "the anchor's hidden states"
        found.append(opinion("classifier", said.domain, evidence, said.confidence))
    if conversation.answer is not None:
        answer = {"role": "assistant", "content": conversation.answer}
        example = ChatExample((*conversation.messages, answer), domain="")
        (liked,) = answer_labels(recipe, recipe.fused, [example])
        found.append(opinion("likelihood", liked.domain, "the answer's tokens", liked.confidence))
    return found
