"""How many subschemas a validator applies to one place of a value, so that no schema can stall the guard.

    python -c "from serving.guard.cost import evaluations; print(evaluations({'allOf': [{}, {}]}))"

References multiply: 25 definitions that each name the next one twice are 33 million checks of one string, and a
recursive schema that reaches itself by two ways at the same place doubles with every level of the value. Both are
counted here without being carried out, in time polynomial in the schema and no longer than MAX_SECONDS.
"""

import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

from serving.guard.pointer import pointed

MAX_SECONDS = 0.5  # of this thread
FREE_STEPS = 200  # milliseconds of work: a virtual machine that stood still charges the thread for it
LEVELS = 32  # of a value that are looked at; what doubles with every level is far over any limit by then
EVERY = "*"  # a child's name that stands for all
LISTS, SINGLE, NAMED = ("allOf", "anyOf", "oneOf"), ("not", "if", "then", "else"), ("dependentSchemas", "dependencies")
CHILDREN = (
    *("additionalProperties", "unevaluatedProperties", "patternProperties"),
    *("items", "prefixItems", "additionalItems", "unevaluatedItems", "contains"),
)


class CountsTooLong(Exception):
    """Counting has taken MAX_SECONDS: the schema is too large for what it branches."""


def evaluations(schema: Any) -> int:
    """The most subschemas that apply to one place of any value, along the worst way down of LEVELS steps.

    Raises CountsTooLong, and RecursionError where references follow one another too often.
    """
    return _Count(schema).worst()


class _Count:
    def __init__(self, root: Any) -> None:
        self._root = root
        self._nodes: dict[int, Any] = {}  # every subschema by its identity
        self._anchors: dict[str, Any] = {}
        self._closed: dict[int, Counter[int]] = {}
        self._open: set[int] = set()
        self._end = time.thread_time() + MAX_SECONDS
        self._steps = 0
        self._collect(root)

    def worst(self) -> int:
        """The largest number of evaluations at one place."""
        here = self._close(Counter({id(self._root): 1}))
        most = here.total()
        for _ in range(LEVELS):
            below = [self._close(found) for found in self._children(here)]
            if not below:
                break
            here = max(below, key=Counter.total)
            most = max(most, here.total())
        return most

    def _look_at_the_clock(self) -> None:
        self._steps += 1
        if self._steps > FREE_STEPS and time.thread_time() > self._end:
            raise CountsTooLong

    def _collect(self, root: Any) -> None:
        pending = [root]
        while pending:
            value = pending.pop()
            if isinstance(value, dict):
                self._nodes[id(value)] = value
                for key in ("$anchor", "$dynamicAnchor"):
                    if isinstance(value.get(key), str):
                        self._anchors[value[key]] = value
                pending += value.values()
            elif isinstance(value, list):
                pending += value

    def _resolve(self, reference: Any) -> Any:
        if isinstance(reference, str) and reference.startswith("#") and reference[1:] in self._anchors:
            return self._anchors[reference[1:]]
        return pointed(reference, self._root)  # None: embedded by $id, or refused when it is compiled

    def _in_place(self, node: dict[str, Any]) -> Iterator[Any]:
        """The subschemas that apply to the same place as `node`."""
        for key in ("$ref", "$dynamicRef", "$recursiveRef"):
            if key in node:
                yield self._resolve(node[key])
        for key in LISTS:
            yield from node[key] if isinstance(node.get(key), list) else ()
        yield from (node.get(key) for key in SINGLE)
        for key in NAMED:
            yield from node[key].values() if isinstance(node.get(key), dict) else ()

    def _all_of(self, node: Any) -> Counter[int]:
        """`node` and what it applies to the same place, each with how often; a reference to itself ends there."""
        key = id(node)
        if not isinstance(node, dict) or key in self._open:
            return Counter()
        if key not in self._closed:
            self._open.add(key)
            found = Counter({key: 1})
            for part in self._in_place(node):
                self._look_at_the_clock()
                found.update(self._all_of(part))
            self._open.discard(key)
            self._closed[key] = found
        return self._closed[key]

    def _close(self, given: Counter[int]) -> Counter[int]:
        found: Counter[int] = Counter()
        for key, count in given.items():
            self._look_at_the_clock()
            for inner, times in self._all_of(self._nodes.get(key)).items():
                found[inner] += count * times
        return found

    def _children(self, here: Counter[int]) -> list[Counter[int]]:
        """What applies to each child of a value to which `here` applies."""
        by_name: dict[str, Counter[int]] = {EVERY: Counter()}
        for key, count in here.items():
            self._look_at_the_clock()
            node = self._nodes[key]
            for name, part in node["properties"].items() if isinstance(node.get("properties"), dict) else ():
                by_name.setdefault(name, Counter())[id(part)] += count
            for keyword in CHILDREN:
                for part in _parts(keyword, node.get(keyword)):
                    by_name[EVERY][id(part)] += count
        every = by_name.pop(EVERY)
        found = []
        for named in by_name.values():
            self._look_at_the_clock()
            found.append(named + every)
        found = found or [every]
        return [counter for counter in found if counter]


def _parts(keyword: str, value: Any) -> list[Any]:
    if keyword == "patternProperties" and isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else [value] if isinstance(value, dict) else []
