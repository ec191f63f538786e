"""Benchmark: tasks of lm-evaluation-harness on the fused model, the own expert of each task's domain, and the anchor.

    qwen-fusion benchmark configs/demo.yaml --limit 50
    qwen-fusion benchmark configs/qwen2.5-0.5b-five-experts.yaml --tasks gsm8k,bfcl --url http://127.0.0.1:8000

Models are served by vLLM one after the other (`backend: transformers` does without), or the fused one alone is asked
through a server that runs (with the first key of QWEN_FUSION_API_KEYS). Every answer is kept as it comes: the same
command goes on where it was stopped, and vLLM starts only for a model that has still to be asked.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

from fusion.checkpoint import write_json, write_lines, write_text
from fusion.contamination import check, trained_texts
from fusion.errors import UserError
from fusion.evaluation.benchmark_table import draw, markdown
from fusion.evaluation.dense import DENSE, UNION, folder_of
from fusion.evaluation.harness import (
    SUBSET_SEED,
    Loaded,
    Measured,
    TaskFile,
    load_tasks,
    question_of,
    rows_of,
    run_tasks,
    task_files,
)
from fusion.evaluation.harness_models import MOST_TOKENS, InTransformers, Models, Served
from fusion.evaluation.intervals import Interval, difference, mean_interval, retained_share
from fusion.hardware import compute_dtype
from fusion.progress import console, quiet_libraries
from fusion.provenance import made, version_of
from fusion.recipe import Recipe
from fusion.sections.evaluation import Benchmarking
from fusion.sources import ModelSource, anchor_source, own_source, whole_model
from gate_training.labelling.combine import whole_experts
from serving.client import served_models
from serving.guard.keys import VARIABLE as KEYS

FUSED, ANCHOR, ROUTER = "fused", "anchor", "router"
ALTERNATIVES = (*DENSE, UNION)
Scores = dict[str, dict[str, Measured]]  # model -> task -> what was measured


def benchmark(recipe: Recipe, url: str | None = None) -> dict[str, Any]:
    """Runs the recipe's `benchmark` section and returns the tables as plain data; sample logs lie beside them.

    With `url` the fused model is asked through that server, our guard's or any other. Raises UserError where a model,
    a data set or the harness is missing.
    """
    if version_of("lm-eval") is None:
        install = 'uv pip install --python .venv/bin/python -c constraints.txt -e ".[eval]"'
        raise UserError(f"lm-evaluation-harness is not installed: {install}")
    from fusion.merge import gates_are_trained

    quiet_libraries()
    settings, folder = recipe.benchmark, recipe.folder / "benchmark"
    if not (recipe.fused / "config.json").is_file():
        raise UserError(f"nothing is fused in {recipe.fused} yet: run `qwen-fusion run` on the recipe first")
    if not gates_are_trained(recipe.fused):
        console.print("  the gates are random: run `qwen-fusion train-gates` on the recipe first", highlight=False)
    if url and recipe.name not in (names := [str(model.get("id")) for model in served_models(url, _api_key())]):
        has = ", ".join(names) or "no model"
        raise UserError(f"the server at {url} has {has}, not '{recipe.name}': give the one that serves this recipe")
    loaded = load_tasks(task_files(recipe, settings.tasks, folder / "tasks"))
    trained: dict[str, list[int]] = {}
    rows = rows_of(loaded, settings.limits, settings.limit, _contaminated(recipe, trained))
    tasks = list(dict.fromkeys(loaded.owners[name] for name in rows))
    if not tasks:
        raise UserError("no task is left to run: see the notes above, or name others with --tasks")
    asked = models(recipe, tasks)
    experts = stand_ins(recipe, asked)
    routed = rows if ROUTER in settings.against else {name: rows[name] for name in rows if loaded.owners[name].mixed}
    picked = picked_experts(recipe, loaded, routed) if len(experts) == len(recipe.experts) else {}
    scores: Scores = {}
    strays: Scores = {}  # on rows that the router sends to an expert whose domain they are not of
    for name, source in asked.items():
        mine = {task: rows[task] for task in rows if _asks(recipe, loaded.owners[task], name)}
        sent = {task: [row for row, e in by_row.items() if experts[e] == name] for task, by_row in picked.items()}
        through = url if url and name == FUSED else settings.backend
        cache = folder / "answers" / f"{name}-{_stamp(recipe, source, through)}"
        cache.parent.mkdir(parents=True, exist_ok=True)
        console.print(f"[bold]benchmark[/bold]: {name}, {len(mine)} tasks", highlight=False)
        with _asked(recipe, source, folder, url if name == FUSED else None) as model:
            scores[name] = run_tasks(model, loaded, mine, cache)
            strays[name] = run_tasks(
                model, loaded, {task: r for task, r in sent.items() if r and task not in mine}, cache
            )
        del model  # before the next one is loaded
        _log_samples(folder / "samples" / name, scores[name])
    if picked:
        scores[ROUTER] = routed_scores(scores, strays, picked, experts)
    result = summary(recipe, tasks, scores, experts)
    result |= {"rows_trained_on": {name: len(out) for name, out in trained.items() if out}}
    result |= {"through": url or settings.backend, "made": made()}
    write_text(folder / "benchmark.md", markdown(result))
    draw(result, folder / "benchmark.png")
    write_json(folder / "benchmark.json", result)
    return result


def stand_ins(recipe: Recipe, asked: dict[str, ModelSource]) -> dict[str, str]:
    """{expert: the model of `asked` that is it}: itself, or the anchor where it is the anchor and that was asked."""
    anchor = anchor_source(recipe)
    found = {}
    for expert in recipe.experts:
        if expert.name in asked:
            found[expert.name] = expert.name
        elif ANCHOR in asked and own_source(recipe, expert).paths == anchor.paths:
            found[expert.name] = ANCHOR
    return found


def picked_experts(recipe: Recipe, loaded: Loaded, rows: dict[str, list[int]]) -> dict[str, dict[int, str]]:
    """For each task and row the expert that rules, or else a classifier, pick from the question."""
    flat = [(name, row) for name in rows for row in rows[name]]
    tasks = loaded.objects
    questions = [question_of(tasks[name], tasks[name].eval_docs[row]) for name, row in flat]
    found: dict[str, dict[int, str]] = {name: {} for name in rows}
    for (name, row), index in zip(flat, whole_experts(recipe, questions) if flat else [], strict=True):
        found[name][row] = recipe.experts[index].name
    return found


def routed_scores(
    scores: Scores, strays: Scores, picked: dict[str, dict[int, str]], experts: dict[str, str]
) -> dict[str, Measured]:
    """What a router in front of whole models scores: each row as the expert answers it that was picked."""
    answers = {model: strays[model] | scores[model] for model in experts.values()}
    found = {}
    for name, by_row in picked.items():
        fused = scores[FUSED][name]
        chosen = [answers[experts[by_row[row]]][name] for row in fused.rows]
        at = [(measured, measured.rows.index(row)) for measured, row in zip(chosen, fused.rows, strict=True)]
        others = {key: tuple(m.others[key][i] for m, i in at) for key in fused.others}
        found[name] = replace(fused, scores=tuple(m.scores[i] for m, i in at), others=others, samples=[])
    return found


def _contaminated(recipe: Recipe, known: dict[str, list[int]]) -> Callable[[str, list[str]], Collection[int]]:
    """Which questions of a task share words with training data, looked for once a task and kept in `known`."""
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
    """Whether a task is asked of a model: of an expert where it is its own or mixed, of every other always."""
    own = recipe.experts[recipe.expert_of(task.domain)].name == model
    return own or task.mixed or model not in [expert.name for expert in recipe.experts]


def models(recipe: Recipe, tasks: Sequence[TaskFile]) -> dict[str, ModelSource]:
    """The models that are asked: the fused one, and as `against` says the anchor, each task's own expert, dense ones.

    An expert that is the anchor itself is asked once, as the anchor where that is named. Raises UserError where a
    dense model has yet to be made.
    """
    found = {FUSED: ModelSource(FUSED, recipe.fused)}
    anchor = anchor_source(recipe)
    if "anchor" in recipe.benchmark.against:
        found[ANCHOR] = anchor
    if {"experts", ROUTER} & set(recipe.benchmark.against):
        domains = {task.domain for task in tasks}
        several = ROUTER in recipe.benchmark.against or any(task.mixed for task in tasks)
        asked = range(len(recipe.experts)) if several else {recipe.expert_of(domain) for domain in domains}
        for index in sorted(asked):
            source = own_source(recipe, recipe.experts[index])
            if source.paths != anchor.paths or ANCHOR not in found:
                found[recipe.experts[index].name] = source
    for name in (name for name in ALTERNATIVES if name in recipe.benchmark.against):
        folder = folder_of(recipe, name)
        if not folder.is_dir():
            make = "python -m fusion.evaluation.alternatives"
            raise UserError(f"benchmark.against names '{name}', and {folder} does not exist yet: run `{make}` first")
        found[name] = ModelSource(name, folder)
    return found


@contextmanager
def _asked(recipe: Recipe, source: ModelSource, folder: Path, url: str | None) -> Iterator[Models]:
    """A model ready to be asked, by the settings' backend or at a server that runs."""
    settings: Benchmarking = recipe.benchmark
    length, width = recipe.serving.max_model_len, settings.concurrency
    tokenizer = recipe.fused
    if url is not None:
        yield Served(lambda: url, recipe.name, tokenizer, length, width, _api_key())
    elif settings.backend == "transformers":
        yield InTransformers(
            source, tokenizer, recipe.attn_implementation, recipe.loading, recipe.evaluation.batch_rows
        )
    else:
        with ExitStack() as opened:

            @cache
            def started() -> str:
                return opened.enter_context(_engine(recipe, source, folder))

            yield Served(started, source.name, tokenizer, length, width)


