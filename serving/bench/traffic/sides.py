"""The sides of the comparison, each running within a `with` block: how to ask it, and what memory it takes.

with fused(recipe, memory, folder) as side:
    print(side.url, side.kv_tokens)
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from fusion.checkpoint import read_json
from fusion.errors import UserError
from fusion.plan.budget import kv_bytes_per_token
from fusion.recipe import Recipe
from fusion.sources import ModelSource, anchor_source, expert_sources
from serving.bench.processes import becomes_healthy, pinned
from serving.engine import Engine, EngineSettings, Hardware, detect_hardware, free_port

PLACEMENTS = ("all cores each", "one core each", "one core each, heaviest alone")
LORA_RANK = 32


@dataclass(frozen=True)
class Side:
    """A way to serve: its address, the model name to ask for, bytes of weights, tokens of KV cache."""

    name: str
    url: str
    model: str
    weights: int
    kv_tokens: int


def weight_bytes(folder: Path) -> int:
    """The size of a model's or an adapter's weights."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def total_memory(recipe: Recipe, kv_bytes: int) -> int:
    """The bytes that every side may take: those of all experts as whole models, each with `kv_bytes` of KV cache."""
    return sum(weight_bytes(source.folder) + kv_bytes for source in expert_sources(recipe))


def _settings(recipe: Recipe, model: Path, name: str, kv_bytes: int, **more: object) -> EngineSettings:
    serving = recipe.serving
    return EngineSettings(
        model=str(model),
        served_name=name,
        dtype=serving.dtype,
        tensor_parallel_size=serving.tensor_parallel_size,
        gpu_memory_utilization=serving.gpu_memory_utilization,
        max_model_len=serving.max_model_len,
        cpu_kv_cache_bytes=kv_bytes,
        **more,  # type: ignore[arg-type]
    )


def _kv_tokens(model: Path, kv_bytes: int) -> int:
    return kv_bytes // kv_bytes_per_token(read_json(model / "config.json"), 1, "bfloat16")


@contextmanager
def fused(recipe: Recipe, memory: int, folder: Path, model: Path | None = None) -> Iterator[Side]:
    """The fused checkpoint (or one that is laid out as it) in one engine, what its weights leave as KV cache."""
    place = model or recipe.fused
    weights = weight_bytes(place)
    with Engine(_settings(recipe, place, "fused", memory - weights), folder / "vllm-fused.log") as engine:
        yield Side("fused", engine.url, "fused", weights, _kv_tokens(place, memory - weights))


@contextmanager
def separate(recipe: Recipe, path: Path, kv_bytes: int, folder: Path, placement: str) -> Iterator[Side]:
    """An engine for every expert behind a router, the cores shared out as `placement` says."""
    sources, cores = expert_sources(recipe), detect_hardware()
    with ExitStack() as stack:
        targets, weights, tokens = {}, 0, 0
        for number, (expert, source) in enumerate(zip(recipe.experts, sources, strict=True)):
            hardware = _placed(cores, placement, number)
            settings = _settings(recipe, source.folder, expert.name, kv_bytes)
            engine = stack.enter_context(Engine(settings, folder / f"vllm-{expert.name}.log", hardware))
            targets[expert.name] = (engine.url, expert.name)
            weights += weight_bytes(source.folder)
            tokens += _kv_tokens(source.folder, kv_bytes)
        url = stack.enter_context(router(path, recipe, targets))
        yield Side(f"separate, {placement}", url, "any", weights, tokens)


def _placed(hardware: Hardware, placement: str, number: int) -> Hardware:
    """The cores of engine `number`: GPUs are what they are."""
    cores = hardware.cores
    if hardware.gpus or placement == PLACEMENTS[0] or len(cores) == 1:
        return hardware
    if placement == PLACEMENTS[1]:
        return Hardware(0, (cores[number % len(cores)],), hardware.bfloat16)
    alone = cores[:1] if number == 0 else cores[1:]
    return Hardware(0, (alone[(number - 1) % len(alone)],) if number else alone, hardware.bfloat16)


@contextmanager
def lora(recipe: Recipe, path: Path, memory: int, folder: Path) -> Iterator[Side]:
    """The anchor with an adapter for every expert that has moved, the adapter picked per request by the router."""
    anchor = anchor_source(recipe)
    adapters = extracted(recipe, folder / "adapters")
    weights = weight_bytes(anchor.folder) + sum(weight_bytes(adapter) for adapter in adapters.values())
    more = {"lora_modules": tuple((n, str(a)) for n, a in adapters.items()), "max_lora_rank": LORA_RANK}
    with ExitStack() as stack:
        settings = _settings(recipe, anchor.folder, "anchor", memory - weights, **more)
        engine = stack.enter_context(Engine(settings, folder / "vllm-lora.log"))
        names = {e.name: (engine.url, e.name if e.name in adapters else "anchor") for e in recipe.experts}
        url = stack.enter_context(router(path, recipe, names))
        yield Side("anchor with LoRA adapters", url, "any", weights, _kv_tokens(anchor.folder, memory - weights))


def extracted(recipe: Recipe, folder: Path) -> dict[str, Path]:
    """Adapters of the experts' MLPs by mergekit-extract-lora, of rank LORA_RANK, for all that are not the anchor."""
    anchor, found = anchor_source(recipe), {}
    for expert, source in zip(recipe.experts, expert_sources(recipe), strict=True):
        if source.paths == anchor.paths:
            continue
        out = folder / expert.name
        if not (out / "adapter_config.json").is_file():
            _extract(source, anchor, out)
        found[expert.name] = out
    return found


def _extract(source: ModelSource, anchor: ModelSource, out: Path) -> None:
    program = str(Path(sys.executable).with_name("mergekit-extract-lora"))
    command = [program, "--model", str(source.folder), "--base-model", str(anchor.folder), "--out-path", str(out)]
    command += ["--max-rank", str(LORA_RANK), "-i", r"mlp\.(gate|up|down)_proj", "-e", "embed|lm_head|norm|self_attn"]
    done = subprocess.run([*command, "--quiet"], capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"no adapter can be extracted from {source.folder}: {done.stderr.strip().splitlines()[-1]}")


@contextmanager
def router(path: Path, recipe: Recipe, targets: dict[str, tuple[str, str]]) -> Iterator[str]:
    """The router process; its address."""
    port = free_port()
    arguments = [str(path), str(port), json.dumps(targets), f"output={recipe.output}"]
    if recipe.data_folder:
        arguments.append(f"data_folder={recipe.data_folder}")
    command = [sys.executable, "-m", "serving.bench.traffic.router", *arguments]
    with pinned(command, None) as process:
        url = f"http://127.0.0.1:{port}"
        if not becomes_healthy(process, url, "/health"):
            raise UserError(f"the router did not start: try {' '.join(command)}")
        yield url
