"""Sums over an expert's routing examples, kept so that a ridge gate can be fitted again without them.

    qwen-fusion train-gates RECIPE --method ridge --set gate_training.propagation=labels

Under label-forced propagation what an expert's examples look like at every layer depends on the shared parts and that
expert alone. So their sums stay right when another expert comes or goes: only experts whose weights or rows have
changed are run again. (DUME, 2026, adds up statistics over experts in the same way.) One file an expert in
`<output>/statistics`, hidden² numbers a layer.
"""

import hashlib
import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from fusion.checkpoint import Checkpoint, read_json, written_aside
from fusion.merge import MANIFEST
from fusion.recipe import Recipe
from gate_training.examples import RoutingData
from gate_training.layer_tokens import LayerTokens
from gate_training.methods import Moments, summed


class Statistics:
    """The sums of all experts: those on record, and those that are added layer by layer."""

    def __init__(self, recipe: Recipe, folder: Path, data: RoutingData):
        self._paths = [recipe.folder / "statistics" / f"{expert.name}.safetensors" for expert in recipe.experts]
        self._keys = [_key(folder, data, index) for index in range(len(recipe.experts))]
        self.missing = {i for i, path in enumerate(self._paths) if _key_of(path) != self._keys[i]}
        self._new: dict[int, dict[str, torch.Tensor]] = {index: {} for index in self.missing}

    def add(self, layer: int, tokens: LayerTokens) -> Moments:
        """Takes the sums of `tokens`, of missing experts, at `layer`; returns those of all experts."""
        found = _label_sums(tokens, self.missing)
        for index, path in enumerate(self._paths):
            if index in found:
                self._new[index] |= {f"{layer}.{name}": part for name, part in found[index].items()}
            else:
                with safe_open(path, framework="pt") as file:
                    found[index] = {name: file.get_tensor(f"{layer}.{name}") for name in ("gram", "sum", "count")}
        rows = [found[index] for index in range(len(self._paths))]
        gram = sum((row["gram"].double() for row in rows), torch.zeros(()))
        cross = torch.stack([row["sum"].double() for row in rows], dim=1)  # (hidden, experts)
        return Moments(gram, cross, int(sum(row["count"] for row in rows)))

    def save(self) -> None:
        """Writes the files of the experts that were missing."""
        for index, tensors in self._new.items():
            with written_aside(self._paths[index]) as aside:
                save_file(tensors, aside, {"key": self._keys[index]})


def _label_sums(tokens: LayerTokens, experts: set[int]) -> dict[int, dict[str, torch.Tensor]]:
    """XᵀX `(hidden, hidden)`, Σx `(hidden,)` and the count of each label's tokens, in float32 as kept."""
    sums: dict[int, list[torch.Tensor]] = {expert: [torch.zeros(())] * 3 for expert in sorted(experts)}
    for part in tokens():
        labels = part.targets.argmax(dim=1)
        for expert, so_far in sums.items():
            x = part.inputs[labels == expert]
            found = [(x.T @ x).double(), x.double().sum(dim=0), torch.tensor(float(len(x)), dtype=torch.double)]
            sums[expert] = [total + more.cpu() for total, more in zip(so_far, found, strict=True)]
    return {
        expert: dict(zip(("gram", "sum", "count"), (summed(part).float() for part in found), strict=True))
        for expert, found in sums.items()
    }


def _key(folder: Path, data: RoutingData, index: int) -> str:
    """What the sums of expert `index` depend on."""
    shards: dict[str, str] = read_json(folder / MANIFEST)["sha256"]
    shared = {name: value for name, value in shards.items() if not name.startswith("expert-")}
    rows = [row.ids for row, label in zip(data.train, data.train_labels, strict=True) if label == index]
    digest = hashlib.sha256(json.dumps([shared, rows], sort_keys=True).encode())
    checkpoint = Checkpoint(folder)
    for layer in range(checkpoint.config["num_hidden_layers"]):  # by content: a shard's names change with the number
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
