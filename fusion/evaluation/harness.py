"""lm-evaluation-harness on one model: our task files made its, its answers made ours.

    tasks = load_tasks(task_files(recipe, ["domains", "gsm8k"], folder))
    model = Served(lambda: "http://127.0.0.1:8000", "fused", tokenizer)
    measured = run_tasks(model, tasks, rows_of(tasks, {"gsm8k": 100}, 50), folder / "fused")

A task file of configs/benchmarks includes an upstream task and says where its data lie. Beside the harness's own keys
it has `each` (one task for each word of a list, or for each of the recipe's `domains`), `prepare` (a local copy that
becomes the hub's rows) or `rows` (chat rows of ours, of one `format` alone where that is said), and `metadata`:
`domain`, the `score` that counts, its `filter`, `upstream`, the task that stands for it where there is no copy, and
`mixed`, where every expert is to be asked.
"""

import logging
import random
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from fusion.checkpoint import write_lines, write_text
from fusion.data import ChatExample, load_examples
from fusion.errors import UserError
from fusion.evaluation.benchmark_data import write_split
from fusion.evaluation.evaluate import held_out_rows
from fusion.evaluation.harness_metrics import CodeEval, row_of, unpacked
from fusion.evaluation.harness_models import Models
from fusion.progress import console
from fusion.recipe import Recipe
from fusion.sections.data import DataSource, general_domain

CONFIGS = Path(__file__).parents[2] / "configs" / "benchmarks"
OURS = ("each", "prepare", "rows", "format")  # keys of a task file that the harness does not know
LIKELIHOODS = ("multiple_choice", "loglikelihood", "loglikelihood_rolling")
SUBSET_SEED = 0


@dataclass(frozen=True)
class TaskFile:
    """One task of the harness: its name there, the group that it is reported under, whose domain it is, what counts."""

    name: str
    group: str
    domain: str
    score: str | None = None  # None: the task's first metric
    filter: str | None = None  # None: the task's last filter
    file: Path | None = None  # None: a task that the harness itself has
    public: bool = True  # its questions may also be in public data that was trained on
    mixed: bool = False  # a task for several experts: each is asked
    optional: bool = False  # of a group: left out with a sentence where it cannot be had


@dataclass(frozen=True)
class Loaded:
    """Tasks as the harness has them, by its names, and which of ours each belongs to."""

    manager: Any
    objects: dict[str, Any]
    owners: dict[str, TaskFile]


@dataclass(frozen=True)
class Measured:
    """One task on one model: each row's score and the values of all other metrics, and the samples as logged."""

    task: TaskFile
    metric: str
    rows: tuple[int, ...]  # of the data set
    scores: tuple[float, ...]
    others: dict[str, tuple[float, ...]]
    samples: list[dict[str, Any]]


def known_tasks() -> list[str]:
    """The task files of configs/benchmarks."""
    return sorted(path.stem for path in CONFIGS.glob("*.yaml"))


def known_groups() -> dict[str, dict[str, str | None]]:
    """The tasks that a domain's name stands for, each with the score that counts where it is the harness's own."""
    path = CONFIGS / "groups.yml"
    return yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}


def task_files(recipe: Recipe, names: Sequence[str], folder: Path) -> list[TaskFile]:
    """The tasks of `names`: of groups.yml, task files, or tasks, groups and tags of the harness (from the hub).

    Files for the harness, and the rows that they name, are written into `folder`. Raises UserError for a file that
    cannot be used.
    """
    groups = known_groups()
    wanted = {task: name not in groups for name in reversed(names) for task in groups.get(name, {name: None})}
    found: list[TaskFile] = []
    for name, asked_for in reversed(wanted.items()):
        if (path := CONFIGS / f"{name}.yaml").is_file():
            found += _from_file(recipe, path, folder, not asked_for)
            continue
        domain, score = next(((d, rows[name]) for d, rows in groups.items() if name in rows), ("", None))
        found.append(TaskFile(name, name, _domain(recipe, domain), score, optional=not asked_for))
    return found


def _domain(recipe: Recipe, domain: str) -> str:
    return domain if domain in recipe.domains else general_domain(recipe.domains)


def _from_file(recipe: Recipe, path: Path, folder: Path, optional: bool) -> list[TaskFile]:
    text = path.read_text(encoding="utf-8").replace("${data}", str(folder.absolute())).replace("${lm_eval}", _tasks())
    each = yaml.load(text, Loader=_Plain).get("each", [""])
    found = []
    for word in recipe.domains if each == "domains" else each:
        filled = text.replace("${each}", word)
        given = yaml.load(filled, Loader=_Plain)
        meta, name = given["metadata"], given["task"]
        if (nltk := meta.get("nltk")) and not _nltk_has(nltk):
            console.print(f"  {path.stem} left out: nltk's {nltk} is not here (NLTK_DATA names its folder)")
            continue
        task = TaskFile(
            name,
            path.stem,
            _domain(recipe, meta["domain"]),
            meta["score"],
            meta.get("filter"),
            folder / f"{name}.yaml",
            public="prepare" in given or "file" in given["rows"],
            mixed=meta.get("mixed", False),
            optional=optional,
        )
        try:
            there = _prepare(recipe, given, word, folder)
        except UserError as error:
            if not optional:
                raise
            console.print(f"  {path.stem} left out: {error}", highlight=False, soft_wrap=True)
            continue
        if not there:
            found.append(replace(task, name=meta["upstream"], file=None))
            continue
        assert task.file is not None
        write_text(task.file, "\n".join(_without(filled, OURS)))
        found.append(task)
    return found


