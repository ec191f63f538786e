"""The fused model against its experts: one engine, an engine for each behind a router, LoRA adapters on one anchor.

    make bench-traffic                                     # the demo family (after make demo)
    python -m serving.bench.traffic RECIPE --rates 0.5,1,2

All sides get the same memory for weights and KV cache together, the same requests (trace.py), the same arrivals (vLLM's
load generator, open loop); the separate engines the best of three core placements. Then the fused model's tokens a
second with one and two experts a token beside one dense expert in the same engine. The last line is one JSON object.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from fusion.checkpoint import read_json, write_json
from fusion.encoding import load_tokenizer
from fusion.errors import UserError, run_main
from fusion.plan.budget import kv_bytes_per_token
from fusion.progress import console
from fusion.recipe import Recipe
from fusion.recipe_file import load_recipe
from fusion.sources import anchor_source
from serving.bench.traffic.load import drive
from serving.bench.traffic.sides import PLACEMENTS, Side, fused, lora, separate, total_memory
from serving.bench.traffic.trace import ORDERS, trace, write
from serving.engine import detect_hardware

AT_ONCE = (1, 8, 32)
LEAST_KV = 64 * 2**20
DECODED = 64  # tokens of an answer where tokens a second are measured
Table = dict[str, dict[str, dict[str, float]]]  # side -> "order, rate" -> figures


def main(*given: str) -> None:
    """Measures, prints the tables, and the JSON line."""
    parser = argparse.ArgumentParser(prog="python -m serving.bench.traffic", description=__doc__.split("\n")[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--requests", type=int, default=100, help="of each load")
    parser.add_argument("--rates", default="1,2,4", help="arrivals a second")
    parser.add_argument("--kv-mb", type=int, help="KV cache of each separate engine; default: for two full sequences")
    parser.add_argument("--placements", type=int, default=len(PLACEMENTS), help="how many of the core placements")
    parser.add_argument("--folder", type=Path, help="for logs; default: OUTPUT/traffic")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    arguments = parser.parse_args(given)
    recipe = load_recipe(arguments.recipe, arguments.set)
    if not (recipe.fused / "config.json").is_file():
        raise UserError(f"nothing is fused in {recipe.fused} yet: run `qwen-fusion run {arguments.recipe}` first")
    folder: Path = arguments.folder or recipe.folder / "traffic"
    folder.mkdir(parents=True, exist_ok=True)
    rates = _rates(arguments.rates)
    if arguments.placements < 1 or arguments.requests < 1:
        raise UserError("--placements and --requests are greater than 0")
    kv_bytes = arguments.kv_mb * 2**20 if arguments.kv_mb else _two_sequences(recipe)
    requests = _requests(recipe, arguments.requests, folder)
    memory = total_memory(recipe, kv_bytes)
    table: Table = {}
    sides: dict[str, Side] = {}
    placements = PLACEMENTS[: arguments.placements] if not detect_hardware().gpus else PLACEMENTS[:1]
    ways: list[AbstractContextManager[Side]] = [
        fused(recipe, memory, folder),
        lora(recipe, memory, folder),
        *(separate(recipe, kv_bytes, folder, placement) for placement in placements),
    ]
    print("| side | load | mean, p95 to the first token, ms | mean, p95 latency, ms | tokens/s |")
    print("| --- | --- | --- | --- | --- |", flush=True)
    for way in ways:
        with way as side:
            console.print(f"[bold]{side.name}[/bold]: {side.weights / 1e9:.2f} GB, {side.kv_tokens:,} KV tokens")
            sides[side.name] = side
            table[side.name] = _loads(side, recipe, requests, rates, folder)
        _print_loads(side.name, table[side.name])
    decode = _decode(recipe, memory, folder)
    best = min((n for n in table if n.startswith("separate")), key=lambda n: _mean(table[n], "mean_e2el_ms"))
    result = _ratios(table, sides, best, decode)
    write_json(folder / "traffic.json", {"table": table, "decode": decode, "best_placement": best, "ratios": result})
    _print_sizes(sides, decode, best)
    print(json.dumps(result))


def _rates(text: str) -> list[float]:
    try:
        found = [float(rate) for rate in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(0 < rate < float("inf") for rate in found):
        raise UserError(f"--rates {text}: give arrivals a second with commas between, for example 0.5,1,2")
    return found


def _two_sequences(recipe: Recipe) -> int:
    """Bytes of KV cache for two sequences of max_model_len, at least LEAST_KV."""
    config = read_json(anchor_source(recipe).folder / "config.json")
    return max(LEAST_KV, 2 * recipe.serving.max_model_len * kv_bytes_per_token(config, 1, "float32"))


def _requests(recipe: Recipe, count: int, folder: Path) -> dict[str, Path]:
    tokenizer = load_tokenizer(recipe.fused)
    return {order: write(folder / f"{order}.jsonl", trace(recipe, tokenizer, count, order)) for order in ORDERS}


def _loads(
    side: Side, recipe: Recipe, requests: dict[str, Path], rates: list[float], folder: Path
) -> dict[str, dict[str, float]]:
    """Every order at every rate, and all requests at once for what the side can do at most."""
    drive(side.url, side.model, recipe.fused, requests["evenly"], folder, at_once=8)  # warm: caches, first compilations
    found = {}
    for order, path in requests.items():
        for rate in rates:
            found[f"{order}, {rate:g} a second"] = drive(side.url, side.model, recipe.fused, path, folder, rate=rate)
        found[f"{order}, all at once"] = drive(side.url, side.model, recipe.fused, path, folder, at_once=32)
    return found


def _decode(recipe: Recipe, memory: int, folder: Path) -> dict[str, dict[str, float]]:
    """Tokens a second of a dense expert, and of the fused model with one and with two experts a token."""
    tokenizer = load_tokenizer(recipe.fused)
    rows = [row | {"output_tokens": DECODED} for row in trace(recipe, tokenizer, 2 * max(AT_ONCE), "evenly")]
    found: dict[str, dict[str, float]] = {}
    models = {"dense": anchor_source(recipe).folder, "top-1": recipe.fused, "top-2": recipe.fused}
    for name, model in models.items():
        with _with_top(model, name) as place, fused(recipe, memory, folder, place) as side:
            found[name] = {}
            for at_once in AT_ONCE:
                path = write(folder / "decode.jsonl", rows[: max(8, 2 * at_once)])
                drive(side.url, side.model, recipe.fused, path, folder, at_once=at_once)
                figures = drive(side.url, side.model, recipe.fused, path, folder, at_once=at_once)
                found[name][str(at_once)] = figures["output_throughput"]
    return found


@contextmanager
def _with_top(model: Path, name: str) -> Iterator[Path]:
    """The model's folder; for another number of experts a token one of links with another config."""
    config = read_json(model / "config.json")
    wanted = int(name.rpartition("-")[2]) if name.startswith("top-") else None
    if wanted is None or config["num_experts_per_tok"] == wanted:
        yield model
        return
    with tempfile.TemporaryDirectory() as aside:
        for path in model.iterdir():
            if path.is_file() and path.name != "config.json":
                (Path(aside) / path.name).symlink_to(path.resolve())
        write_json(Path(aside) / "config.json", config | {"num_experts_per_tok": wanted})
        yield Path(aside)


