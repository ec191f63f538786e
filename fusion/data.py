"""Chat examples from where the recipe says: generated tasks, local JSON lines, or a hub data set.

One row is one conversation that ends with the answer to learn or to score: OpenAI's `messages`, ShareGPT's
`conversations`, or the columns that the recipe names. The same rows train a branch, fit the gates and evaluate the
result.
"""

import hashlib
import importlib
import json
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fusion.errors import UserError
from fusion.recipe import Recipe
from fusion.sections.data import SCORE_NAMES, DataSource, general_domain
from fusion.sections.training import BranchSettings

Message = dict[str, str]
ROLES = {"system": "system", "human": "user", "gpt": "assistant"}  # of ShareGPT's conversations
ROW = '{"messages": [{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "2"}]}'
BAD_ROW = (ValueError, KeyError, TypeError, AttributeError, IndexError)  # what a row of another form gives
Generator = Callable[[random.Random, str], "ChatExample"]


@dataclass(frozen=True)
class ChatExample:
    """A conversation whose last message is the assistant's answer."""

    messages: tuple[Message, ...]
    domain: str
    score: str = "exact_match"
    reference: Any = None
    schema: dict[str, Any] | None = field(default=None, compare=False)

    @property
    def prompt(self) -> list[Message]:
        """The messages before the answer."""
        return list(self.messages[:-1])

    @property
    def answer(self) -> str:
        """The assistant's answer that the row teaches or is scored against."""
        return self.messages[-1]["content"]

    @property
    def question(self) -> str:
        """The last user message: what rules and classifiers look at."""
        return next((m["content"] for m in reversed(self.prompt) if m["role"] == "user"), "")


def chat(question: str, answer: str, domain: str, system: str | None = None, **fields: Any) -> ChatExample:
    """One question with its answer as a ChatExample; `fields` are the dataclass's others."""
    head = ({"role": "system", "content": system},) if system else ()
    messages = (*head, {"role": "user", "content": question}, {"role": "assistant", "content": answer})
    return ChatExample(messages=messages, domain=domain, **fields)


def split_of(key: str, held_out_share: float = 0.15) -> str:
    """`train` or `held_out` for an item, decided by a hash of its key, so that no item is ever in both."""
    digest = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big")
    return "held_out" if digest / 2**64 < held_out_share else "train"


def load_examples(source: DataSource, domain: str, count: int | None = None, seed: int = 0) -> list[ChatExample]:
    """Reads `count` rows of `source`, at most its own `rows` (all of them where neither says), shuffled by `seed`.

    Raises UserError where the source is missing, or holds no usable row.
    """
    limit = min((number for number in (count, source.rows) if number), default=None)
    if source.parts:
        rows = _of_parts(source, domain, limit, seed)
    elif source.generated:
        rows = _generated(source.generated, source.split, limit or 1000, seed)
    else:
        source = source.model_copy(update={"rows": limit})
        rows = _local(Path(source.path).expanduser(), source, domain) if source.path else _hub(source, domain)
        random.Random(seed).shuffle(rows)
        rows = rows[:limit]
    rows = [replace(row, domain=domain) for row in rows]
    if not rows:
        raise UserError(f"no rows in the data of domain '{domain}' ({source.describe()}): check its split and columns")
    return rows


def train_rows(recipe: Recipe, count: int, seed: int, names: Iterable[str] | None = None) -> list[ChatExample]:
    """`count` training rows of each of the domains `names` (None: all), one domain after the other."""
    chosen = recipe.domains if names is None else names
    return [row for name in chosen for row in load_examples(recipe.domains[name].train, name, count, seed)]


def choosing_rows(
    recipe: Recipe, name: str, count: int, seed: int, source: DataSource | None = None
) -> list[ChatExample]:
    """`count` held-out rows of domain `name` to choose steps, methods or shared parts by; of `source` where given.

    Those that `evaluate` judges by come last: they are among them only where there are too few others.
    """
    settings, held_out = recipe.evaluation, recipe.domains[name].held_out
    judged = trained_on(load_examples(held_out, name, settings.rows, settings.seed))
    rows = load_examples(source or held_out, name, count + settings.rows, seed)
    return sorted(rows, key=judged)[:count]


