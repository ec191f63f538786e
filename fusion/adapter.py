"""LoRA adapters applied tensor by tensor while reading: W + scale * B A (Hu et al. 2021, arXiv:2106.09685).

mergekit's MoE path fails on `base+adapter`, and merging with PEFT would load the whole model.
"""

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from fusion.checkpoint import open_safetensors, read_json
from fusion.errors import UserError
from fusion.headers import read_header

_PREFIX = "base_model.model."


class Adapter:
    """A PEFT LoRA folder. Raises UserError for what is not plain LoRA on linear layers."""

    def __init__(self, folder: Path):
        config = read_json(folder / "adapter_config.json")
        if config.get("peft_type") != "LORA" or config.get("use_dora") or config.get("fan_in_fan_out"):
            raise UserError(f"{folder} is no plain LoRA adapter: merge it with PEFT first and name the merged model")
        if config.get("modules_to_save") or config.get("bias", "none") != "none":
            raise UserError(f"{folder} carries full modules or biases beside its LoRA: merge it with PEFT first")
        path = folder / "adapter_model.safetensors"
        if not path.is_file():
            raise UserError(f"{folder} holds no adapter_model.safetensors: pickled adapters are not read")
        self.folder = folder
        self._config = config
        self._file = open_safetensors(path)
        self._header = read_header(path)
        names = list(self._header)
        self.targets = {
            name.removeprefix(_PREFIX).replace(".lora_A.weight", ".weight")
            for name in names
            if name.endswith(".lora_A.weight")
        }
        pairs = {_PREFIX + t.removesuffix(".weight") + f".lora_{side}.weight" for t in self.targets for side in "AB"}
        if missing := sorted(pairs - set(names)):
            raise UserError(f"{folder} holds no {missing[0]}: save the adapter again")
        flat = (name for name in pairs if len(self._header[name].shape) != 2)
        if odd := next((name for name in names if name not in pairs), next(flat, None)):
            raise UserError(f"{folder} holds {odd}, which is no LoRA on a linear layer: merge it with PEFT first")

    def check_targets(self, names: Iterable[str]) -> None:
        """Raises UserError where the adapter changes a tensor that is not among the base's `names`."""
        missing = sorted(self.targets - set(names))
        if missing:
            raise UserError(
                f"{self.folder} changes {missing[0]}, which its base model lacks: it belongs to another base"
            )

    @property
    def base(self) -> str:
        """The model that it was made for, as whoever made it named it."""
        return str(self._config.get("base_model_name_or_path") or "")

    def shape(self, name: str) -> tuple[int, int]:
        """The shape of tensor `name` in the base that the adapter was made for, `(out, in)`, from the header alone."""
        stem = _PREFIX + name.removesuffix(".weight")
        up, down = (self._header[f"{stem}.lora_{side}.weight"].shape for side in "BA")
        return up[0], down[1]

    def check_base(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raises UserError where the adapter changes what is not among the base's tensors, or is of another shape.

        `shapes`: {name: shape} of the base. No weights are read.
        """
        self.check_targets(shapes)
        for name in sorted(self.targets):
            if self.shape(name) != tuple(shapes[name]):
                raise UserError(self._misfit(name, shapes[name]))

    def apply(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """`weight`, `(out, in)`, of tensor `name` with its update added, in its own dtype; itself where there is none.

        Raises UserError where the adapter was made for another shape.
        """
        if name not in self.targets:
            return weight
        stem = _PREFIX + name.removesuffix(".weight")
        down = self._file.get_tensor(f"{stem}.lora_A.weight").float()  # (rank, in)
        up = self._file.get_tensor(f"{stem}.lora_B.weight").float()  # (out, rank)
        if self.shape(name) != tuple(weight.shape):
            raise UserError(self._misfit(name, weight.shape))
        return (weight.float() + self._scale(name, down.shape[0]) * (up @ down)).to(weight.dtype)

    def _misfit(self, name: str, shape: Iterable[int]) -> str:
        return (
            f"{self.folder}: the update of {name} is {self.shape(name)}, the base model's tensor {tuple(shape)}: the "
            "adapter belongs to another base"
        )

    def _scale(self, name: str, rank: int) -> float:
        """lora_alpha / rank, or / sqrt(rank) for rsLoRA; PEFT's alpha_pattern is a regular expression, first match."""
        module = name.removesuffix(".weight")
        patterns = self._config.get("alpha_pattern") or {}
        own = (float(alpha) for key, alpha in patterns.items() if re.match(rf"(.*\.)?({key})$", module))
        alpha = next(own, float(self._config["lora_alpha"]))
        return alpha / (math.sqrt(rank) if self._config.get("use_rslora") else rank)
