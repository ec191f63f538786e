"""What else a family of experts can become, by answer loss beside the fused model and every way of routing it.

    python -m fusion.evaluation.alternatives configs/qwen2.5-0.5b-five-experts.yaml --set data_folder=../data

One dense model: the average of the experts, their TIES and DARE (mergekit's linear, ties, dare_ties), and one trained
on the union of their data for as many steps. Whole experts behind a router that reads the question (rules, then
classifier). All is kept under OUTPUT/alternatives, and made again only where what it comes from has changed.
"""

import argparse
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from fusion.checkpoint import Checkpoint, put_in_place, write_json, write_text
from fusion.data import ChatExample, choosing_rows, train_rows
from fusion.encoding import encode, encode_batches, load_tokenizer
from fusion.errors import run_main
from fusion.evaluation.answer_loss import answer_losses
from fusion.evaluation.evaluate import held_out_rows
from fusion.layers import Batch, Route, checkpoint_gates, forced, gated
from fusion.progress import console
from fusion.reader import Reader
from fusion.recipe import BranchSettings, Recipe
from fusion.recipe_file import load_recipe
from fusion.road import learnt_rows, trained_layers
from fusion.sources import ModelSource, anchor_source, original_source, own_source, whole_model
from fusion.steps import Step, run_step
from gate_training.compare import mergekit_gates
from gate_training.labelling.classifier import recipe_classifier
from gate_training.labelling.combine import label_questions

DENSE: dict[str, tuple[str, dict[str, float]]] = {  # mergekit's method and its parameters of every model
    "average": ("linear", {"weight": 1.0}),
    "TIES": ("ties", {"weight": 1.0, "density": 0.5}),
    "DARE": ("dare_ties", {"weight": 1.0, "density": 0.5}),
}
UNION = "union"
Losses = dict[str, float]  # nats a held-out answer token, by domain


def folder_of(recipe: Recipe, name: str) -> Path:
    """Where an alternative model is kept."""
    return recipe.folder / "alternatives" / name


def dense_step(recipe: Recipe, name: str) -> Step:
    """One dense model of the experts, merged by mergekit on the anchor."""
    method, parameters = DENSE[name]
    anchor, out = anchor_source(recipe), folder_of(recipe, name)
    sources = [original_source(recipe, expert) for expert in recipe.experts]

    def action() -> str:
        from mergekit.config import MergeConfiguration
        from mergekit.merge import run_merge
        from mergekit.options import MergeOptions

        aside = out.with_name(f".{name}.partial")
        with ExitStack() as stack:
            folders = [str(stack.enter_context(whole_model(source))) for source in sources]
            if method != "linear":  # what has not moved from the base adds nothing to a sum of task vectors
                folders = [path for path in folders if path != str(anchor.folder)]
            config: dict[str, Any] = {
                "merge_method": method,
                "models": [{"model": path, "parameters": parameters} for path in folders],
                "parameters": {"normalize": True},
                "dtype": "bfloat16",
            }
            if method != "linear":
                config["base_model"] = str(anchor.folder)
            options = MergeOptions(copy_tokenizer=True, random_seed=0, quiet=True, write_model_card=False)
            run_merge(MergeConfiguration.model_validate(config), str(aside), options)
        put_in_place(aside, out)
        return f"{name}: mergekit {method} of {len(folders)} models"

    inputs = [path for source in (anchor, *sources) for path in source.paths]
    return Step(f"alternative {name}", [method, parameters], inputs, [out], action)