def gate_rows(recipe: Recipe) -> dict[str, list[ChatExample]]:
    """The rows that the gates are trained on, by domain."""
    settings = recipe.gate_training
    return {n: load_examples(d.train, n, settings.rows, settings.seed) for n, d in recipe.domains.items()}


def general_rows(recipe: Recipe, settings: BranchSettings) -> list[ChatExample]:
    """The rows of the general domain that a branch mixes into its own: at least `general_share` of all."""
    name, count = general_domain(recipe.domains), general_count(settings)
    return load_examples(recipe.domains[name].train, name, count, settings.seed) if count else []


def general_count(settings: BranchSettings) -> int:
    """How many rows of the general domain a branch mixes in."""
    at_most = settings.rows * (settings.sampling.keep if settings.answers == "sampled" else 1)
    return round(at_most * settings.general_share / (1 - settings.general_share))


def trained_on(rows: Sequence[ChatExample]) -> Callable[[ChatExample], bool]:
    """A test of whether a row's prompt is among those of `rows`, whatever its capitals and spaces."""

    def key(row: ChatExample) -> tuple[str, ...]:
        return tuple(" ".join(message["content"].casefold().split()) for message in row.prompt)

    seen = {key(row) for row in rows}
    return lambda row: key(row) in seen


def generator_of(name: str) -> Generator:
    """The generator of a task written MODULE.TASK. Raises UserError where there is none."""
    module_name, _, task = name.partition(".")
    try:
        generators: dict[str, Generator] = importlib.import_module(f"fusion.tasks.{module_name}").GENERATORS
        return generators[task]
    except (ImportError, AttributeError, KeyError) as error:
        raise UserError(f"no generated task '{name}': use one of fusion/tasks, written MODULE.TASK") from error


def source_files(*sources: DataSource | None) -> list[Path]:
    """The files that decide what `sources` give: local rows, or the code of the generated tasks.

    Raises UserError where a task or a file does not exist.
    """
    return [file for source in sources if source is not None for file in _files(source)]


def _files(source: DataSource) -> list[Path]:
    if source.generated:
        generator_of(source.generated)
        return sorted((Path(__file__).parent / "tasks").glob("*.py"))
    if source.path:
        path = _existing(Path(source.path).expanduser())
        return sorted(path.rglob("*.json*")) if path.is_dir() else [path]
    return source_files(*source.parts)


