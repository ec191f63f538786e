"""A dense model read tensor by tensor, or piece by piece, with the LoRA adapter of its source applied.

Whole tensors come through mergekit's lazy loader; pieces by their place in the file, so that no tensor has to be held.
Also a source of layers for fusion/layers.py, as an open checkpoint is.
"""

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import torch
from mergekit.common import ModelReference

from fusion.adapter import Adapter
from fusion.checkpoint import read_json
from fusion.errors import UserError
from fusion.headers import PIECE, TensorPlace, parts, read_part, tensor_places
from fusion.sources import ModelSource


def reference_of(path: str) -> ModelReference:
    """mergekit's reference to a folder, whatever characters its path holds."""
    return ModelReference.model_validate({"model": {"path": path}})


class Reader:
    """Tensors of one source by dense name. Raises UserError where its adapter belongs to another base."""

    def __init__(self, source: ModelSource):
        self.source = source
        self.config: dict[str, Any] = read_json(source.folder / "config.json")
        self.adapter = Adapter(source.adapter) if source.adapter else None
        if self.adapter:
            self.adapter.check_targets(self.names())

    def names(self) -> list[str]:
        """The tensor names of the dense checkpoint, without a head that is tied to the embeddings."""
        return [name for name in self._places if name in self]

    def __contains__(self, name: str) -> bool:
        tied = name == "lm_head.weight" and self.config.get("tie_word_embeddings")
        return name in self._places and not tied

    def tensor(self, name: str) -> torch.Tensor:
        """Tensor `name` with the adapter's update. Raises UserError where the checkpoint lacks it."""
        try:
            tensor = self._loader.get_tensor(name)
        except KeyError:
            raise self._lacks(name) from None
        return self.adapter.apply(name, tensor) if self.adapter else tensor

    def place(self, name: str) -> TensorPlace:
        """Where tensor `name` lies, without any adapter. Raises UserError where the checkpoint lacks it."""
        try:
            return self._places[name]
        except KeyError:
            raise self._lacks(name) from None

    def pieces(self, name: str, dtype: torch.dtype | None = None) -> Iterator[torch.Tensor]:
        """Tensor `name` in `dtype` (None: its own), flat, PIECE elements at a time; whole where an adapter changes it.

        Raises UserError where the checkpoint lacks it or its file ends too early.
        """
        place = self.place(name)
        if self.adapter and name in self.adapter.targets:
            yield from self.tensor(name).to(dtype or place.dtype).flatten().split(PIECE)
            return
        yield from (part.to(dtype or place.dtype) for part in parts(place))

    def part(self, name: str, begin: int, end: int) -> torch.Tensor:
        """Elements `begin` to `end` of tensor `name`, flat; all of it is read where an adapter changes it."""
        if self.adapter and name in self.adapter.targets:
            return self.tensor(name).flatten()[begin:end]
        return read_part(self.place(name), begin, end)

    def tensors(self, prefix: str) -> dict[str, torch.Tensor]:
        """All tensors whose names start with `prefix`, under the rest of their names."""
        return {name.removeprefix(prefix): self.tensor(name) for name in self.names() if name.startswith(prefix)}

    @cached_property
    def _loader(self) -> Any:
        return reference_of(str(self.source.folder)).lazy_loader(lazy_unpickle=False)

    @cached_property
    def _places(self) -> dict[str, TensorPlace]:
        return tensor_places(self.source.folder)

    def _lacks(self, name: str) -> UserError:
        return UserError(f"{self.source.folder} has no tensor '{name}', which the anchor has")
