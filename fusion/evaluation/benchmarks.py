"""Benchmark: tasks of lm-evaluation-harness on the fused model, the own expert of each task's domain, and the anchor.

    qwen-fusion benchmark configs/demo.yaml --limit 50
    qwen-fusion benchmark configs/qwen2.5-0.5b-five-experts.yaml --tasks gsm8k,bfcl --url http://127.0.0.1:8000

Models are served by vLLM one after the other (`backend: transformers` does without), or the fused one alone is asked
through a server that runs. Every answer is kept as it comes: the same command goes on where it was stopped.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fusion.checkpoint import weight_stamps, write_json, write_text
from fusion.contamination import check, trained_texts
from fusion.errors import UserError
from fusion.evaluation.benchmark_table import draw, markdown
from fusion.evaluation.harness import SUBSET_SEED, Measured, TaskFile, run_tasks, task_files
from fusion.evaluation.harness_models import InTransformers, Models, Served
from fusion.evaluation.intervals import Interval, difference, mean_interval, retained_share
from fusion.hardware import compute_dtype
from fusion.progress import console
from fusion.recipe import Benchmarking, Recipe
from fusion.sources import ModelSource, anchor_source, own_source, whole_model
from gate_training.labelling.rules import label_by_rules

FUSED, ANCHOR = "fused", "anchor"
PACKAGES = ("qwen-fusion", "lm-eval", "torch", "transformers", "mergekit")
Scores = dict[str, dict[str, Measured]]  # model -> task -> what was measured


def benchmark(recipe: Recipe, url: str | None = None) -> dict[str, Any]:
    """Runs the recipe's `benchmark` section and returns the tables as plain data; sample logs lie beside them.

    With `url` the fused model is asked through that server, our guard's or any other. Raises UserError where a model,
    a data set or the harness is missing.
    """
    try:
        version("lm-eval")
    except Exception as error:
        raise UserError(
            'lm-evaluation-harness is not installed: uv pip install -c constraints.txt -e ".[eval]"'
        ) from error
    settings, folder = recipe.benchmark, recipe.folder / "benchmark"
    tasks = task_files(recipe, settings.tasks, folder / "tasks")
    if not tasks:
        raise UserError("no task is left to run: see the notes above, or name others with --tasks")
    scores: Scores = {}
    seen = _contaminated(recipe)
    for name, source in models(recipe, tasks).items():
        mine = [task for task in tasks if _asks(recipe, task, name)]
        cache = folder / "answers" / f"{name}-{_stamp(source)}"
        cache.parent.mkdir(parents=True, exist_ok=True)
        console.print(f"[bold]benchmark[/bold]: {name}, {len(mine)} tasks", highlight=False)
        with _asked(recipe, source, folder, url if name == FUSED else None) as model:
            scores[name] = run_tasks(model, mine, settings.limits, settings.limit, cache, seen)
        _log_samples(folder / "samples" / name, scores[name])
    result = summary(recipe, tasks, scores)
    result["through"] = url or settings.backend
    write_text(folder / "benchmark.md", markdown(result))
    draw(result, folder / "benchmark.png")
    write_json(folder / "benchmark.json", result)
    return result


def _contaminated(recipe: Recipe) -> Callable[[str, list[str]], Collection[int]]:
    """Which questions of a task share words with training data, looked for once a task."""
    known: dict[str, list[int]] = {}
    trained = trained_texts(recipe) if recipe.evaluation.contamination_ngram else []

    def seen(name: str, questions: list[str]) -> Collection[int]:
        if name not in known:
            known[name] = check(recipe, {name: questions}, trained).get(name, [])
            if known[name]:
                said = f"  {len(known[name])} of {len(questions)} rows of {name} left out: their words were trained on"
                console.print(said, highlight=False)
        return known[name]

    return seen


def _asks(recipe: Recipe, task: TaskFile, model: str) -> bool:
    """Whether a task is asked of a model: always of fused and anchor, of an expert where it is its own or mixed."""
    return model in (FUSED, ANCHOR) or task.mixed or recipe.experts[recipe.expert_of(task.domain)].name == model


def models(recipe: Recipe, tasks: Sequence[TaskFile]) -> dict[str, ModelSource]:
    """The models that are asked: the fused one, and as `against` says the anchor and each task's own expert.

    An expert that is the anchor itself is asked once, as the anchor where that is named.
    """
    found = {FUSED: ModelSource(FUSED, recipe.fused)}
    anchor = anchor_source(recipe)
    if "anchor" in recipe.benchmark.against:
        found[ANCHOR] = anchor
    if "experts" in recipe.benchmark.against:
        domains = {task.domain for task in tasks}
        mixed = any(task.mixed for task in tasks)
        asked = range(len(recipe.experts)) if mixed else {recipe.expert_of(domain) for domain in domains}
        for index in sorted(asked):
            source = own_source(recipe, recipe.experts[index])
            if source.paths != anchor.paths or ANCHOR not in found:
                found[recipe.experts[index].name] = source
    return found


@contextmanager
def _asked(recipe: Recipe, source: ModelSource, folder: Path, url: str | None) -> Iterator[Models]:
    """A model ready to be asked, by the settings' backend or at a server that runs."""
    settings: Benchmarking = recipe.benchmark
    length, width = recipe.serving.max_model_len, settings.concurrency
    tokenizer = recipe.fused
    if url is not None:
        key = os.environ.get("QWEN_FUSION_API_KEY")
        yield Served(url.rstrip("/"), recipe.name, tokenizer, length, width, key)
    elif settings.backend == "transformers":
        yield InTransformers(
            source, tokenizer, recipe.attn_implementation, recipe.loading, recipe.evaluation.batch_rows
        )
    else:
        from serving.engine import Engine, EngineSettings

        with whole_model(source) as model:
            served = EngineSettings(
                model=str(model),
                served_name=source.name,
                dtype=str(compute_dtype()).removeprefix("torch."),
                tensor_parallel_size=recipe.serving.tensor_parallel_size,
                gpu_memory_utilization=recipe.serving.gpu_memory_utilization,
                max_model_len=length,
                cpu_kv_cache_bytes=recipe.serving.cpu_kv_cache_bytes,
            )
            with Engine(served, folder / f"vllm-{source.name}.log") as engine:
                yield Served(engine.url, source.name, tokenizer, length, width)


