"""The fused model against its experts: one engine, an engine for each behind a router, LoRA adapters on one anchor.

    make bench-traffic                                     # the demo family (after make demo)
    python -m serving.bench.traffic RECIPE --rates 0.5,1,2

All sides get the same memory for weights and KV cache together, the same requests (trace.py; answers of 8 to 128
tokens), the same arrivals (vLLM's load generator, open loop), the same router before them; the separate engines the
best of three core placements, for each figure its own. Then the fused model with one and two experts a token beside one
dense expert, asked directly, in the same engine. Every other round goes through them backwards, so that a machine that
gets slower favours nobody. What is measured is kept side by side: the same
command goes on where it was stopped (`--again` does not). The last line is one JSON object: geometric means over loads
and rounds.
"""

import argparse
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from fusion.checkpoint import file_hash, read_json, read_lines, weight_stamps, write_json
from fusion.encoding import load_tokenizer
from fusion.errors import UserError, run_main
from fusion.evaluation.adapters import LORA_RANK
from fusion.plan.budget import kv_bytes_per_token, planned_dtype
from fusion.progress import console
from fusion.provenance import made
from fusion.recipe import Recipe
from fusion.recipe_file import load_recipe
from fusion.resumable import claim, noted, release
from fusion.sources import anchor_source, expert_sources
from gate_training.labelling.combine import whole_experts
from serving.bench.traffic.load import Load, drive
from serving.bench.traffic.sides import PLACEMENTS, Side, alone, fused, lora, separate, served, total_memory
from serving.bench.traffic.trace import ORDERS, lengths, trace, write
from serving.engine import detect_hardware

AT_ONCE = (1, 8, 32)
LEAST_KV = 64 * 2**20
DECODED = 64  # tokens of an answer where tokens a second are measured
DECODED_LEAST = 16  # answers: the median one tells the speed, which a stall of one does not touch
ALL_AT_ONCE = "all at once"
Table = dict[str, dict[str, Any]]  # side -> name, weights, kv_tokens, loads: {"order, rate": figures}

Measurements = Mapping[str, Callable[[], dict[str, Any]]]


@dataclass(frozen=True)
class Round:
    """All that was measured once: the sides by name, and dense and fused models by name and requests at once."""

    table: Table
    decode: dict[str, dict[str, dict[str, float]]]


