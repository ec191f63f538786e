"""What is known of a recipe's models before anything is loaded: by their folders, recorded facts, or the hub.

describe("expert 'math'", "Qwen/Qwen2.5-Math-7B-Instruct").config["rope_theta"]
"""

from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import yaml

from fusion.checkpoint import read_json
from fusion.errors import UserError
from fusion.hub import hub_config, is_hub_id, resolve_model
from fusion.plan.findings import Finding
from fusion.recipe import Recipe
from fusion.sections.training import DEMO_ROPE_THETA
from fusion.sources import trained_anchor

SHAPES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)


@dataclass(frozen=True)
class Described:
    """One model: its config, whence that comes, and its folder where it is on this machine."""

    name: str  # the `where` of findings on it
    config: dict[str, Any]
    folder: Path | None
    model: str = ""  # as the recipe names it
    origin: Literal["folder", "recorded", "hub", "recipe"] = "folder"

    def source(self) -> Finding | None:
        """A note of what was planned from where the model is not on this machine."""
        if self.origin == "recorded":
            facts = f"planned from recorded facts of {self.model}"
        elif self.origin == "hub":
            facts = f"planned from the config of {self.model} on the hub"
        else:
            return None
        why = "the model is not on this machine, so that its tensors, tokenizer and chat template were not compared"
        return Finding("note", self.name, facts, why, "download it, and plan again")


@dataclass(frozen=True)
class Known:
    """Recorded facts of a hub model; `instead` names the one to use where this one fits nothing, `because` says why."""

    config: dict[str, Any] | None = None
    license: str | None = None
    instead: str | None = None
    because: str | None = None


@cache
def known_models() -> dict[str, Known]:
    """Recorded facts by hub id (known_models.yaml)."""
    text = files("fusion.plan").joinpath("known_models.yaml").read_text(encoding="utf-8")
    return {name: Known(**facts) for name, facts in yaml.safe_load(text)["models"].items()}


def known(model: str) -> Known:
    """The recorded facts of a model by its hub id, in any case of letters, or by a folder that is called so."""
    names = {name.lower(): facts for name, facts in known_models().items()}
    names |= {name.split("/")[-1]: facts for name, facts in names.items()}
    return names.get(model.lower()) or names.get(Path(model).name.lower()) or Known()


def describe(name: str, model: str | Path) -> Described:
    """A model by its folder, the hub cache, the recorded facts, or its config on the hub.

    Raises UserError where none of them has it.
    """
    text = str(model)
    try:
        folder = model if isinstance(model, Path) else resolve_model(model, allow_download=False)
    except UserError:
        if not is_hub_id(text):
            raise
        if config := known(text).config:
            return Described(name, config, None, text, "recorded")
        return Described(name, hub_config(text), None, text, "hub")
    config = read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise UserError(f"{folder / 'config.json'} holds no model config: name a complete model folder")
    return Described(name, config, folder, text)


def describe_anchor(recipe: Recipe, trained: bool = False) -> Described:
    """The anchor; one that the recipe trains is read once it is `trained`, and until then its `pretrain` section.

    What an older run has left may be another anchor's, and will be trained again.
    """
    if recipe.anchor.model:
        return describe("anchor", recipe.anchor.model)
    folder = trained_anchor(recipe)
    if trained and (folder / "config.json").is_file():
        return describe("anchor", folder)
    assert recipe.anchor.pretrain is not None
    settings = recipe.anchor.pretrain
    config = {name: getattr(settings, name) for name in (*SHAPES, "max_position_embeddings")}
    extras = {"model_type": "qwen2", "rope_theta": DEMO_ROPE_THETA, "rms_norm_eps": 1e-6, "tie_word_embeddings": True}
    return Described("anchor", {**config, **extras, "torch_dtype": "float32"}, None, origin="recipe")
