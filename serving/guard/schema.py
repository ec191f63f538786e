"""JSON Schema checks with jsonschema-rs: references never leave the schema, errors come as paths.

python -c "from serving.guard.schema import Checker; print(Checker({'type': 'integer'}).violations('a'))"
"""

import json
import time
from collections import Counter, OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from threading import Lock
from typing import Any

import jsonschema_rs

from serving.guard.bodies import encoded
from serving.guard.cost import CountsTooLong, evaluations
from serving.guard.enforcement import Unenforced, unenforced
from serving.guard.grammar import ForGrammar, for_grammar
from serving.guard.pointer import escaped, objects
from serving.guard.satisfiable import impossible

MAX_SCHEMA_BYTES = 256 * 1024
MAX_SCHEMA_DEPTH = 64
MAX_EVALUATIONS = 20_000  # of subschemas at one place of a value
MAX_REFERENCES = 2000
MAX_BRANCHES = 8000  # members of all anyOf, oneOf and allOf
MAX_PATTERN_SECONDS = 0.5  # to compile all patterns: \p{L}{1,250} alone is 0.1
MAX_VIOLATIONS = 10
QUOTING = ("additionalProperties", "unevaluatedProperties", "propertyNames", "false")  # their messages quote keys
KEYWORDS = frozenset(
    """type enum const multipleOf maximum exclusiveMaximum minimum exclusiveMinimum maxLength minLength pattern format
    maxItems minItems uniqueItems contains maxContains minContains maxProperties minProperties required
    dependentRequired dependentSchemas dependencies propertyNames additionalProperties unevaluatedProperties
    additionalItems unevaluatedItems prefixItems items properties patternProperties anyOf oneOf allOf not if then else
    contentEncoding contentMediaType $ref $dynamicRef $recursiveRef""".split()  # noqa: SIM905
)
QUICK_CHARACTERS = 2000  # a schema without patterns up to here compiles in under a millisecond
CACHED_SCHEMAS = 256


class SchemaError(ValueError):
    """A schema that cannot be used: not a schema, too large, or with a reference that leaves it."""

    code = "invalid_schema"


class TooCostly(SchemaError):
    """A schema that takes too long to look through or to compile."""


class Unsatisfiable(SchemaError):
    """A schema that no value satisfies."""

    code = "unsatisfiable_schema"


class NotCompiled(Exception):
    """A schema that may take long to compile has not been compiled yet; `CheckerCache.get` will, in a thread."""


@dataclass(frozen=True)
class Violation:
    """One thing wrong with an answer: JSON pointer, the keyword or named violation, and words for it.

    `detail` are words that quote the answer, for the model that wrote it alone.
    """

    path: str
    keyword: str
    message: str
    detail: str = ""

    def told(self, choice: int) -> dict[str, Any]:
        """As a report has it, of a choice by its index."""
        return {"choice": choice, "path": self.path, "keyword": self.keyword, "message": self.message}


def _refuse(uri: str) -> Any:
    raise ValueError(f"{uri} lies outside the schema; references may only point into it")


class Checker:
    """A compiled schema. Raises SchemaError when it cannot be compiled; never fetches anything."""

    def __init__(self, schema: Any) -> None:
        if not isinstance(schema, dict | bool):
            raise SchemaError(f"a JSON Schema is an object or a boolean, not {type(schema).__name__}")
        if _depth(schema) > MAX_SCHEMA_DEPTH:
            raise SchemaError(f"the schema has more than {MAX_SCHEMA_DEPTH} levels of nesting")
        _check_counts(schema)
        try:
            count = evaluations(schema)
        except CountsTooLong:
            raise TooCostly("its references and alternatives take too long to count") from None
        except RecursionError:
            raise SchemaError("its references follow one another too often") from None
        if count > MAX_EVALUATIONS:
            raise SchemaError(f"its references and alternatives multiply: {count:,} schemas apply to one place")
        _check_patterns(schema)
        self.schema = schema
        try:
            self._validator = jsonschema_rs.validator_for(
                schema, retriever=_refuse, mask="the value", validate_formats=True
            )
        except (jsonschema_rs.ValidationError, jsonschema_rs.ReferencingError, ValueError) as error:
            raise SchemaError(str(error).split("\n")[0]) from None

    @cached_property
    def left_out(self) -> list[Unenforced]:
        """The keywords that a grammar leaves to this validation."""
        return [f for f in unenforced(self.schema) if (f.path, f.keyword) not in self.for_grammar.mended]

    @cached_property
    def for_grammar(self) -> ForGrammar:
        """The schema as the grammar engine is given it."""
        return for_grammar(self.schema)

    @cached_property
    def impossible(self) -> str | None:
        """Why nothing satisfies the schema, where that is seen."""
        return impossible(self.schema)

    def violations(self, value: Any) -> list[Violation]:
        """What is wrong with `value`, at most MAX_VIOLATIONS entries; empty when it is valid."""
        found: list[Violation] = []
        if self._validator.is_valid(value):  # half the time of looking for errors
            return found
        for error in self._validator.iter_errors(value):
            last = error.schema_path[-1] if error.schema_path else None  # of a false schema: its name
            keyword = str(last) if last in KEYWORDS else "false"
            said = error.message[:300]
            quotes = keyword in QUOTING or any(part in QUOTING for part in error.schema_path)
            message = f"does not satisfy {keyword}" if quotes else said
            found.append(Violation(_pointer(error.instance_path), keyword, message, said))
            if len(found) == MAX_VIOLATIONS:
                break
        return found


