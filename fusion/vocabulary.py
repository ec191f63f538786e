"""A tokenizer's tokens, from its files alone, and whether those of two models agree."""

import filecmp
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson  # tokenizer.json is megabytes

from fusion.checkpoint import read_json
from fusion.errors import UserError

CHATML = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")


@dataclass(frozen=True)
class Tokens:
    """What decides which ids a text becomes: ids by token, those of added tokens among them, and how text is split."""

    ids: dict[str, int]
    added: dict[str, int]
    merges: list[Any]  # in their order: pairs, or both in one string
    splitting: dict[str, Any]  # normalizer and pre-tokenizer; empty where only vocab.json is there

    def same_merges(self, other: "Tokens") -> bool:
        """Whether both merge the same pairs in the same order, in whichever spelling."""
        return self.merges == other.merges or list(map(_pair, self.merges)) == list(map(_pair, other.merges))


def read_tokens(folder: Path) -> Tokens | None:
    """The tokens of the tokenizer in `folder`, of tokenizer.json or of vocab.json and merges.txt; None without them.

    Raises UserError where a file is broken.
    """
    path = folder / "tokenizer.json"
    if path.is_file():
        try:
            data = orjson.loads(path.read_bytes())
            ids: dict[str, int] = dict(data["model"]["vocab"])
            added = {token["content"]: token["id"] for token in data.get("added_tokens", [])}
            merges = data["model"].get("merges", [])
            splitting = {part: data.get(part) for part in ("normalizer", "pre_tokenizer")}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} cannot be read ({error}): download the tokenizer again") from error
        return Tokens({**ids, **added}, added, merges, splitting)
    if not (folder / "vocab.json").is_file():
        return None
    settings = folder / "tokenizer_config.json"
    listed = read_json(settings).get("added_tokens_decoder", {}) if settings.is_file() else {}
    added = {token["content"]: int(number) for number, token in listed.items()}
    text = (folder / "merges.txt").read_text(encoding="utf-8") if (folder / "merges.txt").is_file() else ""
    merges = [line for line in text.splitlines() if line and not line.startswith("#version")]
    return Tokens({**read_json(folder / "vocab.json"), **added}, added, merges, {})


def same_file(ours: Path, theirs: Path) -> bool:
    """Whether two models' tokenizer.json is the same to the byte: then nothing has to be parsed."""
    one, two = ours / "tokenizer.json", theirs / "tokenizer.json"
    return one.is_file() and two.is_file() and filecmp.cmp(one, two, shallow=False)


def token_ids(folder: Path) -> dict[str, int] | None:
    """The ids of a tokenizer's tokens, added ones among them; None without a tokenizer."""
    tokens = read_tokens(folder)
    return tokens.ids if tokens else None


def other_token(ours: Mapping[str, int] | None, theirs: Mapping[str, int] | None) -> str | None:
    """A token to which both vocabularies give an id, and not the same; None also where there is nothing to compare.

    One of ChatML's where it is among them.
    """
    if ours is None or theirs is None or ours == theirs:  # equality is many times as fast
        return None
    first = [token for token in CHATML if token in theirs]
    return next((token for token in [*first, *theirs] if ours.get(token, theirs[token]) != theirs[token]), None)


def _pair(merge: Any) -> tuple[str, ...]:
    return tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge)
