"""What recording has to know: where to keep records, and of the model what its domains, experts and layers are.

recording(load_recipe("configs/demo.yaml"))
"""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fusion.errors import UserError
from fusion.recipe import Recipe
from fusion.sections.data import Domain
from fusion.sections.serving import Records
from serving.engine import model_config

URL_VARIABLE = "QWEN_FUSION_RECORDS_URL"  # an address with a password has no place in a recipe


@dataclass(frozen=True)
class Recording:
    """Where and how records are kept. `expert_of` names each domain's expert; `classifier` says whether the recipe
    labels by one, which the background pass hears."""

    url: str = field(repr=False)
    settings: Records
    domains: dict[str, Domain] = field(default_factory=dict)
    experts: tuple[str, ...] = ()
    expert_of: dict[str, str] = field(default_factory=dict)
    sparse_layers: tuple[int, ...] = ()
    classifier: bool = False


def store_url(recipe: Recipe) -> str:
    """The address of a recipe's records: of the environment, the recipe, or SQLite in its output folder."""
    records = recipe.serving.guard.records or Records()
    found = os.environ.get(URL_VARIABLE) or records.url
    return found or f"sqlite:///{recipe.folder.absolute() / 'records.sqlite'}"


def recording(recipe: Recipe, folder: Path) -> Recording:
    """How the requests of a recipe's server are recorded, whose checkpoint is in `folder`."""
    return Recording(
        url=store_url(recipe),
        settings=recipe.serving.guard.records or Records(),
        domains=dict(recipe.domains),
        experts=tuple(expert.name for expert in recipe.experts),
        expert_of=recipe.expert_names(),
        classifier=recipe.gate_training.labels in ("classifier", "combined"),
        sparse_layers=_sparse_layers(model_config(str(folder))),
    )


def recording_alone(records: Records | None) -> Recording | None:
    """How a guard without a recipe records, which knows no domains. Raises UserError where nobody says where to."""
    if records is None:
        return None
    url = os.environ.get(URL_VARIABLE) or records.url
    if not url:
        raise UserError("records have no place: give records.url, for example sqlite:////var/lib/guard/records.sqlite")
    return Recording(url, records)


def _sparse_layers(config: dict[str, Any]) -> tuple[int, ...]:
    """The layers that have experts, by transformers' rule for Qwen2MoE."""
    dense, step = config.get("mlp_only_layers") or (), config.get("decoder_sparse_step") or 1
    layers = range(config["num_hidden_layers"])
    return tuple(layer for layer in layers if layer not in dense and (layer + 1) % step == 0)