def union_step(recipe: Recipe) -> Step:
    """One dense model trained on what all branched experts have learnt from, for the steps of all of them.

    All else is as the first of them was trained.
    """
    anchor, out = anchor_source(recipe), folder_of(recipe, UNION)
    branched = [(expert, expert.branch) for expert in recipe.experts if expert.branch]
    steps = sum(settings.steps for _, settings in branched)
    settings: BranchSettings = branched[0][1].model_copy(
        update={"steps": steps, "evaluate_every": max(1, steps // 8), "allow_no_gain": True, "answers": "reference"}
    )

    rows = [row for expert, own in branched for row in learnt_rows(recipe, expert, own)]
    held_out = [
        row for expert, own in branched for row in choosing_rows(recipe, expert.domain, own.held_out_rows, own.seed + 1)
    ]

    def action() -> str:
        from fusion.branch import train_expert

        result = train_expert(anchor.folder, out, rows, held_out, settings, trained_layers(recipe))
        return f"{UNION}: loss {result.loss_before:.3f} -> {result.loss_after:.3f}, {result.tokens:,} tokens"

    data = [settings, [[row.messages for row in found] for found in (rows, held_out)]]
    return Step(f"alternative {UNION}", data, [anchor.folder], [out], action)


def losses(recipe: Recipe) -> dict[str, Losses]:
    """Every way's answer loss by domain on the evaluation's held-out rows. The alternative models have to be there."""
    tokenizer, checkpoint = load_tokenizer(recipe.fused), Checkpoint(recipe.fused)
    rows = [row for found in held_out_rows(recipe, list(recipe.domains)).values() for row in found]
    domains = [row.domain for row in rows]
    right = [recipe.expert_of(domain) for domain in domains]
    picked = routed_experts(recipe, rows)

    def batches(labels: Sequence[int]) -> list[Batch]:
        return encode_batches(tokenizer, rows, labels)

    def of(source: Checkpoint | Reader, route: Route, labels: Sequence[int], name: str) -> Losses:
        return answer_losses(source, batches(labels), domains, route, f"answer loss, {name}")

    anchor = anchor_source(recipe)
    found = {"anchor": of(Reader(anchor), forced(0), [0] * len(rows), "anchor")}
    found["own expert"] = _whole_experts(recipe, rows, right, tokenizer, "own experts")
    found["whole expert, by its question"] = _whole_experts(recipe, rows, picked, tokenizer, "routed whole experts")
    for name in (*DENSE, UNION):
        if folder_of(recipe, name).is_dir():
            found[f"dense, {name}"] = of(
                Reader(ModelSource(name, folder_of(recipe, name))), forced(0), [0] * len(rows), name
            )
    found["fused, perfect routing"] = of(checkpoint, forced(), right, "labelled")
    found["fused, routed by its question"] = of(checkpoint, forced(), picked, "by question")
    top = checkpoint.config["num_experts_per_tok"]
    for name, gates in mergekit_gates(recipe, recipe.fused).items():
        found[f"fused, {name}"] = of(checkpoint, gated(gates, top), right, name)
    for k in (1, 2):
        found[f"fused, trained gates, top-{k}"] = of(
            checkpoint, gated(checkpoint_gates(checkpoint), k), right, f"top-{k}"
        )
    return found


def routed_experts(recipe: Recipe, rows: Sequence[ChatExample]) -> list[int]:
    """The expert that a router in front of whole models picks for each row: by rules, or by a classifier."""
    settings = recipe.gate_training
    classify = recipe_classifier(recipe, train_rows(recipe, settings.rows, settings.seed))
    labels = label_questions([row.question for row in rows], recipe.domains, classify)
    return [recipe.expert_of(label.domain) for label in labels]


def _whole_experts(
    recipe: Recipe, rows: Sequence[ChatExample], experts: Sequence[int], tokenizer: Any, name: str
) -> Losses:
    """The losses where each row is answered by one whole expert."""
    nats: dict[str, float] = defaultdict(float)
    tokens: dict[str, int] = defaultdict(int)
    for index in sorted(set(experts)):
        mine = [row for row, expert in zip(rows, experts, strict=True) if expert == index]
        batches = encode_batches(tokenizer, mine, [0] * len(mine))
        source = own_source(recipe, recipe.experts[index])
        means = answer_losses(Reader(source), batches, [row.domain for row in mine], forced(0), f"answer loss, {name}")
        for row in mine:
            encoded = encode(tokenizer, row)
            count = len(encoded.ids) - encoded.answer_start
            nats[row.domain] += means[row.domain] * count
            tokens[row.domain] += count
    return {name: nats[name] / tokens[name] for name in dict.fromkeys(row.domain for row in rows)}


def markdown(found: dict[str, Losses]) -> str:
    """A line a way: its losses by domain, their mean, the share of the experts' gain that it keeps."""
    anchor, own = found["anchor"], found["own expert"]
    gains = {name: anchor[name] - own[name] for name in anchor if anchor[name] - own[name] > 0.01}
    lines = ["| way | " + " | ".join(anchor) + " | mean | of the experts' gain kept: mean, worst |"]
    lines.append("| --- " * (len(anchor) + 3) + "|")
    for way, by_domain in found.items():
        kept = [(anchor[name] - by_domain[name]) / gain for name, gain in gains.items()]
        share = f"{sum(kept) / len(kept):.3f}, {min(kept):.3f}" if kept else "no gain"
        cells = [f"{loss:.3f}" for loss in by_domain.values()]
        mean = sum(by_domain.values()) / len(by_domain)
        lines.append(f"| {way} | " + " | ".join(cells) + f" | {mean:.3f} | {share} |")
    return "\n".join([*lines, ""])


def main(*given: str) -> None:
    """Makes the alternatives, measures all ways, prints the table and leaves it in OUTPUT/alternatives."""
    parser = argparse.ArgumentParser(
        prog="python -m fusion.evaluation.alternatives", description=__doc__.split("\n")[0]
    )
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    arguments = parser.parse_args(given)
    recipe = load_recipe(arguments.recipe, arguments.set)
    steps = [dense_step(recipe, name) for name in DENSE]
    if any(expert.branch for expert in recipe.experts):
        steps.append(union_step(recipe))
    for step in steps:
        run_step(step, recipe.folder)
    found = losses(recipe)
    write_json(recipe.folder / "alternatives" / "losses.json", found)
    write_text(recipe.folder / "alternatives" / "losses.md", markdown(found))
    console.print(markdown(found), highlight=False, soft_wrap=True)


if __name__ == "__main__":
    run_main(main)
