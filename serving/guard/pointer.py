"""JSON pointers (RFC 6901): a part written, a reference within a document followed, every object of it gone through.

python -c "from serving.guard.pointer import pointed; print(pointed('#/a/0', {'a': [1]}))"
"""

from collections.abc import Iterator
from typing import Any


def escaped(part: str) -> str:
    """One part of a pointer."""
    return part.replace("~", "~0").replace("/", "~1")


def pointed(reference: Any, root: Any) -> Any:
    """What a reference `#/...` points to within `root`; None where it points elsewhere, or to nothing."""
    if not isinstance(reference, str) or not reference.startswith("#"):
        return None
    found = root
    for part in reference[1:].split("/")[1:]:
        name = part.replace("~1", "/").replace("~0", "~")
        if isinstance(found, dict):
            found = found.get(name)
        elif isinstance(found, list) and name.isdecimal() and len(name) < 10 and int(name) < len(found):
            found = found[int(name)]
        else:
            return None
    return found


def objects(value: Any) -> Iterator[dict[str, Any]]:
    """Every object in a JSON value."""
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, dict):
            yield item
            pending += item.values()
        elif isinstance(item, list):
            pending += item
