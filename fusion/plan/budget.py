"""What the fused model weighs: parameters, active parameters, bytes on disk and per card, KV cache a token."""

from dataclasses import asdict, dataclass
from typing import Any

from fusion.architecture import fused_config
from fusion.recipe import Recipe

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Budget:
    """Sizes of the fused model, bytes in the checkpoint's dtype; a card is one of the tensor-parallel ways."""

    parameters: int
    active_parameters: int
    bytes: int
    bytes_per_card: int
    kv_bytes_per_token: int
    kv_bytes_per_token_per_card: int

    def as_dict(self) -> dict[str, int]:
        """The budget as plain data."""
        return asdict(self)


def budget(recipe: Recipe, anchor_config: dict[str, Any]) -> Budget:
    """The sizes of the recipe's fused model, counted on the meta device (nothing is allocated)."""
    dtype = str(anchor_config.get("dtype") or anchor_config.get("torch_dtype") or "bfloat16")
    width = DTYPE_BYTES.get(dtype, 2)
    config = fused_config(
        anchor_config,
        len(recipe.experts),
        recipe.routing.top_k,
        recipe.routing.moe_layers,
        recipe.routing.shared_expert is not None,
        dtype,
    )
    parameters = count_parameters(config)
    sparse = config["num_hidden_layers"] - len(config["mlp_only_layers"])
    expert = 3 * config["hidden_size"] * config["moe_intermediate_size"]
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    kv = 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * head_dim * width
    ways = recipe.serving.tensor_parallel_size
    return Budget(
        parameters=parameters,
        active_parameters=parameters - sparse * (len(recipe.experts) - recipe.routing.top_k) * expert,
        bytes=parameters * width,
        bytes_per_card=parameters * width // ways,
        kv_bytes_per_token=kv,
        kv_bytes_per_token_per_card=kv // min(ways, config["num_key_value_heads"]),
    )


def count_parameters(config: dict[str, Any]) -> int:
    """The parameters of a Qwen2MoE config, each tied tensor once, by building the model on the meta device."""
    import torch
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    with torch.device("meta"):
        model = Qwen2MoeForCausalLM(Qwen2MoeConfig(**{k: v for k, v in config.items() if k != "torch_dtype"}))
    return sum(parameter.numel() for parameter in model.parameters())