def _stamp(source: ModelSource) -> str:
    """Tells that a model is another one than the answers are of."""
    told = [[str(path.absolute()), weight_stamps(path)] for path in source.paths]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]


def _log_samples(folder: Path, measured: dict[str, Measured]) -> None:
    """One file a task: prompt, answers, target and metrics of every row."""
    shutil.rmtree(folder, ignore_errors=True)
    for name, task in measured.items():
        lines = [json.dumps(sample, ensure_ascii=False, default=str) for sample in task.samples]
        write_text(folder / f"{name}.jsonl", "\n".join([*lines, ""]))


def summary(recipe: Recipe, tasks: Sequence[TaskFile], scores: Scores) -> dict[str, Any]:
    """Figures by group of tasks: each model's mean with its 95% interval, the retained share, the difference."""
    groups: dict[str, list[TaskFile]] = {}
    for task in tasks:
        groups.setdefault(task.group, []).append(task)
    rows = {}
    for group, members in groups.items():
        domains = list(dict.fromkeys(task.domain for task in members))
        for domain in domains:
            these = [task for task in members if task.domain == domain]
            label = group if len(domains) == 1 else domain
            rows[label] = _row(recipe, group, domain, these, scores)
    return {
        "recipe": recipe.name,
        "seed": SUBSET_SEED,
        "versions": {package: version(package) for package in PACKAGES},
        "tasks": rows,
    }


def _row(recipe: Recipe, group: str, domain: str, tasks: list[TaskFile], scores: Scores) -> dict[str, Any]:
    """One group's figures; the rows of its tasks are counted alike."""
    own = recipe.experts[recipe.expert_of(domain)].name
    columns = {FUSED: FUSED, "own_expert": own if own in scores else ANCHOR, ANCHOR: ANCHOR}
    names = [name for name in scores[FUSED] if any(_belongs(name, task) for task in tasks)]
    values = {
        column: [score for name in names for score in scores[model][name].scores]
        for column, model in columns.items()
        if model in scores
    }
    others = {
        column: {
            metric: sum(found) / len(found)
            for metric in scores[columns[column]][names[0]].others
            if (found := [v for name in names for v in scores[columns[column]][name].others[metric]])
        }
        for column in values
    }
    share = None
    if ANCHOR in values and "own_expert" in values:
        share = retained_share(values[ANCHOR], values[FUSED], values["own_expert"])
    against = {
        column: _plain(difference(values[FUSED], values[column]))
        for column in ("own_expert", ANCHOR)
        if column in values
    }
    several = {}
    if any(task.mixed for task in tasks):
        several = _several(recipe, names, scores)
    return {
        **several,
        "group": group,
        "domain": domain,
        "expert": own,
        "metric": scores[FUSED][names[0]].metric,
        "rows": len(values[FUSED]),
        "tasks": names,
        "scores": {column: _plain(mean_interval(found)) for column, found in values.items()},
        "others": others,
        "fused_minus": against,
        "retained_share": _plain(share) if share else None,
    }


def _several(recipe: Recipe, names: list[str], scores: Scores) -> dict[str, Any]:
    """Of a task for several experts: each one's mean, the best of them, and a router that picks one by the question."""
    models_ = {e.name: e.name if e.name in scores else ANCHOR for e in recipe.experts}
    if not set(models_.values()) <= scores.keys():
        return {}
    by_expert = {e: [s for n in names for s in scores[m][n].scores] for e, m in models_.items()}
    questions = [question for name in names for question in scores[FUSED][name].questions]
    picked = [recipe.experts[recipe.expert_of(label_by_rules(q, recipe.domains).domain)].name for q in questions]
    routed = [by_expert[expert][row] for row, expert in enumerate(picked)]
    fused = [s for n in names for s in scores[FUSED][n].scores]
    best = max(by_expert, key=lambda expert: sum(by_expert[expert]))
    return {
        "experts": {expert: _plain(mean_interval(found)) for expert, found in by_expert.items()},
        "best_expert": best,
        "routed": _plain(mean_interval(routed)),
        "fused_minus_best": _plain(difference(fused, by_expert[best])),
        "fused_minus_routed": _plain(difference(fused, routed)),
    }


def _belongs(name: str, task: TaskFile) -> bool:
    """Whether a task of the harness is `task`, or of the group that it names."""
    return name == task.name or (task.file is None and name.startswith(task.name))


def _plain(interval: Interval) -> dict[str, float]:
    return asdict(interval)
