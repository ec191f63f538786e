"""How fast gates are trained, as ratios measured in one run: against a plain forward pass, and against the peers' way.

    make bench-gates      # python -m gate_training.bench configs/demo.yaml, after `make demo`
    python -m gate_training.bench configs/qwen2.5-0.5b-two-experts.yaml peers gate_training.rows=8   # that part alone
    make bench-runs       # python -m gate_training.bench configs/demo.yaml runs: what the quality figures come from

Every token has to pass every layer once, so one dense expert's forward pass without head over the same tokens is the
limit at top-1; at top-2 the MLPs count twice. The peers' way (gate_training/peer.py) trains the gates of the whole
model in memory. gate_training/full_size.py is one layer of 7B. What fused models retain is quoted from the evaluations
of RUNS, after one domain's losses have been measured again: light, medium and strong drift, merged as it is, on shared
parts, healed, anchored. The last line is one JSON object.
"""

import json
import shlex
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, AutoModelForCausalLM

from fusion.checkpoint import Checkpoint, read_json
from fusion.encoding import encode_batches, load_tokenizer
from fusion.errors import UserError, run_main
from fusion.evaluation.answer_loss import answer_losses
from fusion.evaluation.evaluate import code_hash, held_out_rows, result_path
from fusion.hardware import compute_dtype, peak_memory, stream_device
from fusion.layers import Batch, Gates, Route, Source, checkpoint_gates, forced, gated
from fusion.progress import quiet_libraries
from fusion.reader import Reader
from fusion.recipe import Recipe
from fusion.recipe_file import load_recipe
from fusion.road import evaluate_step
from fusion.sources import SHARED_NOTE, anchor_source, expert_sources, shared_parts
from fusion.steps import is_current
from gate_training.compare import HIDDEN, mergekit_gates
from gate_training.examples import RoutingData, routing_data
from gate_training.peer import routing_accuracy
from gate_training.resume import LayerNotes
from gate_training.trainer import METHODS, fit_gates

quiet_libraries()
ROUNDS = 3
LEARNING_RATES = (3e-3, 1e-2, 3e-2)  # of the peers' way, the best counts


def forward_seconds(folder: Path, batches: list[Batch]) -> float:
    """Seconds of transformers' forward pass without head over right-padded batches, loading aside."""
    model = AutoModel.from_pretrained(folder, dtype=compute_dtype(), use_safetensors=True).to(stream_device()).eval()
    with torch.inference_mode():
        start = time.perf_counter()
        for batch in batches:
            ids, mask = batch.ids.to(model.device), batch.real.long().to(model.device)
            states = model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        float(states[0, 0, 0])  # waits for the device
        return time.perf_counter() - start


def fit(recipe: Recipe, data: RoutingData, method: str, top_k: int) -> tuple[float, Gates]:
    """The seconds that fitting all gates takes, from the checkpoint on disk and token ids, and the gates."""
    start = time.perf_counter()
    gates, _ = fit_gates(recipe, recipe.fused, data, method, top_k)
    seconds = time.perf_counter() - start
    LayerNotes.forget(recipe.folder)
    return seconds, gates


def throughput(recipe: Recipe) -> dict[str, float]:
    """Gate training's tokens/s as a share of the forward pass's, by method and top-k, medians of alternating rounds."""
    data = routing_data(recipe, recipe.fused)
    batches = [*data.train_batches(), *data.held_out_batches()]
    tokens = sum(int(batch.real.sum()) for batch in batches)
    kinds = [("cross-entropy", 1), ("cross-entropy", 2), *((name, 1) for name in METHODS if name != "cross-entropy")]
    plain: list[float] = []
    taken: dict[tuple[str, int], list[float]] = {kind: [] for kind in kinds}
    for _ in range(ROUNDS):
        plain.append(forward_seconds(expert_sources(recipe)[0].folder, batches))
        for kind in kinds:
            taken[kind].append(fit(recipe, data, *kind)[0])
    limit = tokens / statistics.median(plain)
    print(f"one dense expert's forward pass over {tokens:,} tokens: {limit:,.0f} tokens/s")
    shares = {}
    for (method, top_k), seconds in taken.items():
        rate = tokens / statistics.median(seconds)
        shares[f"{method}, top-{top_k}"] = rate / limit
        print(f"gates by {method}, top-{top_k}: {rate:,.0f} tokens/s, {rate / limit:.2f} of it")
    return shares


def ours(recipe: Recipe) -> dict[str, Any]:
    """Seconds, held-out routing accuracy and peak memory of one fit by cross-entropy; run in a process of its own."""
    data = routing_data(recipe, recipe.fused)
    seconds, gates = fit(recipe, data, "cross-entropy", recipe.routing.top_k)
    peak = peak_memory()
    model = AutoModelForCausalLM.from_pretrained(recipe.fused, dtype=torch.float32, use_safetensors=True)
    with torch.no_grad():
        for layer, gate in gates.items():
            model.get_parameter(f"model.layers.{layer}.mlp.gate.weight").copy_(gate)
    accuracy = routing_accuracy(model, data.held_out_batches())
    return {"seconds": seconds, "accuracy": accuracy, "peak_bytes": peak}