@contextmanager
def _engine(recipe: Recipe, source: ModelSource, folder: Path) -> Iterator[str]:
    """vLLM with one model; its address."""
    from serving.engine import Engine, EngineSettings

    with whole_model(source) as model:
        served = EngineSettings(
            model=str(model),
            served_name=source.name,
            dtype=str(compute_dtype()).removeprefix("torch."),
            tensor_parallel_size=recipe.serving.tensor_parallel_size,
            gpu_memory_utilization=recipe.serving.gpu_memory_utilization,
            max_model_len=recipe.serving.max_model_len,
            yarn_factor=recipe.serving.yarn_factor,
            cpu_kv_cache_bytes=recipe.serving.cpu_kv_cache_bytes,
        )
        with Engine(served, folder / f"vllm-{source.name}.log") as engine:
            yield engine.url


def _api_key() -> str | None:
    """The first key that the environment names for a guard."""
    return (os.environ.get(KEYS) or "").split(",")[0] or None


def _stamp(recipe: Recipe, source: ModelSource, through: str) -> str:
    """Tells that a model, or the way in which it is asked, is another one than the answers are of."""
    from fusion.merge import source_stamp

    serving, harness_version = recipe.serving, version_of("lm-eval")
    told = [source_stamp(source), through, str(compute_dtype()), serving.max_model_len, serving.yarn_factor]
    told += [harness_version, MOST_TOKENS]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]


