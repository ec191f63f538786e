"""The ids of a tokenizer's tokens, from its file alone, and whether two of them agree."""

from pathlib import Path

from fusion.checkpoint import read_json


def token_ids(folder: Path) -> dict[str, int] | None:
    """The ids of a tokenizer's tokens, added ones among them; None without a tokenizer.json."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    data = read_json(path)
    found: dict[str, int] = dict(data["model"]["vocab"])
    found.update({token["content"]: token["id"] for token in data.get("added_tokens", [])})
    return found


def other_token(ours: dict[str, int] | None, theirs: dict[str, int] | None) -> str | None:
    """A token to which both vocabularies give an id, and not the same; None also where there is nothing to compare."""
    if ours is None or theirs is None:
        return None
    return next((token for token, number in theirs.items() if ours.get(token, number) != number), None)
