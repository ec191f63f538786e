"""Gates on texts unlike those that they were fitted on: running text, and answers after another domain's.

    python -m gate_training.other_texts configs/demo.yaml

Held-out rows that neither an expert nor a gate has learnt, as three kinds of text: `answers` (as evaluated), `running
text` (the questions and answers of several rows of a domain after each other, every token counts), and `second answers`
(a question with its answer, put after a question of another expert's with its answer). Prints for each a table of
losses, the fused model under trained, `hidden` and random gates beside anchor, own experts and perfect routing, and how
often the trained gates' first choice is right; for second answers how often likelihood labels would be; last one JSON
object of retained shares, {kind: {gates: {domain: share}}}.
"""

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fusion.checkpoint import Checkpoint
from fusion.data import ChatExample
from fusion.encoding import Encoded, encode, load_tokenizer
from fusion.errors import UserError, run_main
from fusion.evaluation.evaluate import held_out_rows
from fusion.layers import checkpoint_gates
from fusion.progress import quiet_libraries
from fusion.recipe import Recipe
from fusion.recipe_file import load_recipe
from gate_training.compare import HIDDEN, Losses, held_out_losses, mergekit_gates, references, retained
from gate_training.examples import RoutingData
from gate_training.labelling.likelihood import token_targets
from gate_training.report import compared_table
from gate_training.trainer import layer_reports

quiet_libraries()
ROWS_A_TEXT = 6
TRAINED = "trained"


def running_text(rows: list[ChatExample], tokenizer: Any) -> list[Encoded]:
    """Questions and answers of ROWS_A_TEXT rows after each other, without a template; tokens but the first count."""
    texts = []
    for start in range(0, len(rows), ROWS_A_TEXT):
        text = "\n".join(f"{row.question}\n{row.answer}" for row in rows[start : start + ROWS_A_TEXT])
        texts.append(Encoded(tokenizer(text, add_special_tokens=False)["input_ids"], 1))
    return texts


def next_turn(first: ChatExample, second: ChatExample) -> ChatExample:
    """`second` as the next turn of the conversation `first`, whose system message it takes over."""
    turns = [message for message in second.messages if message["role"] != "system"]
    return replace(second, messages=(*first.messages, *turns))


def other_texts(recipe: Recipe) -> dict[str, dict[str, dict[str, float]]]:
    """The retained shares by kind of text, gates and domain; prints the tables. The fused model has to exist."""
    names = list(recipe.domains)
    rows, tokenizer = held_out_rows(recipe, names), load_tokenizer(recipe.fused)
    trained = checkpoint_gates(Checkpoint(recipe.fused))
    gates = {TRAINED: trained, **mergekit_gates(recipe, recipe.fused, [HIDDEN, "mergekit random"])}
    rng = random.Random(recipe.gate_training.seed)
    others = {name: [n for n in names if recipe.expert_of(n) != recipe.expert_of(name)] for name in names}
    pairs = [(rng.choice(rows[rng.choice(others[name])]), row) for name in names if others[name] for row in rows[name]]
    kinds = {
        "answers": [(name, encode(tokenizer, row)) for name in names for row in rows[name]],
        "running text": [(name, text) for name in names for text in running_text(rows[name], tokenizer)],
        "second answers": [(second.domain, encode(tokenizer, next_turn(first, second))) for first, second in pairs],
    }
    shares = {}
    for kind, labelled in kinds.items():
        data = _as_held_out(recipe, labelled)
        losses: dict[str, Losses] = references(recipe, recipe.fused, data)
        losses |= held_out_losses(recipe.fused, data, gates)
        print(f"\n{kind}, {sum(len(text.ids) - text.answer_start for _, text in labelled):,} tokens that count\n")
        print("\n".join(compared_table(losses)[2:]))
        right = [layer.answer_accuracy for layer in layer_reports(recipe, recipe.fused, data, trained)]
        print(f"\nby layer right: {', '.join(f'{share:.3f}' for share in right)}", flush=True)
        shares[kind] = {name: retained(losses[name], losses) for name in gates}
    print(f"likelihood labels right on {likelihood_right(recipe, data):.3f} of them")
    return shares


def _as_held_out(recipe: Recipe, labelled: list[tuple[str, Encoded]]) -> RoutingData:
    domains = [name for name, _ in labelled]
    return RoutingData(
        train_examples=[],
        train=[],
        train_labels=[],
        held_out_examples=[],
        held_out=[text for _, text in labelled],
        held_out_labels=[recipe.expert_of(name) for name in domains],
        domains=domains,
        rules_agreement={},
        batch_tokens=recipe.gate_training.batch_tokens,
    )


def likelihood_right(recipe: Recipe, data: RoutingData) -> float:
    """The share of held-out answer tokens that likelihood labels send to their domain's expert."""
    batches, experts = data.held_out_batches(), len(recipe.experts)
    found = token_targets(Checkpoint(recipe.fused), batches, experts, recipe.gate_training.window)
    hits = [
        (shares.argmax(dim=1) == batch.token_labels())[batch.answer[batch.real]]
        for batch, shares in zip(batches, found, strict=True)
    ]
    return float(torch.cat(hits).float().mean())


def main(path: str, *overrides: str) -> None:
    """Prints the tables of the recipe at `path`. Raises UserError without its fused model."""
    recipe = load_recipe(Path(path), list(overrides))
    if not (recipe.fused / "config.json").is_file():
        raise UserError(f"{recipe.fused} does not exist yet: run `qwen-fusion run {path}` first")
    print(json.dumps(other_texts(recipe)))


if __name__ == "__main__":
    run_main(main)
