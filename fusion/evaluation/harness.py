"""lm-evaluation-harness on one model: our task files made its, its answers made ours.

    tasks = task_files(recipe, ["domains", "gsm8k"], folder)
    measured = run_tasks(Served(url, "fused", tokenizer), tasks, {"gsm8k": 100}, 50, folder / "fused")

A task file of configs/benchmarks includes an upstream task and says where its data lie. Beside the harness's own keys
it has `each` (one task for each word of a list, or for each of the recipe's `domains`), `prepare` (a local copy that
becomes the hub's rows) or `rows` (chat rows of ours), and `metadata`: `domain`, the `score` that counts, its `filter`,
`upstream`, the task that stands for it where there is no copy, and `mixed`, where every expert is to be asked.
"""

import json
import logging
import os
import random
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fusion.checkpoint import write_text
from fusion.data import ChatExample, load_examples
from fusion.errors import UserError
from fusion.evaluation.benchmark_data import write_split
from fusion.evaluation.evaluate import held_out_rows
from fusion.evaluation.harness_metrics import CodeEval, row_of
from fusion.evaluation.harness_models import Models
from fusion.progress import console, quiet
from fusion.recipe import DataSource, Recipe, general_domain

CONFIGS = Path(__file__).parents[2] / "configs" / "benchmarks"
LIKELIHOODS = ("multiple_choice", "loglikelihood", "loglikelihood_rolling")
SUBSET_SEED = 0


@dataclass(frozen=True)
class TaskFile:
    """One task of the harness: its name there, the group that it is reported under, whose domain it is, what counts."""

    name: str
    group: str
    domain: str
    score: str | None  # None: the task's first metric
    filter: str | None  # None: the task's last filter
    file: Path | None  # None: a task that the harness itself has
    public: bool = True  # its questions may also be in public data that was trained on
    mixed: bool = False  # a task for several experts: each is asked


@dataclass(frozen=True)
class Measured:
    """One task on one model: each row's score and the values of all other metrics, and the samples as logged."""

    metric: str
    rows: tuple[int, ...]  # of the data set
    questions: tuple[str, ...]
    scores: tuple[float, ...]
    others: dict[str, tuple[float, ...]]
    samples: list[dict[str, Any]]


def known_tasks() -> list[str]:
    """The task files of configs/benchmarks."""
    return sorted(path.stem for path in CONFIGS.glob("*.yaml"))


def known_groups() -> dict[str, list[str]]:
    """What a name stands for that is no task's own: the tasks of a domain."""
    path = CONFIGS / "groups.yml"
    return yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}


def task_files(recipe: Recipe, groups: Sequence[str], folder: Path) -> list[TaskFile]:
    """The tasks of `groups`: names of groups.yml, task files, or tasks, groups and tags of the harness (from the hub).

    Files for the harness, and the rows that they name, are written into `folder`. Raises UserError for a file that
    cannot be used.
    """
    found: list[TaskFile] = []
    for group in dict.fromkeys(task for name in groups for task in known_groups().get(name, [name])):
        path = CONFIGS / f"{group}.yaml"
        general = general_domain(recipe.domains)
        own = path.is_file()
        found += _from_file(recipe, path, folder) if own else [TaskFile(group, group, general, None, None, None)]
    return found


def _from_file(recipe: Recipe, path: Path, folder: Path) -> list[TaskFile]:
    text = path.read_text(encoding="utf-8")
    each = yaml.load(text, Loader=_Plain).get("each", [""])
    found = []
    for word in recipe.domains if each == "domains" else each:
        filled = (
            text.replace("${each}", word).replace("${data}", str(folder.absolute())).replace("${lm_eval}", _tasks())
        )
        given = yaml.load(filled, Loader=_Plain)
        meta, name = given["metadata"], given["task"]
        domain = meta["domain"] if meta["domain"] in recipe.domains else general_domain(recipe.domains)
        if (nltk := meta.get("nltk")) and not _nltk_has(nltk):
            console.print(f"  {path.stem} left out: nltk's {nltk} is not here (NLTK_DATA names its folder)")
            continue
        mixed = meta.get("mixed", False)
        if not _prepare(recipe, given, word, folder):
            known = (meta["upstream"], path.stem, domain, meta["score"], meta.get("filter"))
            found.append(TaskFile(*known, None, mixed=mixed))
            continue
        kept = "\n".join(_without(filled, ("each", "prepare", "rows")))
        target = folder / f"{name}.yaml"
        target.parent.mkdir(parents=True, exist_ok=True)
        write_text(target, kept)
        public = "prepare" in given or "file" in given["rows"]
        found.append(TaskFile(name, path.stem, domain, meta["score"], meta.get("filter"), target, public, mixed))
    return found