def _log_samples(folder: Path, measured: dict[str, Measured]) -> None:
    """One file a task: prompt, answers, target and metrics of every row."""
    shutil.rmtree(folder, ignore_errors=True)
    for name, task in measured.items():
        write_lines(folder / f"{name}.jsonl", task.samples)


def summary(recipe: Recipe, tasks: Sequence[TaskFile], scores: Scores, experts: dict[str, str]) -> dict[str, Any]:
    """Figures by group of tasks: each model's mean with its 95% interval, the retained share, the difference.

    `experts` says which of the models in `scores` each expert is.
    """
    rows = {}
    for group, domain in dict.fromkeys((task.group, task.domain) for task in tasks):
        members = [task for task in tasks if (task.group, task.domain) == (group, domain)]
        several = len({task.domain for task in tasks if task.group == group}) > 1
        rows[domain if several else group] = _row(recipe, group, domain, members, scores, experts)
    return {
        "recipe": recipe.name,
        "seed": SUBSET_SEED,
        "tasks": rows,
    }


def _row(
    recipe: Recipe, group: str, domain: str, tasks: list[TaskFile], scores: Scores, experts: dict[str, str]
) -> dict[str, Any]:
    """One group's figures; the rows of its tasks are counted alike."""
    own = recipe.experts[recipe.expert_of(domain)].name
    names = [name for name, measured in scores[FUSED].items() if measured.task in tasks]
    for found in scores.values():
        assert all(found[name].rows == scores[FUSED][name].rows for name in names if name in found)
    columns = {FUSED: FUSED, "own_expert": experts.get(own)}
    columns |= {n: n for n in (ANCHOR, ROUTER, *ALTERNATIVES) if n in scores and names[0] in scores[n]}
    asked = {column: [scores[model][name] for name in names] for column, model in columns.items() if model}
    values = {column: [score for task in found for score in task.scores] for column, found in asked.items()}
    share = None
    if ANCHOR in values and "own_expert" in values:
        share = retained_share(values[ANCHOR], values[FUSED], values["own_expert"])
    others = {column: _means(found) for column, found in asked.items()}
    by_task = {name: {c: _mean(found[i].scores) for c, found in asked.items()} for i, name in enumerate(names)}
    several = _several(recipe, names, scores, experts) if any(task.mixed for task in tasks) else {}
    return {
        "group": group,
        "domain": domain,
        "expert": own,
        "metric": scores[FUSED][names[0]].metric,
        "rows": len(values[FUSED]),
        "by_task": by_task,
        "scores": {column: _plain(mean_interval(found)) for column, found in values.items()},
        "others": others,
        "fused_minus": {
            column: _plain(difference(values[FUSED], values[column])) for column in values if column != FUSED
        },
        "retained_share": _plain(share) if share else None,
        **several,
    }


def _means(measured: list[Measured]) -> dict[str, float]:
    """The mean of every other metric over the rows of all tasks."""
    names = dict.fromkeys(name for task in measured for name in task.others)
    return {name: _mean([v for task in measured for v in task.others.get(name, ())]) for name in names}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _several(recipe: Recipe, names: list[str], scores: Scores, experts: dict[str, str]) -> dict[str, Any]:
    """Of a task for several experts: each one's mean and the best of them."""
    if len(experts) < len(recipe.experts):  # not all were asked
        return {}
    by_expert = {expert: [s for name in names for s in scores[model][name].scores] for expert, model in experts.items()}
    fused = [score for name in names for score in scores[FUSED][name].scores]
    best = max(by_expert, key=lambda expert: sum(by_expert[expert]))
    return {
        "experts": {expert: _plain(mean_interval(found)) for expert, found in by_expert.items()},
        "best_expert": best,
        "fused_minus_best": _plain(difference(fused, by_expert[best])),
    }


def _plain(interval: Interval) -> dict[str, float]:
    return asdict(interval)
