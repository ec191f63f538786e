"""JSON bodies of requests and answers, no digit lost: read by Python's parser, written by orjson where it can.

python -c "from serving.guard.bodies import decoded, encoded; print(encoded(decoded(b'[123456789012345678901]')))"
"""

import json
from typing import Any

import orjson


def decoded(body: bytes) -> Any:
    """The value of a JSON text. Raises ValueError or RecursionError where it is none."""
    return json.loads(body)


def object_of(body: bytes) -> dict[str, Any] | None:
    """The object of a JSON text; None where it is none, or one nested too deeply."""
    try:
        found = decoded(body)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def encoded(value: Any) -> bytes:
    """The JSON text of a value."""
    try:
        return orjson.dumps(value)
    except orjson.JSONEncodeError:  # an integer beyond 64 bits, a lone surrogate, more than 254 levels
        return json.dumps(value).encode()
