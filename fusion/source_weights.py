"""The tensors of a model in any part, by their places in its files, with the LoRA adapter of its source applied.

    weights = Weights(ModelSource("math", folder, adapter))
    weights.part("model.norm.weight", 0, 16)

Loads neither mergekit nor a whole tensor (but where an adapter changes it); fusion/reader.py adds whole tensors.
"""

import math
from typing import Any

import torch

from fusion.adapter import Adapter
from fusion.checkpoint import read_json
from fusion.errors import UserError
from fusion.headers import TensorPlace, read_part, tensor_places
from fusion.sources import ModelSource


class Weights:
    """One source's tensors by dense name.

    Raises UserError where a file is missing or broken, or the adapter belongs to another base.
    """

    def __init__(self, source: ModelSource):
        self.source = source
        self.config: dict[str, Any] = read_json(source.folder / "config.json")
        self.places = tensor_places(source.folder)
        self.adapter = Adapter(source.adapter) if source.adapter else None
        if self.adapter:
            self.adapter.check_base({name: self.places[name].shape for name in self.names()})
        self._adapted = ("", torch.empty(0))  # the tensor last read with the adapter's update, flat

    def names(self) -> list[str]:
        """The tensor names of the dense checkpoint, without a head that is tied to the embeddings."""
        return [name for name in self.places if name in self]

    def __contains__(self, name: str) -> bool:
        tied = name == "lm_head.weight" and self.config.get("tie_word_embeddings")
        return name in self.places and not tied

    @property
    def nbytes(self) -> int:
        """The bytes of all its tensors."""
        return sum(self.places[name].nbytes for name in self.names())

    def place(self, name: str) -> TensorPlace:
        """Where tensor `name` lies, without any adapter. Raises UserError where the checkpoint lacks it."""
        try:
            return self.places[name]
        except KeyError:
            raise self.lacks(name) from None

    def part(self, name: str, begin: int, end: int) -> torch.Tensor:
        """Elements `begin` to `end` of tensor `name`, flat, in its own dtype; all of it is read where an adapter
        changes it."""
        place = self.place(name)
        if not self.adapter or name not in self.adapter.targets:
            return read_part(place, begin, end)
        if self._adapted[0] != name:
            weight = read_part(place, 0, math.prod(place.shape)).view(place.shape)
            self._adapted = (name, self.adapter.apply(name, weight).flatten())
        return self._adapted[1][begin:end]

    def lacks(self, name: str) -> UserError:
        """What to raise where there is no tensor `name`."""
        return UserError(f"{self.source.folder} has no tensor '{name}', which the anchor has")