def main(*given: str) -> None:
    """Measures, prints the tables, and the JSON line."""
    parser = argparse.ArgumentParser(prog="python -m serving.bench.traffic", description=__doc__.split("\n")[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--requests", type=int, default=50, help="of each load")
    parser.add_argument("--rounds", type=int, default=2, help="how often every side is measured")
    parser.add_argument("--again", action="store_true", help="measure again what was measured already")
    parser.add_argument("--rates", default="4,8,16", help="arrivals a second")
    parser.add_argument(
        "--kv-mb",
        type=int,
        help="KV cache of each separate engine; default: for two full sequences, or what there is room for",
    )
    parser.add_argument("--placements", type=int, default=len(PLACEMENTS), help="how many of the core placements")
    parser.add_argument("--folder", type=Path, help="for logs; default: OUTPUT/traffic")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    arguments = parser.parse_args(given)
    recipe = load_recipe(arguments.recipe, arguments.set)
    if not (recipe.fused / "config.json").is_file():
        raise UserError(f"nothing is fused in {recipe.fused} yet: run `qwen-fusion run {arguments.recipe}` first")
    folder: Path = arguments.folder or recipe.folder / "traffic"
    rates = _rates(arguments.rates)
    counts = (arguments.placements, arguments.requests, arguments.rounds, arguments.kv_mb)
    if any(count is not None and count < 1 for count in counts):
        raise UserError("--placements, --requests, --rounds and --kv-mb are greater than 0")
    folder.mkdir(parents=True, exist_ok=True)
    kv_bytes = _kv_bytes(recipe) if arguments.kv_mb is None else arguments.kv_mb * 2**20
    requests = _requests(recipe, arguments.requests, folder)
    picked = _picked(recipe, requests, folder / "picked.json")
    memory = total_memory(recipe, kv_bytes)
    _check_room(recipe, memory)
    placements = PLACEMENTS[: arguments.placements] if not detect_hardware().gpus else PLACEMENTS[:1]
    sides: dict[str, Callable[[], AbstractContextManager[Side]]] = {
        "fused": lambda: fused(recipe, memory, folder, picked),
        "lora": lambda: lora(recipe, memory, folder, picked),
        **{f"separate-{n}": partial(separate, recipe, kv_bytes, folder, p, picked) for n, p in enumerate(placements)},
    }
    models = {"dense": anchor_source(recipe).folder, "top-1": recipe.fused, "top-2": recipe.fused}
    loads = {name: partial(_measured, side, recipe, requests, rates, folder) for name, side in sides.items()}
    decode = {name: partial(_decode, recipe, memory, folder, name, model) for name, model in models.items()}
    kept = folder / "measured"
    if arguments.again:
        release(kept)
    claim(kept, _key(recipe, requests, rates, memory, placements))
    print("| round | side | load | mean, p95 to the first token, ms | mean, p95 latency, ms | tokens/s |")
    print("| --- | --- | --- | --- | --- | --- |", flush=True)
    rounds = [_round(number, loads, decode, kept) for number in range(arguments.rounds)]
    by_round = [_ratios(one) for one in rounds]
    result = {name: round(_geometric([found[name] for found in by_round]), 3) for name in by_round[0]}
    tokens = {order: lengths(read_lines(path)) for order, path in requests.items()}
    told = {"requests": arguments.requests, "tokens": tokens, "rates": rates, "memory": memory, "made": made()}
    write_json(folder / "traffic.json", told | {"rounds": [asdict(one) for one in rounds], "ratios": result})
    _print_sizes(rounds)
    _print_lengths(tokens)
    _print_ratios(result, by_round)
    print(json.dumps(result))


def _key(recipe: Recipe, requests: dict[str, Path], rates: list[float], memory: int, placements: Sequence[str]) -> str:
    """Tells that what was measured is of other models, requests or settings, or on another machine."""
    paths = [recipe.fused, *(path for source in expert_sources(recipe) for path in source.paths)]
    texts = [path.read_text(encoding="utf-8") for path in requests.values()]
    told = [recipe.serving.model_dump(mode="json"), list(map(weight_stamps, paths)), texts, rates, memory, placements]
    told += [file_hash(path) for path in sorted(Path(__file__).parent.glob("*.py"))]
    told += [LORA_RANK, {key: value for key, value in made().items() if key not in ("date", "command")}]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def _round(number: int, loads: Measurements, decode: Measurements, kept: Path) -> Round:
    """Measures all of it once, every other round backwards; what is kept there already is taken as it is."""
    turn = 1 if number % 2 == 0 else -1
    table: Table = {}
    for name in list(loads)[::turn]:
        found = noted(kept / f"{number}-{name}.json", loads[name])
        table[found["name"]] = found
        _print_loads(number, found)
    speeds = {name: noted(kept / f"{number}-decode-{name}.json", decode[name]) for name in list(decode)[::turn]}
    return Round(table, speeds)


def _measured(
    way: Callable[[], AbstractContextManager[Side]],
    recipe: Recipe,
    requests: dict[str, Path],
    rates: list[float],
    folder: Path,
) -> dict[str, Any]:
    with way() as side:
        console.print(f"[bold]{side.name}[/bold]: {side.weights / 1e9:.2f} GB, {side.kv_tokens:,} KV tokens")
        loads = _loads(side, recipe, requests, rates, folder)
    return {"name": side.name, "weights": side.weights, "kv_tokens": side.kv_tokens, "loads": loads}


def _rates(text: str) -> list[float]:
    try:
        found = [float(rate) for rate in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(0 < rate < float("inf") for rate in found):
        raise UserError(f"--rates {text}: give arrivals a second with commas between, for example 0.5,1,2")
    return found


def _kv_bytes(recipe: Recipe) -> int:
    """An engine's KV cache: two sequences of max_model_len, or its share of what weights leave; at least LEAST_KV."""
    config = read_json(anchor_source(recipe).folder / "config.json")
    dtype = served(recipe, planned_dtype(config))
    wanted = 2 * recipe.serving.max_model_len * kv_bytes_per_token(config, 1, dtype)
    left = (_room(recipe) - total_memory(recipe, 0)) // len(recipe.experts)
    return max(LEAST_KV, min(wanted, left))


def _room(recipe: Recipe) -> int:
    """The bytes of this machine that engines may take: of the cards that the recipe takes, or of the memory."""
    cards = torch.cuda.device_count() if detect_hardware().gpus else 0
    sizes = [torch.cuda.get_device_properties(card).total_memory for card in range(cards)]
    on_cards = sum(sizes[: recipe.serving.tensor_parallel_size]) * recipe.serving.gpu_memory_utilization
    return int(on_cards) if cards else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _check_room(recipe: Recipe, memory: int) -> None:
    """Raises UserError where the machine has not the memory that every side takes."""
    room = _room(recipe)
    if memory > room:
        raise UserError(
            f"every side takes {memory / 1e9:.1f} GB for weights and KV cache, and there are {room / 1e9:.1f}: give "
            "less KV cache with --kv-mb, lower serving.max_model_len, or name fewer experts"
        )


def _requests(recipe: Recipe, count: int, folder: Path) -> dict[str, Path]:
    tokenizer = load_tokenizer(recipe.fused)
    return {order: write(folder / f"{order}.jsonl", trace(recipe, tokenizer, count, order)) for order in ORDERS}


def _picked(recipe: Recipe, requests: dict[str, Path], path: Path) -> Path:
    """The expert of each question, as rules or else the recipe's classifier pick it."""
    rows = [row for found in requests.values() for row in read_lines(found)]
    questions = list(dict.fromkeys(row["prompt"] for row in rows))
    names = [recipe.experts[index].name for index in whole_experts(recipe, questions)]
    write_json(path, dict(zip(questions, names, strict=True)))
    return path


def _loads(
    side: Side, recipe: Recipe, requests: dict[str, Path], rates: list[float], folder: Path
) -> dict[str, dict[str, float]]:
    """Every order at every rate, and all requests at once for what the side can do at most."""
    warm = Load(requests["evenly"], at_once=8)  # caches, first compilations
    loads: dict[str, Load] = {}
    for order, path in requests.items():
        loads |= {f"{order}, {rate:g} a second": Load(path, rate) for rate in rates}
        loads[f"{order}, {ALL_AT_ONCE}"] = Load(path, at_once=32)
    _, *found = drive(side.url, side.model, recipe.fused, [warm, *loads.values()], folder)
    return dict(zip(loads, found, strict=True))


def _decode(recipe: Recipe, memory: int, folder: Path, name: str, model: Path) -> dict[str, dict[str, float]]:
    """By requests at once: the figures of a dense expert, or of the fused model with one or two experts a token."""
    tokenizer = load_tokenizer(recipe.fused)
    rows = [row | {"output_tokens": DECODED} for row in trace(recipe, tokenizer, 2 * max(AT_ONCE), "evenly")]
    loads: dict[str, Load] = {}
    for at_once in AT_ONCE:
        path = write(folder / f"decode-{at_once}.jsonl", rows[: max(DECODED_LEAST, 2 * at_once)])
        loads[str(at_once)] = Load(path, at_once=at_once)
    with _with_top(model, name) as place, alone(recipe, memory, folder, place) as side:
        twice = [load for load in loads.values() for _ in range(2)]  # the first time warms up
        found = drive(side.url, side.model, recipe.fused, twice, folder)
    return dict(zip(loads, found[1::2], strict=True))


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


def _geometric(values: Iterable[float]) -> float:
    return math.exp(mean(map(math.log, values)))


def _ratios(measured: Round) -> dict[str, float]:
    """Fused to others: geometric means over loads; of the separate engines the placement that does best by a figure."""
    table = measured.table
    ours, adapters = table["fused"], table["anchor with LoRA adapters"]
    placed = [side for name, side in table.items() if name.startswith("separate")]

    def ratio(theirs: dict[str, Any], key: str, at_once: bool = False) -> float:
        names = [name for name in ours["loads"] if name.endswith(ALL_AT_ONCE) == at_once]
        return _geometric(ours["loads"][name][key] / theirs["loads"][name][key] for name in names)

    def speed(name: str) -> float:
        """Of one answer alone, once it has begun: the median answer's."""
        return 1 / measured.decode[name]["1"]["median_tpot_ms"]

    return {
        "mean_latency_vs_separate": max(ratio(side, "mean_e2el_ms") for side in placed),
        "p95_latency_vs_separate": max(ratio(side, "p95_e2el_ms") for side in placed),
        "throughput_vs_separate": min(ratio(side, "output_throughput", at_once=True) for side in placed),
        "memory_vs_separate": ours["weights"] / placed[0]["weights"],
        "mean_latency_vs_lora": ratio(adapters, "mean_e2el_ms"),
        "decode_top1_vs_dense": speed("top-1") / speed("dense"),
        "decode_top2_vs_dense": speed("top-2") / speed("dense"),
    }


def _print_loads(number: int, side: dict[str, Any]) -> None:
    """The table's lines of one side, as soon as it is measured."""
    for load, row in side["loads"].items():
        first = f"{row['mean_ttft_ms']:.0f}, {row['p95_ttft_ms']:.0f}"
        whole = f"{row['mean_e2el_ms']:.0f}, {row['p95_e2el_ms']:.0f}"
        cells = (str(number + 1), side["name"], load, first, whole, f"{row['output_throughput']:.1f}")
        print(f"| {' | '.join(cells)} |", flush=True)


def _print_sizes(rounds: Sequence[Round]) -> None:
    """What every side holds; tokens a second of dense and fused, the mean of all rounds."""
    print("\n| side | weights, GB | KV tokens |")
    print("| --- | --- | --- |")
    for name, side in rounds[0].table.items():
        print(f"| {name} | {side['weights'] / 1e9:.2f} | {side['kv_tokens']:,} |")
    print(
        "\n| requests at once: tokens/s, ms from token to token (median answer) | "
        + " | ".join(map(str, AT_ONCE))
        + " |"
    )
    print("| --- " * (len(AT_ONCE) + 1) + "|")
    for name in rounds[0].decode:
        cells = []
        for at_once in map(str, AT_ONCE):
            found = [one.decode[name][at_once] for one in rounds]
            speed, pause = (mean(row[key] for row in found) for key in ("output_throughput", "median_tpot_ms"))
            cells.append(f"{speed:.1f}, {pause:.1f}")
        print(f"| {name} | " + " | ".join(cells) + " |")


def _print_lengths(tokens: dict[str, dict[str, dict[str, float]]]) -> None:
    print("\n| tokens of a request: least, mean, most | prompt | answer |")
    print("| --- | --- | --- |")
    for order, found in tokens.items():
        cells = [", ".join(f"{value:g}" for value in row.values()) for row in found.values()]
        print(f"| {order} | {' | '.join(cells)} |")


def _print_ratios(result: dict[str, float], by_round: Sequence[dict[str, float]]) -> None:
    print("\n| ratio | all rounds | each |")
    print("| --- | --- | --- |")
    for name, value in result.items():
        print(f"| {name} | {value:.3f} | {', '.join(f'{found[name]:.3f}' for found in by_round)} |")
    print(flush=True)


if __name__ == "__main__":
    run_main(main)