def _prepare(recipe: Recipe, given: dict[str, Any], word: str, folder: Path) -> bool:
    """Writes the rows that a task reads; False where a local copy is missing and upstream's task stands for it."""
    if "rows" in given:
        rows = [row for row in _rows(recipe, given, word) if _has_format(row, given.get("format"))]
        write_lines(folder / f"{given['task']}.jsonl", map(row_of, rows))
        return True
    data = Path(recipe.data_folder or "data").expanduser()
    files = {split: data / file for split, file in given["prepare"].items() if split != "as"}
    if not all(file.exists() for file in files.values()):
        return False
    written = given["dataset_kwargs"]["data_files"]
    for split, file in files.items():
        write_split(given["prepare"]["as"], file, Path(written[split]))
    return True


def _rows(recipe: Recipe, given: dict[str, Any], word: str) -> list[ChatExample]:
    if given["rows"] == "held_out":
        return held_out_rows(recipe, [word])[word]
    source = dict(given["rows"])
    if "file" in source:
        source["path"] = str(Path(recipe.data_folder or "data") / source["file"])
    return load_examples(DataSource.model_validate(source), given["metadata"]["domain"], None, SUBSET_SEED)


def _has_format(row: ChatExample, wanted: str | None) -> bool:
    return wanted is None or (isinstance(row.reference, dict) and row.reference.get("format") == wanted)


def _without(text: str, keys: tuple[str, ...]) -> Iterator[str]:
    """The lines of a YAML mapping but those of some of its keys."""
    leaving = False
    for line in text.split("\n"):
        if line[:1] not in (" ", "#", ""):
            leaving = line.split(":")[0] in keys
        if not leaving:
            yield line


class _Plain(yaml.SafeLoader):
    """Reads a task file without importing the functions that it names."""


_Plain.add_constructor("!function", lambda loader, node: f"!function {node.value}")


def _tasks() -> str:
    import lm_eval

    return str(Path(lm_eval.__file__).parent / "tasks")


def _nltk_has(resource: str) -> bool:
    import nltk

    try:
        nltk.data.find(resource)
    except LookupError:
        return False
    return True


@contextmanager
def _sandboxed_code() -> Iterator[None]:
    """While upstream's tasks are loaded, their `evaluate.load("code_eval")` gives the sandboxed one."""
    import evaluate

    fetch = evaluate.load

    def load(name: str, *args: Any, **kwargs: Any) -> Any:
        return CodeEval() if name == "code_eval" else fetch(name, *args, **kwargs)

    evaluate.load = load
    try:
        yield
    finally:
        evaluate.load = fetch


def load_tasks(tasks: Sequence[TaskFile]) -> Loaded:
    """The harness's tasks with their data; a group or a tag of it becomes several.

    Optional ones that cannot be had are left out with a sentence; for others a UserError says why. One that runs
    programs anywhere but in our sandbox is refused.
    """
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    folders = sorted({str(task.file.parent) for task in tasks if task.file})
    objects: dict[str, Any] = {}
    owners: dict[str, TaskFile] = {}
    with _sandboxed_code():
        manager = TaskManager(include_path=folders, include_defaults=any(task.file is None for task in tasks))
        known = ", ".join([*known_groups(), *known_tasks()])
        for task in tasks:  # all of them, before any is fetched
            if task.name not in manager.all_tasks and not task.optional:
                raise UserError(
                    f"benchmark.tasks names '{task.name}', which is no task: name some of {known} or the harness"
                )
        for task in tasks:
            try:
                found: dict[str, Any] = manager.load([task.name])["tasks"]
                for name, object_ in found.items():
                    _refuse_unsafe(name, object_)
            except Exception as error:  # no hub, no such name, a broken copy: every one is a user's to mend
                reason = str(error).strip().split("\n")[0]
                if task.optional:
                    said = f"  {task.name} left out: it cannot be had ({reason})"
                    console.print(said, highlight=False, soft_wrap=True)
                    continue
                raise UserError(
                    f"benchmark {task.name} cannot be had ({reason}): name a data_folder with a copy, or other tasks, "
                    f"of {known} or the harness"
                ) from error
            objects |= found
            owners |= dict.fromkeys(found, task)
    return Loaded(manager, objects, owners)


