"""Sums over an expert's routing examples, kept so that a ridge gate can be fitted again without them.

    qwen-fusion train-gates RECIPE --method ridge --set gate_training.propagation=labels

Under label-forced propagation what an expert's examples look like at every layer depends on the shared parts and that
expert alone. So their sums stay right when another expert comes or goes: only experts whose weights or rows have
changed are run again. (DUME, 2026, adds up statistics over experts in the same way.) One file an expert and layer in
`<output>/statistics`, hidden² numbers each.
"""

import hashlib
import json
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fusion.architecture import expert_tensor
from fusion.checkpoint import Checkpoint, read_json, written_aside
from fusion.merge import MANIFEST
from fusion.recipe import Recipe
from gate_training.examples import RoutingData
from gate_training.layer_tokens import LayerTokens
from gate_training.methods import Moments, summed


class Statistics:
    """The sums of all experts: those on record, and those that are added layer by layer."""

    def __init__(self, recipe: Recipe, folder: Path, data: RoutingData):
        self._folders = [recipe.folder / "statistics" / expert.name for expert in recipe.experts]
        checkpoint = Checkpoint(folder)
        first = [expert_tensor(f"model.layers.{i}.mlp.gate_proj.weight", 0) for i in range(_layers(checkpoint))]
        sparse = [layer for layer, name in enumerate(first) if name in checkpoint]
        found: list[list[str]] = [[]]
        if PartialState().is_main_process:
            found = [[_key(checkpoint, folder, data, index) for index in range(len(recipe.experts))]]
        self._keys: list[str] = broadcast_object_list(found)[0]
        self.missing = {
            index
            for index, key in enumerate(self._keys)
            if any(_key_of(self._path(index, layer)) != key for layer in sparse)
        }
        PartialState().wait_for_everyone()  # before anyone writes

    def _path(self, index: int, layer: int) -> Path:
        return self._folders[index] / f"{layer}.safetensors"

    def add(self, layer: int, tokens: LayerTokens) -> Moments:
        """Takes and keeps the sums of `tokens`, of missing experts, at `layer`; returns those of all experts."""
        found = _label_sums(tokens, self.missing)
        if PartialState().is_main_process:
            for index, sums in found.items():
                with written_aside(self._path(index, layer)) as aside:
                    save_file(sums, aside, {"key": self._keys[index]})
        total: Moments | None = None
        for index in range(len(self._keys)):
            sums = found[index] if index in found else load_file(self._path(index, layer))
            cross = torch.zeros(len(sums["sum"]), len(self._keys), dtype=torch.double)
            cross[:, index] = sums["sum"]
            mine = Moments(sums["gram"], cross, int(sums["count"]))
            total = mine if total is None else total + mine
        assert total is not None
        return total


def _label_sums(tokens: LayerTokens, experts: set[int]) -> dict[int, dict[str, torch.Tensor]]:
    """XᵀX `(hidden, hidden)`, Σx `(hidden,)` and the count of each label's tokens, in float64."""
    names = {"gram": (tokens.hidden, tokens.hidden), "sum": (tokens.hidden,), "count": ()}
    sums = {e: {n: torch.zeros(shape, dtype=torch.double) for n, shape in names.items()} for e in sorted(experts)}
    for part in tokens():
        labels = part.targets.argmax(dim=1)
        for expert, total in sums.items():
            x = part.inputs[labels == expert]
            total["gram"] += (x.T @ x).double().cpu()
            total["sum"] += x.double().sum(dim=0).cpu()
            total["count"] += len(x)
    return {expert: {name: summed(part) for name, part in total.items()} for expert, total in sums.items()}


def _layers(checkpoint: Checkpoint) -> int:
    count: int = checkpoint.config["num_hidden_layers"]
    return count


def _key(checkpoint: Checkpoint, folder: Path, data: RoutingData, index: int) -> str:
    """What the sums of expert `index` depend on."""
    shards: dict[str, str] = read_json(folder / MANIFEST)["sha256"]
    shared = {name: value for name, value in shards.items() if not name.startswith("expert-")}
    rows = [row.ids for row, label in zip(data.train, data.train_labels, strict=True) if label == index]
    digest = hashlib.sha256(json.dumps([shared, rows], sort_keys=True).encode())
    for layer in range(_layers(checkpoint)):  # by content: a shard's names change with the expert's number
        for name, tensor in sorted(checkpoint.tensors(f"model.layers.{layer}.mlp.experts.{index}.").items()):
            digest.update(name.encode())
            digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _key_of(path: Path) -> str | None:
    """The key of the sums in a file, None where there is none."""
    if not path.is_file():
        return None
    with safe_open(path, framework="pt") as file:
        return (file.metadata() or {}).get("key")