def _mean(rows: dict[str, dict[str, float]], key: str) -> float:
    """The mean over all open loads."""
    values = [row[key] for name, row in rows.items() if not name.endswith("all at once")]
    return sum(values) / len(values)


def _ratios(table: Table, sides: dict[str, Side], best: str, decode: dict[str, dict[str, float]]) -> dict[str, Any]:
    ours, theirs, adapters = table["fused"], table[best], table["anchor with LoRA adapters"]

    def throughput(rows: dict[str, dict[str, float]]) -> float:
        values = [row["output_throughput"] for name, row in rows.items() if name.endswith("all at once")]
        return sum(values) / len(values)

    result = {
        "mean_latency_vs_separate": _mean(ours, "mean_e2el_ms") / _mean(theirs, "mean_e2el_ms"),
        "p95_latency_vs_separate": _mean(ours, "p95_e2el_ms") / _mean(theirs, "p95_e2el_ms"),
        "throughput_vs_separate": throughput(ours) / throughput(theirs),
        "memory_vs_separate": sides["fused"].weights / sides[best].weights,
        "mean_latency_vs_lora": _mean(ours, "mean_e2el_ms") / _mean(adapters, "mean_e2el_ms"),
        "decode_top1_vs_dense": decode["top-1"]["1"] / decode["dense"]["1"],
        "decode_top2_vs_dense": decode["top-2"]["1"] / decode["dense"]["1"],
    }
    return {name: round(value, 3) for name, value in result.items()}


def _print_loads(name: str, rows: dict[str, dict[str, float]]) -> None:
    """The table's lines of one side, as soon as it is measured."""
    for load, row in rows.items():
        first = f"{row['mean_ttft_ms']:.0f}, {row['p95_ttft_ms']:.0f}"
        whole = f"{row['mean_e2el_ms']:.0f}, {row['p95_e2el_ms']:.0f}"
        print(f"| {name} | {load} | {first} | {whole} | {row['output_throughput']:.1f} |", flush=True)


def _print_sizes(sides: dict[str, Side], decode: dict[str, dict[str, float]], best: str) -> None:
    print("\n| side | weights, GB | KV tokens |")
    print("| --- | --- | --- |")
    for name, side in sides.items():
        marked = f"{name}, the best placement" if name == best else name
        print(f"| {marked} | {side.weights / 1e9:.2f} | {side.kv_tokens:,} |")
    print("\n| tokens/s at so many requests | " + " | ".join(map(str, AT_ONCE)) + " |")
    print("| --- " * (len(AT_ONCE) + 1) + "|")
    for name, speeds in decode.items():
        print(f"| {name} | " + " | ".join(f"{speed:.1f}" for speed in speeds.values()) + " |")
    print(flush=True)


if __name__ == "__main__":
    run_main(main)
