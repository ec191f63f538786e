"""Sums over an expert's routing examples, kept so that a ridge gate can be fitted again without them.

    qwen-fusion train-gates RECIPE --method ridge --set gate_training.propagation=labels

Under label-forced propagation what an expert's examples look like at every layer depends on the shared parts and that
expert alone. So their sums stay right when another expert comes or goes, and new examples (feedback) are added to them:
only examples that the sums lack are run, all of an expert's where its weights have changed or an example is gone.
(DUME, 2026, adds up statistics over experts in the same way.) One file an expert and layer in `<output>/statistics`,
hidden² numbers each; a fit that is interrupted leaves those of before.
"""

import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fusion.architecture import MANIFEST, expert_tensor
from fusion.checkpoint import Checkpoint, read_json, written_aside
from fusion.recipe import Recipe
from gate_training.examples import RoutingData
from gate_training.layer_tokens import LayerTokens
from gate_training.methods.tokens import Moments, summed


@dataclass(frozen=True)
class _Sums:
    """What one expert's sums are of: its weights and the shared ones, by `key`; its examples, a hash of each."""

    key: str
    rows: tuple[str, ...]


class Statistics:
    """The sums of all experts: those on record, and those that are added layer by layer.

    `missing` are the training examples, by number, that the sums on record lack.
    """

    def __init__(self, recipe: Recipe, folder: Path, data: RoutingData):
        self._folders = [recipe.folder / "statistics" / expert.name for expert in recipe.experts]
        checkpoint = Checkpoint(folder)
        first = [expert_tensor(f"model.layers.{i}.mlp.gate_proj.weight", 0) for i in range(_layers(checkpoint))]
        self._sparse = [layer for layer, name in enumerate(first) if name in checkpoint]
        found: list[list[str]] = [[]]
        if PartialState().is_main_process:
            found = [[_key(checkpoint, folder, index) for index in range(len(recipe.experts))]]
        keys: list[str] = broadcast_object_list(found)[0]
        self._wanted: list[_Sums] = []
        self._on_record: set[int] = set()  # experts whose sums of before count
        self.missing: set[int] = set()
        for index, key in enumerate(keys):
            mine = {i: _row_hash(row.ids) for i, row in enumerate(data.train) if data.train_labels[i] == index}
            self._wanted.append(_Sums(key, tuple(sorted(mine.values()))))
            rows = Counter(mine.values())
            kept = {_on_file(self._path(index, layer)) for layer in self._sparse}
            old = kept.pop() if len(kept) == 1 else None
            if old is not None and old.key == key and Counter(old.rows) <= rows:
                self._on_record.add(index)
                rows -= Counter(old.rows)
            for i, digest in mine.items():
                if rows[digest]:
                    rows[digest] -= 1
                    self.missing.add(i)
        self._growing = {data.train_labels[i] for i in self.missing}
        PartialState().wait_for_everyone()  # before anyone writes

    def _path(self, index: int, layer: int, new: bool = False) -> Path:
        return self._folders[index] / f"{layer}{'.new' if new else ''}.safetensors"

    def add(self, layer: int, tokens: LayerTokens) -> Moments:
        """Adds the sums of `tokens`, of missing examples, at `layer`; returns those of all experts."""
        added = _label_sums(tokens, self._growing)
        total: Moments | None = None
        for index in range(len(self._folders)):
            parts = [added[index]] if index in added else []
            if index in self._on_record:
                parts.append(load_file(self._path(index, layer)))
            sums = {name: torch.stack([part[name] for part in parts]).sum(dim=0) for name in parts[0]}
            if index in added and PartialState().is_main_process:
                wanted = self._wanted[index]
                with written_aside(self._path(index, layer, new=True)) as aside:
                    save_file(sums, aside, {"key": wanted.key, "rows": json.dumps(wanted.rows)})
            cross = torch.zeros(len(sums["sum"]), len(self._folders), dtype=torch.double)
            cross[:, index] = sums["sum"]
            mine = Moments(sums["gram"], cross, int(sums["count"]))
            total = mine if total is None else total + mine
        assert total is not None
        return total

    def keep(self) -> None:
        """Puts the sums of all layers in the place of those on record."""
        if PartialState().is_main_process:
            for index in self._growing:
                for layer in self._sparse:
                    self._path(index, layer, new=True).replace(self._path(index, layer))


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


def _key(checkpoint: Checkpoint, folder: Path, index: int) -> str:
    """What the sums of expert `index` depend on besides its examples."""
    shards: dict[str, str] = read_json(folder / MANIFEST)["sha256"]
    shared = {name: value for name, value in shards.items() if not name.startswith("expert-")}
    digest = hashlib.sha256(json.dumps(shared, sort_keys=True).encode())
    for layer in range(_layers(checkpoint)):  # by content: a shard's names change with the expert's number
        for name, tensor in sorted(checkpoint.tensors(f"model.layers.{layer}.mlp.experts.{index}.").items()):
            digest.update(name.encode())
            digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _row_hash(ids: list[int]) -> str:
    return hashlib.sha256(repr(ids).encode()).hexdigest()[:16]


def _on_file(path: Path) -> _Sums | None:
    """What the sums in a file are of, None where there is none."""
    if not path.is_file():
        return None
    with safe_open(path, framework="pt") as file:
        noted = file.metadata() or {}
    return _Sums(noted["key"], tuple(json.loads(noted["rows"]))) if "rows" in noted else None
