"""A conversation explained by a recipe's fused model, its answer asked for first where that is wanted.

explain_asked(recipe, of_prompt("17+25="), with_answer=True).shares.answer
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from fusion import road
from fusion.checkpoint import Checkpoint
from fusion.encoding import load_tokenizer
from fusion.errors import UserError
from fusion.explain.conversation import Conversation, tokenize
from fusion.explain.explain import explain_all
from fusion.explain.explanation import Explanation
from fusion.explain.opinions import opinions
from fusion.merge import other_experts
from fusion.recipe import Recipe


def explain_asked(
    recipe: Recipe, conversation: Conversation, with_answer: bool = False, classifier: bool = False
) -> Explanation:
    """A conversation explained by the recipe's fused model, with the label channels' opinions.

    `with_answer` asks the recipe's server for the answer first. The classifier is heard where the recipe labels by it,
    or `classifier` says so: it learns from the training rows first. Raises UserError where there is no checkpoint with
    trained gates and the recipe's experts, or the conversation is longer than serving.max_model_len.
    """
    folder = road.gated_folder(recipe)
    if said := other_experts(recipe, folder):
        raise UserError(f"{said}: run `qwen-fusion add-expert`, `remove-expert` or `merge` first")
    checkpoint, tokenizer = opened_checkpoint(recipe, folder)
    refuse_too_long(recipe, tokenizer, conversation)
    if with_answer:
        from serving.ask import ask_messages

        conversation = replace(conversation, answer=ask_messages(recipe, conversation.messages).text)
    (explained,) = explain_all(checkpoint, tokenizer, [conversation])
    return replace(explained, opinions=opinions(recipe, conversation, explained.winner, classifier))


def opened_checkpoint(recipe: Recipe, folder: Path) -> tuple[Checkpoint, Any]:
    """A fused checkpoint with its positions as the recipe serves them, and its tokenizer."""
    checkpoint = Checkpoint(folder)
    if recipe.serving.yarn_factor is not None:
        from serving.engine import yarn_overrides

        checkpoint.config |= yarn_overrides(checkpoint.config, recipe.serving.yarn_factor)
    return checkpoint, load_tokenizer(folder)


def refuse_too_long(recipe: Recipe, tokenizer: Any, conversation: Conversation) -> None:
    """Raises UserError where a conversation has more tokens than the served model may read."""
    limit = recipe.serving.max_model_len
    count = len(tokenize(tokenizer, conversation)) - (conversation.answer is not None)  # the end mark is not read
    if count > limit:
        raise UserError(
            f"{recipe.at('serving', 'max_model_len')}the conversation has {count:,} tokens and serving.max_model_len "
            f"is {limit:,}: shorten it, or raise that"
        )