def _of_parts(source: DataSource, domain: str, limit: int | None, seed: int) -> list[ChatExample]:
    """The rows of all parts, mixed: of each its `rows`, or an equal share of `limit`, none less for another's want."""
    share = -(-limit // len(source.parts)) if limit else None
    rows = [row for part in source.parts for row in load_examples(part, domain, part.rows or share, seed)]
    random.Random(seed).shuffle(rows)
    return rows[:limit]


def _existing(path: Path) -> Path:
    if not path.exists():
        raise UserError(f"data file {path} does not exist: correct its path in the recipe or create the file")
    return path


def _generated(name: str, split: str, count: int, seed: int) -> list[ChatExample]:
    generator = generator_of(name)
    rng = random.Random(f"{name}/{split}/{seed}")
    rows: list[ChatExample] = []
    seen: set[tuple[str, ...]] = set()
    for _ in range(50 * count):  # small held-out spaces run dry: distinct rows only, then stop
        row = generator(rng, split)
        key = tuple(m["content"] for m in row.messages)
        if split == "train" or key not in seen:
            seen.add(key)
            rows.append(row)
        if len(rows) == count:
            break
    return rows


def _local(path: Path, source: DataSource, domain: str) -> list[ChatExample]:
    if source.form != "table":
        from fusion.tasks.public import READERS

        try:
            return READERS[source.form](_existing(path), source, domain)
        except BAD_ROW as error:
            what = f"{path} is not what form '{source.form}' reads ({type(error).__name__}: {error})"
            raise UserError(f"{what}: name the data set's own files") from error
    rows = []
    if path.is_dir():
        raise UserError(f"data file {path} is a folder: name a file of JSON lines, or the 'form' that reads it")
    try:
        text = _existing(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"data file {path} is not UTF-8 text (byte {error.start}): save it as UTF-8") from error
    first, last = source.lines or (1, None)
    for number, line in enumerate(text.split("\n")[first - 1 : last], first):
        if not line.strip():
            continue
        try:
            rows.append(_row(json.loads(line), source, domain))
        except BAD_ROW as error:
            raise UserError(f"{path}, line {number}: not a chat row ({error}); one is {ROW}") from error
    return rows


def _hub(source: DataSource, domain: str) -> list[ChatExample]:
    if source.form != "table":
        raise UserError(
            f"data set '{source.hub}' of domain '{domain}' is read from its files (form '{source.form}'): "
            "download them and name their folder or file as 'path'"
        )
    import datasets

    try:
        table = datasets.load_dataset(source.hub, source.config, split=source.split, trust_remote_code=False)
    except Exception as error:  # every hub failure is a user's to mend: name, network, licence gate
        raise UserError(f"data set '{source.hub}' of domain '{domain}' cannot be loaded: {error}") from error
    try:
        return [_row(dict(row), source, domain) for row in table]
    except BAD_ROW as error:
        raise UserError(
            f"data set '{source.hub}' of domain '{domain}' has other columns than the recipe says: {error}"
        ) from error


def _row(row: dict[str, Any], source: DataSource, domain: str) -> ChatExample:
    if "conversations" in row:
        turns = [{"role": ROLES[turn["from"]], "content": turn["value"]} for turn in row["conversations"]]
        row = {**row, "messages": turns}
    if "messages" in row:
        messages: Sequence[Message] = row["messages"]
        if len(messages) < 2 or messages[-1]["role"] != "assistant":
            raise ValueError("messages must end with an assistant answer")
        return _checked(
            ChatExample(
                messages=tuple({"role": m["role"], "content": m["content"]} for m in messages),
                domain=domain,
                score=row.get("score", source.score),
                reference=row.get(source.reference or "reference"),
                schema=row.get("schema"),
            )
        )
    reference = row[source.reference] if source.reference else None
    prompt, answer = _text(row, source.prompt), _text(row, source.answer)
    return _checked(chat(prompt, answer, domain, score=source.score, reference=reference))


def _checked(row: ChatExample) -> ChatExample:
    """The row, if it can be tokenized and scored; a ValueError that says what is wrong otherwise."""
    if not all(isinstance(message["content"], str) for message in row.messages):
        raise ValueError("a message's content is not text")
    if row.score not in SCORE_NAMES:
        raise ValueError(f"score '{row.score}' is none of {', '.join(SCORE_NAMES)}")
    if row.score == "exact_values" and row.reference is not None and not _is_document(row.reference):
        raise ValueError(
            "the reference of 'exact_values' has a 'format' (json, yaml, xml) and a 'value', or is JSON text"
        )
    tests = [row.reference] if isinstance(row.reference, str) else row.reference
    if row.score == "tests_passed" and not (
        isinstance(tests, list) and tests and all(isinstance(t, str) for t in tests)
    ):
        raise ValueError("the reference of 'tests_passed' is Python text with assertions, or a list of such")
    return row


def _is_document(reference: Any) -> bool:
    """Whether 'exact_values' can compare with `reference`."""
    if isinstance(reference, dict):
        return "value" in reference and reference.get("format") in ("json", "yaml", "xml")
    try:
        json.loads(reference)
    except (ValueError, TypeError):
        return False
    return True


def _text(row: dict[str, Any], column: str) -> str:
    """A column's text, or a text with columns filled in; lists become lines."""
    lines = {key: "\n".join(map(str, value)) if isinstance(value, list) else value for key, value in row.items()}
    return column.format_map(lines) if "{" in column else str(lines[column])
