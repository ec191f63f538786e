"""The fused model that a merge would write, read from where its parts lie now.

Label-forced routing needs no gates, so shared parts can be tried before anything is merged.
"""

from collections.abc import Collection, Sequence
from typing import Any

import torch

from fusion.architecture import expert_tensor, is_mlp, layer_of
from fusion.layers import Source
from fusion.reader import Reader


class Grafted:
    """A source of layers: attention, norms, embeddings and head of `shared`, the MLPs of `experts` in `sparse` layers.

    The other layers' MLPs are those of `anchor`.
    """

    def __init__(self, shared: Source, anchor: Reader, experts: Sequence[Reader], sparse: Collection[int]):
        self.config: dict[str, Any] = anchor.config

        self._where: dict[str, tuple[Source, str]] = {}  # of every tensor: who has it, under which name
        for name in anchor.names():
            if not is_mlp(name):
                self._where[name] = shared, name
            elif layer_of(name) in sparse:
                self._where |= {expert_tensor(name, i): (reader, name) for i, reader in enumerate(experts)}
            else:
                self._where[name] = anchor, name

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor `name` of the fused model."""
        source, there = self._where[name]
        return source.tensor(there)

    def tensors(self, prefix: str) -> dict[str, torch.Tensor]:
        """All tensors whose names start with `prefix`, under the rest of their names."""
        return {name.removeprefix(prefix): self.tensor(name) for name in self._where if name.startswith(prefix)}
