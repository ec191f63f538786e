"""What the preflight's tests share: a recipe of the anchor and one other model, and what is found on it."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from fusion.checkpoint import read_json, write_json
from fusion.plan.findings import Finding
from fusion.plan.preflight import check
from tests.recipes import make_recipe


def findings(folder: Path, anchor: Path, other: Path, **sections: Any) -> list[Finding]:
    """The findings on a recipe whose expert `math` is the model `other`."""
    return check(make_recipe(folder, anchor, {"general": anchor, "math": other}, **sections))


def errors(found: list[Finding]) -> list[str]:
    return [finding.sentence() for finding in found if finding.severity == "error"]


def change_config(folder: Path, **changes: Any) -> None:
    """Changes the config; None takes a key away."""
    config = {**read_json(folder / "config.json"), **changes}
    write_json(folder / "config.json", {key: value for key, value in config.items() if value is not None})


def change_tensors(folder: Path, change: Any) -> None:
    """Changes the tensors by a function of name and tensor, which gives the new one or None to leave it out."""
    path = folder / "model.safetensors"
    changed = {name: change(name, tensor) for name, tensor in load_file(path).items()}
    save_file({name: tensor for name, tensor in changed.items() if tensor is not None}, path, {"format": "pt"})


def change_tokenizer(folder: Path, change: Any) -> None:
    """Changes tokenizer.json by a function of its content."""
    path = folder / "tokenizer.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    change(data)
    path.write_text(json.dumps(data), encoding="utf-8")
