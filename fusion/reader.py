"""A dense model read tensor by tensor, or piece by piece, with the LoRA adapter of its source applied.

Whole tensors come through mergekit's lazy loader; pieces by their place in the file, as in fusion/source_weights.py, so
that no tensor has to be held. Also a source of layers for fusion/layers.py, as an open checkpoint is.
"""

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import torch
from mergekit.common import ModelReference

from fusion.headers import PIECE, parts
from fusion.source_weights import Weights


def reference_of(path: str) -> ModelReference:
    """mergekit's reference to a folder, whatever characters its path holds."""
    return ModelReference.model_validate({"model": {"path": path}})


class Reader(Weights):
    """Tensors of one source by dense name. Raises UserError where its adapter belongs to another base."""

    def tensor(self, name: str) -> torch.Tensor:
        """Tensor `name` with the adapter's update. Raises UserError where the checkpoint lacks it."""
        try:
            tensor = self._loader.get_tensor(name)
        except KeyError:
            raise self.lacks(name) from None
        return self.adapter.apply(name, tensor) if self.adapter else tensor

    def pieces(self, name: str, dtype: torch.dtype | None = None) -> Iterator[torch.Tensor]:
        """Tensor `name` in `dtype` (None: its own), flat, PIECE elements at a time; whole where an adapter changes it.

        Raises UserError where the checkpoint lacks it or its file ends too early.
        """
        place = self.place(name)
        if self.adapter and name in self.adapter.targets:
            yield from self.tensor(name).to(dtype or place.dtype).flatten().split(PIECE)
            return
        yield from (part.to(dtype or place.dtype) for part in parts(place))

    def tensors(self, prefix: str) -> dict[str, torch.Tensor]:
        """All tensors whose names start with `prefix`, under the rest of their names."""
        return {name.removeprefix(prefix): self.tensor(name) for name in self.names() if name.startswith(prefix)}

    @cached_property
    def _loader(self) -> Any:
        return reference_of(str(self.source.folder)).lazy_loader(lazy_unpickle=False)
