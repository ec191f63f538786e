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
        self._shared, self._anchor, self._experts, self._sparse = shared, anchor, experts, set(sparse)

    def __contains__(self, name: str) -> bool:
        return not is_mlp(name) and name in self._anchor

    def tensor(self, name: str) -> torch.Tensor:
        """The shared tensor `name`."""
        return self._shared.tensor(name)

    def tensors(self, prefix: str) -> dict[str, torch.Tensor]:
        """The tensors of a layer, whose prefix is given, under the rest of their names."""
        found = {}
        for name in (name for name in self._anchor.names() if name.startswith(prefix)):
            if not is_mlp(name):
                found[name] = self._shared.tensor(name)
            elif layer_of(name) in self._sparse:
                found |= {expert_tensor(name, i): reader.tensor(name) for i, reader in enumerate(self._experts)}
            else:
                found[name] = self._anchor.tensor(name)
        return {name.removeprefix(prefix): tensor for name, tensor in found.items()}
