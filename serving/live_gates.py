"""vLLM worker extension: the gates of a checkpoint that has been trained on go into the loaded model.

    --worker-extension-cls=serving.live_gates.LiveGates    (with VLLM_SERVER_DEV_MODE=1)

Each worker holds every gate whole, at any tensor parallelism. A weight that still holds data is overwritten where it
is, so that CUDA graphs go on reading it; vLLM's CPU build has repacked it after loading and emptied it, so that it
gets a new one, which is repacked again. serving/swap.py calls these methods. They raise nothing: of several workers
that raise, vLLM reads one answer and takes the others for those to its next calls.
"""

import hashlib
from pathlib import Path
from typing import Any

MODEL_GATE = ".mlp.gate"
SUFFIX = ".weight"


class LiveGates:
    """What vLLM's worker class inherits as well; its public methods answer /collective_rpc."""

    model_runner: Any
    _replaced: list[tuple[Any, Any, Any, Any]]

    def load_gates(self, file: str) -> dict[str, Any]:
        """Puts the tensors of a gate shard into the model; returns how many, and the SHA-256 of the file as read.

        Where that fails, `error` says why; a shard that is not one of this model changes nothing.
        """
        import torch
        from safetensors.torch import load

        self._replaced = []
        try:
            content = Path(file).read_bytes()
            maps = dict(self.model_runner.get_model().named_modules())
            rows = {name.removesuffix(SUFFIX): tensor for name, tensor in load(content).items()}
            _check(maps, {name: tuple(tensor.shape) for name, tensor in rows.items()}, file)
            with torch.no_grad():
                for name, tensor in rows.items():
                    self._replace(maps[name], tensor)
        except Exception as error:
            return {"error": str(error)}
        return {"tensors": len(rows), "sha256": hashlib.sha256(content).hexdigest()}

    def put_back_gates(self) -> None:
        """Undoes the last `load_gates`; nothing where that has changed nothing."""
        for linear, weight, held, packed in getattr(self, "_replaced", []):
            weight.data.copy_(held)
            linear.weight = weight
            if packed is not None:
                linear.cpu_linear = packed
        self._replaced = []

    def _replace(self, linear: Any, tensor: Any) -> None:
        """`tensor` `(out, in)`, in any dtype, becomes the weight of one of vLLM's linear maps."""
        from torch.nn import Parameter

        weight = linear.weight
        self._replaced.append((linear, weight, weight.detach().clone(), getattr(linear, "cpu_linear", None)))
        if weight.numel():
            weight.data.copy_(tensor)
        else:
            linear.weight = Parameter(tensor.to(weight.device, weight.dtype), requires_grad=False)
        linear.quant_method.process_weights_after_loading(linear)


def _check(maps: dict[str, Any], shapes: dict[str, tuple[int, ...]], file: str) -> None:
    """Raises ValueError unless a shard has all gates of the model, and nothing but linear maps of it in their shape."""
    missing = [name for name in maps if name.endswith(MODEL_GATE) and name not in shapes]
    if missing:
        raise ValueError(f"{file} lacks {missing[0]}, which the model has")
    for name, shape in shapes.items():
        if name not in maps:
            raise ValueError(f"{file} holds {name}, which the model lacks")
        wanted = (maps[name].output_size, maps[name].input_size)
        if shape != wanted:
            raise ValueError(f"{name} is {shape} in {file}, {wanted} in the model")
