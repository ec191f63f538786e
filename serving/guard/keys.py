"""API keys: who may ask. Several at a time, compared in constant time, from a file or the environment.

QWEN_FUSION_API_KEYS=first,second qwen-fusion serve configs/demo.yaml
"""

import hashlib
import hmac
import os
from collections.abc import Iterable
from pathlib import Path

from fusion.errors import UserError

VARIABLE = "QWEN_FUSION_API_KEYS"
OPERATOR_VARIABLE = "QWEN_FUSION_OPERATOR_KEYS"  # of those who may see what was recorded of others
UPSTREAM_VARIABLE = "QWEN_FUSION_UPSTREAM_KEY"  # the key that the engine itself wants


class Keys:
    """The hashes of all keys; without any everyone may ask."""

    def __init__(self, keys: Iterable[str] = ()) -> None:
        self._hashes = [_hash(key.encode()) for key in keys]

    def __bool__(self) -> bool:
        return bool(self._hashes)

    def number(self, authorization: bytes | None) -> int | None:
        """Which key an Authorization header's bearer token is, from 1; None where it is none.

        Every key is compared, wherever one fits.
        """
        kind, _, token = (authorization or b"").partition(b" ")
        given = _hash(token.strip())
        fits = [place for place, known in enumerate(self._hashes, 1) if hmac.compare_digest(given, known)]
        return fits[0] if fits and kind.lower() == b"bearer" else None


def owner_of(authorization: bytes | None) -> str:
    """What stands for a bearer token where records say whose they are: the beginning of its hash."""
    return _hash((authorization or b"").partition(b" ")[2].strip()).hex()[:16]


def read_keys(file: str | None, variable: str = VARIABLE) -> tuple[str, ...]:
    """The keys of a file, one a line (lines with # say whose they are), and of the environment's `variable`.

    Raises UserError where the file is missing or has none.
    """
    found = [key.strip() for key in os.environ.get(variable, "").split(",") if key.strip()]
    if file is not None:
        path = Path(file).expanduser()
        if not path.is_file():
            raise UserError(f"{path} is no file of API keys: create it with one key a line")
        try:
            lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"the file of API keys {path} cannot be read ({error}): write one key a line") from None
        keys = [line for line in lines if line and not line.startswith("#")]
        if not keys:
            raise UserError(f"the file of API keys {path} has none: write one a line")
        found += keys
    return tuple(found)


def _hash(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
