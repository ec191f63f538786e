"""The sides of the comparison, each running within a `with` block: how to ask it, and what memory it takes.

with fused(recipe, memory, folder) as side:
    print(side.url, side.kv_tokens)
"""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fusion.checkpoint import read_json
from fusion.errors import UserError
from fusion.evaluation.adapters import LORA_RANK, extracted
from fusion.plan.alternatives import adapter_rank, dense_config, lora_slot_bytes
from fusion.plan.budget import DTYPE_BYTES, planned_dtype
from fusion.plan.capacity import served_dtype
from fusion.recipe import Recipe
from fusion.recipe_file import as_file
from fusion.sources import anchor_source, expert_sources, whole_model
from serving import supervisor
from serving.bench.processes import becomes_healthy
from serving.engine import Engine, EngineSettings, Hardware, detect_hardware, free_port

ROUTER_GRACE_S = 2
PLACEMENTS = ("all cores each", "one core each", "one core each, the first alone")


@dataclass(frozen=True)
class Side:
    """A way to serve: its address, the model name to ask for, bytes of weights, tokens of KV cache."""

    name: str
    url: str
    model: str
    weights: int
    kv_tokens: int


def weight_bytes(recipe: Recipe, folder: Path) -> int:
    """The size of a model's weights in the dtype in which vLLM will hold them."""
    stored = planned_dtype(read_json(folder / "config.json"))
    stays = DTYPE_BYTES[served(recipe, stored)] / DTYPE_BYTES[stored]
    return round(stays * sum(path.stat().st_size for path in folder.glob("*.safetensors")))


def served(recipe: Recipe, stored: str) -> str:
    """The dtype in which vLLM holds a checkpoint whose config says `stored`, and its KV cache."""
    return served_dtype(recipe.serving, stored, detect_hardware().bfloat16)


def total_memory(recipe: Recipe, kv_bytes: int) -> int:
    """The bytes that every side may take: those of all experts as whole models, each with `kv_bytes` of KV cache."""
    return sum(weight_bytes(recipe, source.folder) + kv_bytes for source in expert_sources(recipe))


def _settings(
    recipe: Recipe, model: Path, name: str, kv_bytes: int, engines: int = 1, **more: object
) -> EngineSettings:
    """One of `engines` on the same cards, with `kv_bytes` of KV cache over all of them."""
    serving = recipe.serving
    return EngineSettings(
        model=str(model),
        served_name=name,
        dtype=serving.dtype,
        tensor_parallel_size=serving.tensor_parallel_size,
        gpu_memory_utilization=serving.gpu_memory_utilization / engines,
        max_model_len=serving.max_model_len,
        yarn_factor=serving.yarn_factor,
        kv_cache_bytes=kv_bytes // serving.tensor_parallel_size,
        prefix_caching=False,  # every load sends the same prompts
        **more,  # type: ignore[arg-type]
    )


def _kv_tokens(engine: Engine) -> int:
    """The tokens of KV cache that an engine says it has; 0 where it does not say."""
    match = re.search(r"KV cache size: ([\d,]+) tokens", engine.log.read_text(errors="replace"))
    return int(match[1].replace(",", "")) if match else 0


@contextmanager
def alone(recipe: Recipe, memory: int, folder: Path, model: Path) -> Iterator[Side]:
    """One model in one engine, asked directly, what its weights leave as KV cache."""
    weights = weight_bytes(recipe, model)
    with Engine(_settings(recipe, model, "fused", memory - weights), folder / "vllm-fused.log") as engine:
        yield Side("fused", engine.url, "fused", weights, _kv_tokens(engine))


@contextmanager
def fused(recipe: Recipe, memory: int, folder: Path, picked: Path | None = None) -> Iterator[Side]:
    """The fused checkpoint in one engine, behind the router as the other sides are: what differs is what serves."""
    with alone(recipe, memory, folder, recipe.fused) as side:
        targets = {expert.name: (side.url, side.model) for expert in recipe.experts}
        with router(recipe, targets, picked) as url:
            yield replace(side, url=url, model="any")


@contextmanager
def separate(recipe: Recipe, kv_bytes: int, folder: Path, placement: str, picked: Path | None = None) -> Iterator[Side]:
    """An engine for every expert behind a router, the cores shared out as `placement` says; `picked` is for that."""
    sources, cores = expert_sources(recipe), detect_hardware()
    with ExitStack() as stack:
        targets, weights, tokens = {}, 0, 0
        for number, (expert, source) in enumerate(zip(recipe.experts, sources, strict=True)):
            hardware = _placed(cores, placement, number)
            model = stack.enter_context(whole_model(source))
            settings = _settings(recipe, model, expert.name, kv_bytes, len(sources))
            engine = stack.enter_context(Engine(settings, folder / f"vllm-{expert.name}.log", hardware))
            targets[expert.name] = (engine.url, expert.name)
            weights += weight_bytes(recipe, source.folder)
            tokens += _kv_tokens(engine)
        url = stack.enter_context(router(recipe, targets, picked))
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
def lora(recipe: Recipe, memory: int, folder: Path, picked: Path | None = None) -> Iterator[Side]:
    """The anchor with an adapter for every expert that has moved, the adapter picked per request by the router."""
    anchor = anchor_source(recipe)
    adapters = extracted(recipe, folder / "adapters")
    rank = max(LORA_RANK, adapter_rank(recipe))
    config = dense_config(read_json(anchor.folder / "config.json"))
    weights = weight_bytes(recipe, anchor.folder)  # vLLM keeps a slot of that rank for every adapter
    weights += len(adapters) * lora_slot_bytes(config, 1, rank, DTYPE_BYTES[served(recipe, config["dtype"])])
    more: dict[str, Any] = {"lora_modules": tuple((n, str(a)) for n, a in adapters.items()), "max_lora_rank": rank}
    with ExitStack() as stack:
        settings = _settings(recipe, anchor.folder, "anchor", memory - weights, **more)
        engine = stack.enter_context(Engine(settings, folder / "vllm-lora.log"))
        names = {e.name: (engine.url, e.name if e.name in adapters else "anchor") for e in recipe.experts}
        url = stack.enter_context(router(recipe, names, picked))
        yield Side("anchor with LoRA adapters", url, "any", weights, _kv_tokens(engine))


@contextmanager
def router(recipe: Recipe, targets: dict[str, tuple[str, str]], picked: Path | None = None) -> Iterator[str]:
    """The router process, which ends with this one however that ends; its address."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with as_file(recipe) as path:
        command = [sys.executable, "-m", "serving.bench.traffic.router", str(path), str(port), json.dumps(targets)]
        command += [str(picked)] if picked else []
        silent = subprocess.DEVNULL
        process = supervisor.start(command, ROUTER_GRACE_S, stdout=silent, stderr=silent)
        try:
            if not becomes_healthy(process, url, "/health"):
                raise UserError(f"the router did not start: try {' '.join(command)}")
            yield url
        finally:
            process.communicate(timeout=60)  # its standard input ends, and it does
