"""Whether function calls are those that were wanted, by the rules of the Berkeley Function Calling Leaderboard.

    right([{"name": "f", "arguments": {"x": 1}}], [{"f": {"x": [1, "one"]}}])

Every argument has a list of values that count; one that may be missing has "" among them. Texts are compared without
case, spaces and punctuation, as its AST checker does (https://github.com/ShishirPatil/gorilla, bfcl_eval).
"""

import re
from typing import Any

IGNORED = re.compile(r"[ ,./\-_*^]")


def right(found: Any, wanted: list[dict[str, Any]]) -> bool:
    """Whether `found`, a list of {"name", "arguments"}, has just the calls of `wanted`, {name: {argument: values}}."""
    if not isinstance(found, list) or len(found) != len(wanted):
        return False
    left = list(found)
    for call in wanted:
        [(name, arguments)] = call.items()
        match = next((item for item in left if _is_call(item, name, arguments)), None)
        if match is None:
            return False
        left.remove(match)
    return True


def _is_call(found: Any, name: str, arguments: dict[str, list[Any]]) -> bool:
    if not isinstance(found, dict) or found.keys() != {"name", "arguments"} or found["name"] != name:
        return False
    return _fields_match(found["arguments"], arguments)


def _fields_match(found: Any, wanted: dict[str, list[Any]]) -> bool:
    """Whether each field has a value that counts, and none is there that is not wanted."""
    if not isinstance(found, dict) or found.keys() - wanted.keys():
        return False
    return all(_counts(found[key], values) if key in found else "" in values for key, values in wanted.items())


def _counts(found: Any, values: list[Any]) -> bool:
    return any(_equal(found, value) for value in values)


def _equal(found: Any, value: Any) -> bool:
    if isinstance(value, dict):
        return _fields_match(found, value)
    if isinstance(value, list):
        return isinstance(found, list) and len(found) == len(value) and all(map(_equal, found, value))
    if isinstance(value, bool) or isinstance(found, bool):
        return found is value
    if isinstance(value, str):
        return isinstance(found, str) and _plain(found) == _plain(value)
    return bool(found == value)


def _plain(text: str) -> str:
    return IGNORED.sub("", text).lower().replace("'", '"')
