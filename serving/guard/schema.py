"""JSON Schema checks with jsonschema-rs: references never leave the schema, errors come as paths.

python -c "from serving.guard.schema import Checker; print(Checker({'type': 'integer'}).violations('a'))"
"""

import json
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import jsonschema_rs

from serving.guard.cost import evaluations

MAX_SCHEMA_BYTES = 256 * 1024
MAX_SCHEMA_DEPTH = 64
MAX_EVALUATIONS = 20_000  # of subschemas at one place of a value
MAX_VIOLATIONS = 10
CACHED_SCHEMAS = 256


class SchemaError(ValueError):
    """A schema that cannot be used: not a schema, too large, or with a reference that leaves it."""


@dataclass(frozen=True)
class Violation:
    """One thing wrong with an answer: JSON pointer, the keyword or named violation, and words for it."""

    path: str
    keyword: str
    message: str


def _refuse(uri: str) -> Any:
    raise ValueError(f"{uri} lies outside the schema; references may only point into it")


class Checker:
    """A compiled schema. Raises SchemaError when it cannot be compiled; never fetches anything."""

    def __init__(self, schema: Any) -> None:
        if not isinstance(schema, dict | bool):
            raise SchemaError(f"a JSON Schema is an object or a boolean, not {type(schema).__name__}")
        if _depth(schema) > MAX_SCHEMA_DEPTH:
            raise SchemaError(f"the schema has more than {MAX_SCHEMA_DEPTH} levels of nesting")
        if (count := evaluations(schema)) > MAX_EVALUATIONS:
            raise SchemaError(f"its references and alternatives multiply: {count:,} schemas apply to one place")
        try:
            self._validator = jsonschema_rs.validator_for(schema, retriever=_refuse, mask="the value")
        except (jsonschema_rs.ValidationError, jsonschema_rs.ReferencingError, ValueError) as error:
            raise SchemaError(str(error).split("\n")[0]) from None

    def violations(self, value: Any) -> list[Violation]:
        """What is wrong with `value`, at most MAX_VIOLATIONS entries; empty when it is valid."""
        found: list[Violation] = []
        for error in self._validator.iter_errors(value):
            keyword = str(error.schema_path[-1]) if error.schema_path else "false"
            found.append(Violation(_pointer(error.instance_path), keyword, error.message[:300]))
            if len(found) == MAX_VIOLATIONS:
                break
        return found


class CheckerCache:
    """Compiled schemas of the last requests, bounded."""

    def __init__(self, size: int = CACHED_SCHEMAS) -> None:
        self._size = size
        self._checkers: OrderedDict[str, Checker] = OrderedDict()

    def get(self, schema: Any) -> Checker:
        """The checker of a schema. Raises SchemaError when the schema cannot be used."""
        try:
            text = json.dumps(schema)
        except RecursionError:
            raise SchemaError("the schema is nested too deeply") from None
        if len(text) > MAX_SCHEMA_BYTES:
            raise SchemaError(f"the schema has {len(text)} characters, more than {MAX_SCHEMA_BYTES}")
        checker = self._checkers.pop(text, None) or Checker(schema)
        self._checkers[text] = checker
        if len(self._checkers) > self._size:
            self._checkers.popitem(last=False)
        return checker


def _pointer(path: list[str | int]) -> str:
    return "".join("/" + escaped(str(part)) for part in path)


def escaped(part: str) -> str:
    """One part of a JSON pointer (RFC 6901)."""
    return part.replace("~", "~0").replace("/", "~1")


def _depth(value: Any) -> int:
    deepest, pending = 0, [(value, 1)]
    while pending:
        item, level = pending.pop()
        deepest = max(deepest, level)
        children = item.values() if isinstance(item, dict) else item if isinstance(item, list) else ()
        pending += [(child, level + 1) for child in children]
    return deepest