def _prepare(recipe: Recipe, given: dict[str, Any], word: str, folder: Path) -> bool:
    """Writes the rows that a task reads; False where a local copy is missing and upstream's task stands for it."""
    if "rows" in given:
        rows = _rows(recipe, given, word)
        target = folder / f"{given['task']}.jsonl"
        target.parent.mkdir(parents=True, exist_ok=True)
        write_text(target, "".join(json.dumps(row_of(row), ensure_ascii=False) + "\n" for row in rows))
        return True
    data = Path(recipe.data_folder or "data").expanduser()
    files = {split: data / file for split, file in given["prepare"].items() if split != "as"}
    if not all(file.is_file() for file in files.values()):
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


def run_tasks(
    models: Models,
    tasks: Sequence[TaskFile],
    limits: dict[str, int],
    limit: int | None,
    cache: Path,
    seen: Callable[[str, list[str]], Collection[int]] = lambda name, questions: (),
) -> dict[str, Measured]:
    """Runs tasks on one model; by task name. `limits` are rows of a task by group, `limit` of every other.

    Rows of public tasks whose questions, as `seen` says by their numbers, were trained on are left out.

    Answers are kept in `cache`, so that a run that was killed goes on. Raises UserError where a data set cannot be had.
    """
    import lm_eval
    from lm_eval.tasks import TaskManager

    if quiet():
        os.environ["TQDM_DISABLE"] = "1"
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    folders = sorted({str(task.file.parent) for task in tasks if task.file})
    with _sandboxed_code():
        manager = TaskManager(include_path=folders, include_defaults=any(task.file is None for task in tasks))
        loaded = {task.name: _load(manager, task) for task in tasks}
    owner = {name: task for task in tasks for name in loaded[task.name]}
    objects = {name: object_ for found in loaded.values() for name, object_ in found.items()}
    measured: dict[str, Measured] = {}
    for by_likelihood in (False, True):
        chosen = {n: o for n, o in objects.items() if (o.get_config("output_type") in LIKELIHOODS) == by_likelihood}
        if not chosen:
            continue
        rows = {}
        for name, object_ in chosen.items():
            docs = list(object_.eval_docs)
            out = seen(name, [str(object_.doc_to_text(doc)) for doc in docs]) if owner[name].public else ()
            rows[name] = _subset(len(docs), limits.get(owner[name].group, limit), out)
        results = lm_eval.simple_evaluate(
            model=models.likelihoods() if by_likelihood else models.generations(),
            tasks=list(chosen.values()),
            samples=rows,
            apply_chat_template=not by_likelihood,
            log_samples=True,
            bootstrap_iters=0,
            confirm_run_unsafe_code=True,  # it is run in our sandbox
            task_manager=manager,
            use_cache=str(cache),
        )
        measured |= {name: _measured(owner[name], results["samples"][name]) for name in chosen}
    return measured


def _load(manager: Any, task: TaskFile) -> dict[str, Any]:
    """The harness's objects of a task, a group or a tag, by name."""
    try:
        loaded: dict[str, Any] = manager.load([task.name])["tasks"]
    except Exception as error:  # a hub that does not answer, a name that is unknown: every one is a user's to mend
        reason = str(error).split("\n")[0]
        known = ", ".join([*known_groups(), *known_tasks()])
        what = f"benchmark {task.name} cannot be had ({reason})"
        raise UserError(f"{what}: name a data_folder with a copy, or other tasks, of {known} or the harness") from error
    return loaded


def _subset(rows: int, limit: int | None, left_out: Collection[int] = ()) -> list[int]:
    """`limit` of the rows, the same for every model."""
    kept = [number for number in range(rows) if number not in left_out]
    if limit is None or limit >= len(kept):
        return kept
    return sorted(random.Random(SUBSET_SEED).sample(kept, limit))


def _measured(task: TaskFile, samples: list[dict[str, Any]]) -> Measured:
    filters = list(dict.fromkeys(sample["filter"] for sample in samples))
    kept = [sample for sample in samples if sample["filter"] == (task.filter or filters[-1])]
    metrics = [name for name in kept[0]["metrics"]]
    values = {name: tuple(_number(sample[name]) for sample in kept) for name in metrics}
    metric = task.score or metrics[0]
    scores = values.pop(metric) if metric in values else values.pop(metrics[0])
    logged = [{key: sample[key] for key in ("doc_id", "arguments", "resps", "target", *metrics)} for sample in kept]
    rows, questions = tuple(sample["doc_id"] for sample in kept), tuple(map(_question, kept))
    return Measured(metric, rows, questions, scores, values, logged)


def _question(sample: dict[str, Any]) -> str:
    """What was asked, without examples and template."""
    doc = sample["doc"]
    return str(next((doc[key] for key in ("prompt", "question", "text", "input") if key in doc), ""))


def _number(value: Any) -> float:
    """A metric's value of one row: a number, a truth value, or {pass@1: number}."""
    if isinstance(value, dict):
        value = next(iter(value.values()))
    if isinstance(value, list | tuple):
        value = sum(map(float, value)) / max(1, len(value))
    return float(value)