class CheckerCache:
    """Compiled schemas of the last requests, bounded. Threads may share it."""

    def __init__(self, size: int = CACHED_SCHEMAS) -> None:
        self._size = size
        self._checkers: OrderedDict[bytes, Checker] = OrderedDict()
        self._lock = Lock()

    def get(self, schema: Any) -> Checker:
        """The checker of a schema, compiled where need be. Raises SchemaError when the schema cannot be used."""
        key = _text(schema)
        found = self._known(key)
        return found if found is not None else self._keep(key, Checker(schema))

    def at_once(self, schema: Any) -> Checker:
        """As `get`, but raises NotCompiled rather than compile what may take long."""
        key = _text(schema)
        found = self._known(key)
        if found is None:
            if len(key) > QUICK_CHARACTERS or b'"pattern' in key:
                raise NotCompiled
            found = self._keep(key, Checker(schema))
        return found

    def _known(self, key: bytes) -> Checker | None:
        with self._lock:
            if key in self._checkers:
                self._checkers.move_to_end(key)
            return self._checkers.get(key)

    def _keep(self, key: bytes, checker: Checker) -> Checker:
        with self._lock:
            self._checkers[key] = checker
            if len(self._checkers) > self._size:
                self._checkers.popitem(last=False)
        return checker


def _text(schema: Any) -> bytes:
    try:
        text = encoded(schema)
    except RecursionError:
        raise SchemaError("the schema is nested too deeply") from None
    if len(text) > MAX_SCHEMA_BYTES:
        raise SchemaError(f"the schema has {len(text)} bytes, more than {MAX_SCHEMA_BYTES}")
    return text


def _check_counts(schema: Any) -> None:
    counts: Counter[str] = Counter()
    for part in objects(schema):
        counts["references"] += sum(key in part for key in ("$ref", "$dynamicRef", "$recursiveRef"))
        lists = (part.get(key) for key in ("anyOf", "oneOf", "allOf"))
        counts["alternatives"] += sum(len(found) for found in lists if isinstance(found, list))
    for what, most in (("references", MAX_REFERENCES), ("alternatives", MAX_BRANCHES)):
        if counts[what] > most:
            raise SchemaError(f"the schema has {counts[what]:,} {what}, more than {most:,}")


def _check_patterns(schema: Any) -> None:
    """Compiles every pattern alone, with an eye on the clock: no schema may hold the guard up for long."""
    begin = time.thread_time()
    for pattern in {found for part in objects(schema) for found in _patterns(part)}:
        try:
            jsonschema_rs.validator_for({"pattern": pattern})
        except (jsonschema_rs.ValidationError, ValueError):
            raise SchemaError(f"{json.dumps(pattern)[:100]} is no pattern that can be used") from None
        if time.thread_time() - begin > MAX_PATTERN_SECONDS:
            raise TooCostly(f"its patterns take more than {MAX_PATTERN_SECONDS} s to compile")


def _patterns(schema: dict[str, Any]) -> Iterator[str]:
    if isinstance(schema.get("pattern"), str):
        yield schema["pattern"]
    named = schema.get("patternProperties")
    yield from named if isinstance(named, dict) else ()


def _pointer(path: list[str | int]) -> str:
    return "".join("/" + escaped(str(part)) for part in path)


def _depth(value: Any) -> int:
    deepest, pending = 0, [(value, 1)]
    while pending:
        item, level = pending.pop()
        deepest = max(deepest, level)
        children = item.values() if isinstance(item, dict) else item if isinstance(item, list) else ()
        pending += [(child, level + 1) for child in children]
    return deepest
