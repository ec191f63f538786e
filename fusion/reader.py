"""A dense model read tensor by tensor: mergekit's lazy loader, with the LoRA adapter of its source applied.

Also a source of layers for fusion/layers.py, as an open checkpoint is.
"""

from typing import Any

import torch
from mergekit.common import ModelReference

from fusion.adapter import Adapter
from fusion.checkpoint import read_json
from fusion.errors import UserError
from fusion.sources import ModelSource


def reference_of(path: str) -> ModelReference:
    """mergekit's reference to a folder, whatever characters its path holds."""
    return ModelReference.model_validate({"model": {"path": path}})


class Reader:
    """Tensors of one source by dense name. Raises UserError where its adapter belongs to another base."""

    def __init__(self, source: ModelSource):
        self.source = source
        self.config: dict[str, Any] = read_json(source.folder / "config.json")
        self.loader = reference_of(str(source.folder)).lazy_loader(lazy_unpickle=False)
        self.adapter = Adapter(source.adapter) if source.adapter else None
        if self.adapter:
            self.adapter.check_targets(self.names())

    def names(self) -> list[str]:
        """The tensor names of the dense checkpoint, without a head that is tied to the embeddings."""
        tied = self.config.get("tie_word_embeddings")
        return [name for name in self.loader.index.tensor_paths if not (tied and name == "lm_head.weight")]

    def __contains__(self, name: str) -> bool:
        return name in self.names()

    def tensor(self, name: str) -> torch.Tensor:
        """Tensor `name` with the adapter's update. Raises UserError where the checkpoint lacks it."""
        try:
            tensor = self.loader.get_tensor(name)
        except KeyError:
            raise UserError(f"{self.source.folder} has no tensor '{name}', which the anchor has") from None
        return self.adapter.apply(name, tensor) if self.adapter else tensor

    def tensors(self, prefix: str) -> dict[str, torch.Tensor]:
        """All tensors whose names start with `prefix`, under the rest of their names."""
        return {name.removeprefix(prefix): self.tensor(name) for name in self.names() if name.startswith(prefix)}
