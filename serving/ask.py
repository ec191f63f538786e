"""Asks a recipe's server, starting one where none runs, and names the experts that served each answer.

qwen-fusion ask configs/demo.yaml "17+25="
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from fusion.architecture import MANIFEST
from fusion.errors import UserError
from fusion.progress import console
from fusion.recipe import Recipe
from fusion.sections.serving import Question
from serving.client import Answer, chat
from serving.engine import EngineSettings
from serving.guard.keys import OPERATOR_VARIABLE, read_keys
from serving.guard.settings import GuardSettings
from serving.records.settings import recording
from serving.serve import RunningServer, find_state, manifest_shards, running_server, serve

STATE = "server.json"


def engine_settings(recipe: Recipe) -> EngineSettings:
    """The recipe's serving section as vLLM's settings. Raises UserError where nothing has been merged yet."""
    folder, serving = ready_folder(recipe), recipe.serving
    if _gates_are_random(folder):
        note = f"the gates in {folder} are random ones, and so are its answers: `qwen-fusion train-gates` comes first"
        console.print(f"[yellow]{note}[/yellow]", highlight=False, soft_wrap=True)
    return EngineSettings(
        model=str(folder),
        served_name=recipe.name,
        dtype=serving.dtype,
        tensor_parallel_size=serving.tensor_parallel_size,
        pipeline_parallel_size=serving.pipeline_parallel_size,
        data_parallel_size=serving.data_parallel_size,
        distributed_executor_backend=serving.distributed_executor_backend,
        enable_expert_parallel=serving.enable_expert_parallel,
        quantization=serving.quantization,
        gpu_memory_utilization=serving.gpu_memory_utilization,
        max_model_len=serving.max_model_len,
        yarn_factor=serving.yarn_factor,
        live_gates=serving.live_gates,
        cpu_kv_cache_bytes=serving.cpu_kv_cache_bytes,
        temperature=serving.sampling.temperature,
        top_p=serving.sampling.top_p,
        routed_experts=serving.guard.records is not None and serving.guard.records.engine_routes,
    )


def served_folder(recipe: Recipe) -> Path:
    """The folder of the checkpoint that is served."""
    return Path(recipe.serving.checkpoint).expanduser() if recipe.serving.checkpoint else recipe.fused


def ready_folder(recipe: Recipe) -> Path:
    """The folder of the checkpoint that is served. Raises UserError where there is none yet."""
    folder = served_folder(recipe)
    if not (folder / "config.json").is_file():
        first = "quantize" if recipe.serving.checkpoint else "run"
        raise UserError(f"{folder} does not exist yet: run `qwen-fusion {first}` first")
    return folder


def _gates_are_random(folder: Path) -> bool:
    """Whether the manifest says that no gates have been trained; read here alone, so that serving loads no torch."""
    try:
        method = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["gates"]["method"]
    except (OSError, ValueError, KeyError):
        return False
    return bool(method == "random")


def guard_settings(recipe: Recipe) -> GuardSettings:
    """The guard's part of the serving section; `serve` fills in the engine's address."""
    serving, records = recipe.serving, recipe.serving.guard.records
    return GuardSettings(
        upstream="",
        guard=serving.guard,
        sampling=serving.sampling,
        max_model_len=serving.max_model_len,
        api_keys=read_keys(serving.guard.api_keys_file),
        operator_keys=read_keys(serving.guard.operator_keys_file, OPERATOR_VARIABLE),
        recording=recording(recipe, served_folder(recipe)) if records else None,
    )


def serve_recipe(recipe: Recipe) -> None:
    """Serves the recipe's fused model on its host and port until Ctrl-C."""
    from serving.records.observer import observing

    engine, guard = engine_settings(recipe), guard_settings(recipe)
    with observing(recipe, recipe.folder / "logs" / "observer.log"):
        serve(engine, guard, recipe.serving.host, recipe.serving.port, log=_log(recipe), state=recipe.folder / STATE)


@contextmanager
def recipe_server(recipe: Recipe, reuse: bool = True) -> Iterator[RunningServer]:
    """The recipe's running server, or (always without `reuse`) one on a free port for the length of the block."""
    found = find_state(recipe.folder / STATE, recipe.name) if reuse else None
    if found:
        folder = served_folder(recipe)
        if found.shards != manifest_shards(folder):
            note = f"{folder} has changed since the server at {found.url} started: restart it to serve the change"
            console.print(f"[yellow]{note}[/yellow]", highlight=False, soft_wrap=True)
        yield RunningServer(found.url, found.model)
        return
    settings = engine_settings(recipe)
    with running_server(settings, guard_settings(recipe), log=_log(recipe)) as server:
        yield server


def ask_all(recipe: Recipe, questions: Sequence[Question], reuse: bool = True) -> list[dict[str, Any]]:
    """The answers to `questions`, each with the experts that served it, as plain data.

    With `reuse`, a running server of the recipe is asked where there is one.
    """
    if not questions:
        return []
    with _asking(recipe, reuse) as ask:
        answers = [_ask(ask, question) for question in questions]
    from fusion.served import expert_shares

    for answer, shares in zip(answers, expert_shares(recipe, answers), strict=True):
        answer["experts"] = shares
    return answers


def ask_messages(recipe: Recipe, messages: Sequence[dict[str, str]]) -> Answer:
    """The answer of the recipe's server, running or started for it, to a conversation."""
    with _asking(recipe) as ask:
        return ask(messages)


@contextmanager
def _asking(recipe: Recipe, reuse: bool = True) -> Iterator[Callable[..., Answer]]:
    """`chat` with the recipe's server: takes messages and request fields."""
    with recipe_server(recipe, reuse) as server:
        try:
            keys = read_keys(recipe.serving.guard.api_keys_file)
            yield partial(chat, server.url, server.model, api_key=keys[0] if keys else None)
        except UserError:
            if server.engine is not None:
                server.engine.check()  # an engine that has died says more than its guard
            raise


def _ask(ask: Callable[..., Answer], question: Question) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if question.json_schema is not None:
        options["response_format"] = {
            "type": "json_schema",
            "json_schema": {"name": "answer", "schema": question.json_schema},
        }
    for key in ("max_tokens", "temperature"):
        if getattr(question, key) is not None:
            options[key] = getattr(question, key)
    answer = ask([{"role": "user", "content": question.question}], **options)
    return {
        "question": question.question,
        "domain": question.domain,
        "json_schema": question.json_schema,
        "answer": answer.text,
        "finish_reason": answer.finish_reason,
        "attempts": answer.attempts,
        "completion_tokens": answer.usage.get("completion_tokens"),
        "seconds": round(answer.seconds, 2),
    }


def _log(recipe: Recipe) -> Path:
    return recipe.folder / "logs" / "vllm.log"
