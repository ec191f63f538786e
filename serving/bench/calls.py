"""Requests for structured answers, each with its schema and what its values should be: BFCL's function calls, generated
extraction tasks, and schemas that grammars are bad at (hard_schemas.yaml).

    python -m serving.bench.calls FOLDER     # how many there are in a folder of BFCL's files
"""

import json
import random
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fusion.errors import UserError
from fusion.evaluation.scores import same
from fusion.tasks import extraction

# BFCL's names of types that JSON Schema does not have
TYPES = {"dict": "object", "float": "number", "tuple": "array", "any": None}
FILES = ("BFCL_v4_live_simple.json", "BFCL_v4_live_multiple.json")
HARD = Path(__file__).with_name("hard_schemas.yaml")


@dataclass(frozen=True)
class Call:
    """One request: what is asked, the schema, and the values wanted (None: any that satisfy it)."""

    question: str
    schema: dict[str, Any]
    wanted: Any = None
    accepted: Mapping[str, list[Any]] | None = None  # BFCL: the values each argument may have

    @property
    def prompt(self) -> str:
        """The question with the schema."""
        told = json.dumps(self.schema, ensure_ascii=False)
        return (
            f"{self.question}\n\nAnswer with one JSON value that satisfies this JSON Schema, and nothing else:\n{told}"
        )

    def right(self, value: Any) -> bool | None:
        """Whether a valid value is the one wanted; None where any is."""
        if self.accepted is not None:
            return isinstance(value, dict) and _accepted(value, self.accepted)
        return None if self.wanted is None else same(value, self.wanted)


def calls(folder: Path | None, count: int) -> list[Call]:
    """Every hard request, and `count` of BFCL's where there is a folder of them, each with a schema of its own;
    generated ones otherwise."""
    found = _of_different_schemas(_bfcl(folder)) if folder is not None else _generated(count)
    if folder is not None and len(found) < count:
        raise UserError(f"{folder} has calls of {len(found)} schemas, and {count} are asked for: lower --requests")
    return [*hard_calls(), *found[:count]]


def _of_different_schemas(found: Iterable[Call]) -> list[Call]:
    """The first call of every schema."""
    first: dict[str, Call] = {}
    for call in found:
        first.setdefault(json.dumps(call.schema, sort_keys=True), call)
    return list(first.values())


def hard_calls() -> list[Call]:
    """Schemas whose keywords a grammar ignores, over-constrains or refuses; each has an answer."""
    return [Call(row["question"], row["schema"]) for row in yaml.safe_load(HARD.read_text(encoding="utf-8"))]


def normalised(schema: Any) -> Any:
    """BFCL's parameters as a JSON Schema: types by TYPES, and nothing that JSON Schema does not know changed."""
    if isinstance(schema, list):
        return [normalised(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    found: dict[str, Any] = {}
    for key, value in schema.items():
        if key == "type" and isinstance(value, str):
            if (kind := TYPES.get(value, value)) is not None:
                found[key] = kind
        elif key == "properties" and isinstance(value, dict):
            found[key] = {name: normalised(part) for name, part in value.items()}
        elif key in ("items", "additionalProperties", "anyOf", "oneOf"):
            found[key] = normalised(value)
        elif key != "default":  # what is not said need not be written
            found[key] = value
    return found


def _bfcl(folder: Path) -> Iterator[Call]:
    for name in FILES:
        asked, answers = folder / name, folder / "possible_answer" / name
        for path in (asked, answers):
            if not path.is_file():
                raise UserError(f"{path} does not exist: --bfcl names a folder with {FILES[0]} and possible_answer/")
        truths = {row["id"]: row["ground_truth"] for row in map(json.loads, answers.open(encoding="utf-8"))}
        for row in map(json.loads, asked.open(encoding="utf-8")):
            ((called, accepted),) = truths[row["id"]][0].items()
            function = next((f for f in row["function"] if f["name"] == called), None)
            if function is None:
                continue
            words = next(message["content"] for message in reversed(row["question"][0]) if message["role"] == "user")
            question = f"{words}\n\nThe arguments for calling {called}: {function['description']}"
            yield Call(question, normalised(function["parameters"]), accepted=accepted)


def _generated(count: int) -> list[Call]:
    found: list[Call] = []
    rng = random.Random(0)
    while len(found) < count:
        example = extraction.structured(rng, "held_out")
        if example.schema is not None:
            found.append(Call(example.question, example.schema, wanted=example.reference["value"]))
    return found


def _accepted(value: Any, accepted: Any) -> bool:
    """BFCL's own rule: an argument is one of its accepted values, "" among them means that it may be left out."""
    if isinstance(accepted, dict) and isinstance(value, dict):
        choices = {name: given if isinstance(given, list) else [given] for name, given in accepted.items()}
        optional = {name for name, given in choices.items() if "" in given}
        if value.keys() - choices.keys() or choices.keys() - optional - value.keys():
            return False
        return all(any(_accepted(item, choice) for choice in choices[name]) for name, item in value.items())
    if isinstance(accepted, list) and isinstance(value, list):
        return len(accepted) == len(value) and all(map(_accepted, value, accepted))
    if isinstance(accepted, str) and isinstance(value, str):
        return _plain(accepted) == _plain(value)
    return same(value, accepted)


def _plain(text: str) -> str:
    return "".join(sign for sign in text.lower() if sign not in " ,./-_*^()\"'")


if __name__ == "__main__":
    given = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    total = list(_bfcl(given)) if given else []
    schemas = len(_of_different_schemas(total))
    sys.stdout.write(f"{len(total)} calls of BFCL, {schemas} schemas, {len(hard_calls())} hard ones\n")