def against_peers(path: str, *overrides: str) -> dict[str, float]:
    """Time and memory of the peers' way over ours, to 99% of the weaker side's final held-out routing accuracy."""
    mine = _child("gate_training.bench", path, "ours", *overrides)
    runs = [_child("gate_training.peer", path, str(rate), *overrides) for rate in LEARNING_RATES]
    best = max(runs, key=lambda run: run["curve"][-1][1])
    goal = 0.99 * min(mine["accuracy"], best["curve"][-1][1])
    reached = next(seconds for seconds, accuracy in best["curve"] if accuracy >= goal)
    for name, seconds, accuracy, peak in (
        ("gate training", mine["seconds"], mine["accuracy"], mine["peak_bytes"]),
        (f"Trainer, rate {best['learning_rate']:g}", *best["curve"][-1], best["peak_bytes"]),
    ):
        print(f"{name}: held-out routing accuracy {accuracy:.4f} in {seconds:.1f} s, peak memory {peak / 1e9:.2f} GB")
    print(f"Trainer at {goal:.4f}: {reached:.1f} s")
    return {
        "speedup_vs_trainer": reached / mine["seconds"],
        "memory_vs_trainer": mine["peak_bytes"] / best["peak_bytes"],
    }


def _child(module: str, *arguments: str) -> Any:
    """The JSON object that a module prints last, run in a process whose peak memory is its own."""
    done = subprocess.run([sys.executable, "-m", module, *arguments], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


@dataclass(frozen=True)
class Run:
    """A run of a recipe whose evaluation the benchmark quotes, and the overrides that make it."""

    recipe: str
    overrides: tuple[str, ...] = ()

    def load(self) -> Recipe:
        """The recipe with its overrides."""
        return load_recipe(Path(self.recipe), list(self.overrides))

    def arguments(self) -> list[str]:
        """What makes the run, after `qwen-fusion`."""
        return ["run", self.recipe, *(part for override in self.overrides for part in ("--set", override))]


EXPERTS = ("general", "coding", "math", "multilingual", "structured")
AS_THEY_ARE = tuple(f"experts.{name}.anchor=null" for name in EXPERTS)
HEAL = ("heal.learning_rate=2.0e-3", "heal.rows=200", "heal.max_length=256")
MEDIUM = tuple(f"experts.{name}.branch.anchor_penalty=30" for name in EXPERTS)


def _drifted(output: str, *overrides: str) -> "Run":
    return Run("configs/demo-drifted.yaml", (f"output=runs/{output}", *overrides))


RUNS = {
    "demo": Run("configs/demo.yaml"),
    "real": Run("configs/qwen2.5-0.5b-two-experts.yaml"),
    "drifted_anchored": _drifted("demo-drifted"),
    "drifted_plain": _drifted("demo-drifted-plain", *AS_THEY_ARE),
    "drifted_shared_auto": _drifted("demo-drifted-auto", *AS_THEY_ARE, "shared=auto"),
    "drifted_healed": _drifted("demo-drifted-healed", *AS_THEY_ARE, *HEAL),
    "medium_anchored": _drifted("demo-medium", *MEDIUM),
    "medium_plain": _drifted("demo-medium-plain", *MEDIUM, *AS_THEY_ARE),
    "medium_shared_auto": _drifted("demo-medium-auto", *MEDIUM, *AS_THEY_ARE, "shared=auto"),
    "medium_healed": _drifted("demo-medium-healed", *MEDIUM, *AS_THEY_ARE, *HEAL),
    "light_shared_auto": Run(
        "configs/qwen2.5-0.5b-two-experts.yaml",
        (
            "output=runs/qwen2.5-0.5b-light",
            "routing.moe_layers=null",
            "experts.structured.branch.trainable=all",
            "shared=auto",
        ),
    ),
}


def quality() -> dict[str, float | None]:
    """The retained shares by answer loss of RUNS, from their evaluations, as the JSON object has them; None without.

    Raises UserError where a fused model does not have the loss that its evaluation says.
    """
    found: dict[str, float | None] = {}
    now = code_hash()
    for name, run in RUNS.items():
        recipe = run.load()
        found |= dict.fromkeys((f"{name}_mean", f"{name}_worst", f"{name}_hidden"))
        if result_path(recipe).is_file() and (recipe.fused / "config.json").is_file():
            result = read_json(result_path(recipe))
            domains = result["domains"]
            hidden = _check(recipe, domains)
            shares = [d["retained_share_by_loss"] for d in domains.values() if d["retained_share_by_loss"] is not None]
            if not shares:
                print(f"{name}: no own expert gains anything over the anchor")
                continue
            mean, worst = sum(shares) / len(shares), min(shares)
            files = [] if is_current(evaluate_step(recipe), recipe.folder) else ["recipe or files"]
            code = [] if result.get("code") == now else ["code"]
            since = f" ({' and '.join(files + code)} changed since)" if files + code else ""
            print(
                f"{name}{since}: of the own experts' gain in answer loss {mean:.3f} kept in the mean, "
                f"{worst:.3f} at worst; by mergekit's hidden gates {hidden:.3f} on '{_checked(recipe)}'"
            )
            found |= {f"{name}_mean": mean, f"{name}_worst": worst, f"{name}_hidden": hidden}
        else:
            print(f"{name}: not there; qwen-fusion {shlex.join(run.arguments())}")
        _side_by_side(recipe)
    return found


def _side_by_side(recipe: Recipe) -> None:
    """Prints what a run's shared parts and its healing were chosen and measured by."""
    shared, healing = shared_parts(recipe) / SHARED_NOTE, recipe.folder / "healing.json"
    if shared.is_file() and not recipe.shared.is_anchor:
        note = read_json(shared)
        means = ", ".join(f"{name} {sum(row.values()) / len(row):.3f}" for name, row in note["losses"].items())
        print(f"  shared parts, nats a token with every row at its own expert: {means}; taken: {note['method']}")
    if healing.is_file():
        shares = read_json(healing)["retained_share"]
        print(
            "  healing, share of the gain: " + ", ".join(f"{name} {shares[name]:.3f}" for name in ("merged", "healed"))
        )


def _checked(recipe: Recipe) -> str:
    """The domain whose losses are measured again: that of the last expert."""
    return recipe.experts[-1].domain


def _check(recipe: Recipe, domains: dict[str, Any]) -> float:
    """Measures the losses of anchor and fused model on one domain again, layer by layer.

    Returns what mergekit's `hidden` gates retain of the own expert's gain on the same rows.
    """
    name = _checked(recipe)
    rows = held_out_rows(recipe, [name])[name]
    batches, fused = encode_batches(load_tokenizer(recipe.fused), rows), Checkpoint(recipe.fused)
    by_gates = gated(checkpoint_gates(fused), fused.config["num_experts_per_tok"])
    by_hidden = gated(mergekit_gates(recipe, recipe.fused, [HIDDEN])[HIDDEN], fused.config["num_experts_per_tok"])
    sources: dict[str, tuple[Source, Route]] = {
        "anchor": (Reader(anchor_source(recipe)), forced(0)),
        "fused_trained": (fused, by_gates),
        "hidden": (fused, by_hidden),
    }
    losses = {"own_expert": domains[name]["own_expert"]["loss"]}
    for row, (source, route) in sources.items():
        found = losses[row] = answer_losses(source, batches, [name] * len(rows), route)[name]
        if row == "hidden":  # the evaluation may have it of fewer rows
            continue
        stored = domains[name][row]["loss"]
        if abs(found - stored) > 0.01 * stored + 1e-3:
            raise UserError(
                f"{result_path(recipe)} says {stored:.4f} nats for {row} on '{name}', its weights have {found:.4f}: "
                "run `qwen-fusion evaluate --force` on the recipe"
            )
    return (losses["anchor"] - losses["hidden"]) / (losses["anchor"] - losses["own_expert"])


def main(path: str = "configs/demo.yaml", part: str = "all", *overrides: str) -> None:
    """Prints all figures for the recipe at `path`, whose fused model must exist, or those of one part."""
    if part not in ("all", "ours", "peers", "runs"):
        raise UserError(f"the benchmark has no part '{part}': name all, peers or runs")
    if part == "runs":
        for run in RUNS.values():
            subprocess.run([sys.executable, "-m", "fusion.cli", *run.arguments()], check=True)
        return
    recipe = load_recipe(Path(path), list(overrides))
    if not (recipe.fused / "config.json").is_file():
        raise UserError(f"{recipe.fused} does not exist yet: run `qwen-fusion run {path}` first")
    if part == "ours":
        print(json.dumps(ours(recipe)))
        return
    if part == "peers":
        print(json.dumps(against_peers(path, *overrides)))
        return
    kept = quality()  # first, as stored figures may be refused
    shares = throughput(recipe)
    peers = against_peers(path, *overrides)
    large = _child("gate_training.full_size", "100000", "5")
    dense = _child("gate_training.full_size", "8192")["tokens_per_s"]
    print(
        f"at 7B shapes a dense layer's forward pass: {dense:.0f} tokens/s; gate training, {large['experts']} experts, "
        f"{large['tokens']:,} tokens: {large['tokens_per_s']:.0f} tokens/s, {large['share_of_matmul_rate']:.2f} "
        f"of the matmul rate, {large['peak_rss_gb']:.2f} GB resident at most"
    )
    result = {
        "throughput_vs_forward_top1": shares["cross-entropy, top-1"],
        "throughput_vs_forward_top2": shares["cross-entropy, top-2"],
        **peers,
        "throughput_vs_forward_top1_7b_shapes": large["tokens_per_s"] / dense,
        "peak_rss_gb_7b_shapes": large["peak_rss_gb"],
        "retained_demo_mean": kept["demo_mean"],
        "retained_demo_worst": kept["demo_worst"],
        "retained_real_mean": kept["real_mean"],
        "retained_real_worst": kept["real_worst"],
        "retained_real_hidden": kept["real_hidden"],
        **{f"retained_{name}": kept[f"{name}_mean"] for name in RUNS if name not in ("demo", "real")},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    run_main(main)