def _refuse_unsafe(name: str, task: Any) -> None:
    """Raises UserError for a task that runs what a model wrote, unless that is done by CodeEval."""
    if not getattr(task, "UNSAFE_CODE", False):
        return
    functions = getattr(task, "_metric_fn_list", {}).values()
    plain = [getattr(function, "__self__", function) for function in functions]  # the harness keeps f.__call__
    known = [value for function in plain for value in getattr(function, "__globals__", {}).values()]
    if not any(isinstance(value, CodeEval) for value in known):
        raise UserError(f"{name} runs a model's programs with an executor of its own")


def rows_of(
    loaded: Loaded,
    limits: dict[str, int],
    limit: int | None,
    seen: Callable[[str, list[str]], Collection[int]] = lambda name, questions: (),
) -> dict[str, list[int]]:
    """Which rows of each task are asked, the same for every model: `limits` by group, `limit` of every other.

    Rows of public tasks whose questions, as `seen` says by their numbers, were trained on are left out, and a task of
    which nothing stays.
    """
    rows = {}
    for name, task in loaded.objects.items():
        owner, docs = loaded.owners[name], list(task.eval_docs)
        out = seen(name, [str(task.doc_to_text(doc)) for doc in docs]) if owner.public else ()
        kept = [number for number in range(len(docs)) if number not in out]
        count = limits.get(owner.group, limit)
        if count is not None and count < len(kept):
            kept = sorted(random.Random(f"{SUBSET_SEED} {name}").sample(kept, count))
        if kept:
            rows[name] = kept
        else:
            console.print(f"  {name} left out: no row of it was not trained on", highlight=False)
    return rows


def run_tasks(models: Models, loaded: Loaded, rows: dict[str, list[int]], cache: Path) -> dict[str, Measured]:
    """Runs tasks on one model; by the harness's names.

    Answers are kept in `cache`, so that a run that was killed goes on. Raises UserError where the model's server fails.
    """
    import aiohttp
    import lm_eval
    import requests
    import tenacity

    failures = (aiohttp.ClientError, requests.RequestException, tenacity.RetryError, TimeoutError)
    measured: dict[str, Measured] = {}
    for by_likelihood in (False, True):
        chosen = {
            name: task
            for name, task in loaded.objects.items()
            if name in rows and (task.get_config("output_type") in LIKELIHOODS) == by_likelihood
        }
        if not chosen:
            continue
        try:
            results = lm_eval.simple_evaluate(
                model=models.likelihoods() if by_likelihood else models.generations(),
                tasks=list(chosen.values()),
                samples={name: rows[name] for name in chosen},
                apply_chat_template=not by_likelihood,
                log_samples=True,
                bootstrap_iters=0,
                confirm_run_unsafe_code=True,  # in our sandbox: load_tasks has refused all else
                task_manager=loaded.manager,
                use_cache=str(cache),
            )
        except failures as error:
            what = f"the model stopped answering ({type(error).__name__}: {error})"
            raise UserError(f"{what}; what it has answered is kept: the same command goes on") from error
        measured |= {name: _measured(loaded.owners[name], results["samples"][name]) for name in chosen}
    return measured


def _measured(task: TaskFile, samples: list[dict[str, Any]]) -> Measured:
    filters = list(dict.fromkeys(sample["filter"] for sample in samples))
    kept = [sample for sample in samples if sample["filter"] == (task.filter or filters[-1])]
    metrics = list(kept[0]["metrics"]) if kept else []
    metric = task.score or metrics[0]
    if metric not in metrics:
        raise UserError(
            f"{task.name} has no score '{metric}' (filters {', '.join(filters)}; metrics {', '.join(metrics)}): "
            "correct the metadata of its file"
        )
    metrics = [name for name in metrics if all(_is_figure(sample[name]) for sample in kept)]
    if metric not in metrics:
        raise UserError(f"{task.name}: its score '{metric}' is no figure of a row, so it cannot be compared by row")
    values = {name: tuple(_number(sample[name]) for sample in kept) for name in metrics}
    logged = [{key: sample[key] for key in ("doc_id", "arguments", "resps", "target", *metrics)} for sample in kept]
    return Measured(task, metric, tuple(s["doc_id"] for s in kept), values.pop(metric), values, logged)


def question_of(task: Any, doc: dict[str, Any]) -> str:
    """What a model is asked of a row, as a router sees it: the last message of the user, without examples."""
    conversation = unpacked([{"role": "user", "content": str(task.doc_to_text(doc))}])
    return next(turn["content"] for turn in reversed(conversation) if turn["role"] == "user")


def _is_figure(value: Any) -> bool:
    """Whether a metric says something of a row alone, unlike f1 or perplexity, which the harness sums up from pairs."""
    if isinstance(value, dict):
        return len(value) == 1 and _is_figure(next(iter(value.values())))
    return isinstance(value, int | float) or (isinstance(value, list) and all(isinstance(v, bool) for v in value))


def _number(value: Any) -> float:
    """A metric's value of one row: a number, a truth value, or several of them."""
    if isinstance(value, dict):
        value = next(iter(value.values()))
    if isinstance(value, list):  # truth values, as IFEval's of one prompt
        value = sum(map(float, value)) / max(1, len(value))
    return float(value)
