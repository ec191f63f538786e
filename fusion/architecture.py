"""Qwen2 -> Qwen2MoE: names of tensors and files, and config, nothing else."""

import re
from collections.abc import Iterable
from typing import Any

from fusion.errors import UserError

GATES_FILE = "gates.safetensors"
MANIFEST = "fusion.json"  # of the fused checkpoint: its experts, gates and hashes
MLP_PARTS = ("gate_proj", "up_proj", "down_proj")
_LAYER = re.compile(r"^model\.layers\.(\d+)\.")
_KEPT = [
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "tie_word_embeddings",
    "attention_dropout",
    "use_cache",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "max_window_layers",
    "transformers_version",
]


def layer_of(name: str) -> int | None:
    """The layer a tensor belongs to, None for embeddings, final norm and head."""
    match = _LAYER.match(name)
    return int(match.group(1)) if match else None


def is_mlp(name: str) -> bool:
    """True for the tensors in which experts may differ; everything else is shared."""
    return ".mlp." in name


def part_of(name: str) -> str:
    """Which of the shared parts tensor `name` belongs to: attention, norms, embeddings or head."""
    if ".self_attn." in name:
        return "attention"
    return {"model.embed_tokens.weight": "embeddings", "lm_head.weight": "head"}.get(name, "norms")


def expert_tensor(name: str, expert: int) -> str:
    """The fused name of dense MLP tensor `name` as that of routed expert number `expert`."""
    return name.replace(".mlp.", f".mlp.experts.{expert}.")


def expert_of_tensor(name: str) -> tuple[int | None, str]:
    """The number of the routed expert that fused tensor `name` belongs to, and its dense name; None for all others."""
    match = re.search(r"\.mlp\.experts\.(\d+)\.", name)
    return (int(match[1]), name.replace(match[0], ".mlp.")) if match else (None, name)


def shared_expert_tensor(name: str) -> str:
    """The fused name of dense MLP tensor `name` as the shared expert's."""
    return name.replace(".mlp.", ".mlp.shared_expert.")


def gate_tensor(layer: int) -> str:
    """The name of a layer's router weight, `(experts, hidden)`."""
    return f"model.layers.{layer}.mlp.gate.weight"


def shared_gate_tensor(layer: int) -> str:
    """The name of a layer's shared-expert gate, `(1, hidden)`; present also where there is no shared expert."""
    return f"model.layers.{layer}.mlp.shared_expert_gate.weight"


def head_dim(config: dict[str, Any]) -> int:
    """The size of an attention head, which vLLM takes from the two others whatever the config says."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def is_qkv_bias(name: str) -> bool:
    """True for the biases of the query, key and value projections."""
    return name.endswith(tuple(f".self_attn.{part}_proj.bias" for part in "qkv"))


def dense_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The tensors of the Qwen2ForCausalLM that `config` describes, {name: shape}, no head where it is tied."""
    hidden, ffn, size = config["hidden_size"], config["intermediate_size"], head_dim(config)
    queries, keys = config["num_attention_heads"] * size, config["num_key_value_heads"] * size
    rows = {"q": queries, "k": keys, "v": keys}
    layer: dict[str, tuple[int, ...]] = {f"self_attn.{part}_proj.weight": (rows[part], hidden) for part in rows}
    layer |= {f"self_attn.{part}_proj.bias": (rows[part],) for part in rows}
    layer |= {"self_attn.o_proj.weight": (hidden, queries), "mlp.down_proj.weight": (hidden, ffn)}
    layer |= {f"mlp.{part}_proj.weight": (ffn, hidden) for part in ("gate", "up")}
    layer |= {f"{norm}_layernorm.weight": (hidden,) for norm in ("input", "post_attention")}
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for number in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{number}.{name}": shape for name, shape in layer.items()}
    shapes["model.norm.weight"] = (hidden,)
    if not config.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    return shapes


def lacking_biases(config: dict[str, Any], names: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """The q, k and v biases, {name: shape}, that a checkpoint of `config` with tensors `names` leaves out."""
    held = set(names)
    return {name: shape for name, shape in dense_shapes(config).items() if is_qkv_bias(name) and name not in held}


def named_dtype(config: dict[str, Any]) -> str | None:
    """The dtype that a config names, from the old spelling (`torch_dtype`) or the new; None where it names none."""
    named = config.get("dtype") or config.get("torch_dtype")
    return str(named).removeprefix("torch.") if named else None


def rope_theta(config: dict[str, Any]) -> float:
    """The rotary base, from the old spelling (`rope_theta`) or the new (`rope_parameters`)."""
    nested = config.get("rope_parameters") or {}
    return float(config.get("rope_theta") or nested.get("rope_theta") or 10000.0)


def rope_scaling(config: dict[str, Any]) -> dict[str, Any] | None:
    """The rotary scaling (YaRN, ...) of either spelling, None for plain rotary embeddings."""
    nested = config.get("rope_scaling") or config.get("rope_parameters") or {}
    return nested if nested.get("rope_type", nested.get("type", "default")) != "default" else None


def sparse_layers(layers: int, moe_layers: tuple[int, ...] | None) -> list[int]:
    """The layers that carry experts. Raises UserError for one the model does not have."""
    if moe_layers is None:
        return list(range(layers))
    wrong = [layer for layer in moe_layers if not 0 <= layer < layers]
    if wrong or not moe_layers:
        raise UserError(f"routing.moe_layers names layer {wrong or 'none'}, the anchor has layers 0 to {layers - 1}")
    return sorted(set(moe_layers))


def fused_config(
    anchor: dict[str, Any],
    experts: int,
    top_k: int,
    moe_layers: tuple[int, ...] | None,
    shared_expert: bool,
    dtype: str,
) -> dict[str, Any]:
    """The Qwen2MoeForCausalLM config of `experts` copies of the anchor's MLP, rope in both spellings.

    The fused model always has q, k and v biases, as vLLM's Qwen2Moe does whatever the config says: those that the
    anchor's files lack (`lacking_biases`) are to be written as zeros, which is what Qwen2 computes without them.
    """
    layers = anchor["num_hidden_layers"]
    sparse = sparse_layers(layers, moe_layers)
    theta, scaling = rope_theta(anchor), rope_scaling(anchor)
    config = {key: anchor[key] for key in _KEPT if key in anchor}
    config.update(
        architectures=["Qwen2MoeForCausalLM"],
        model_type="qwen2_moe",
        rope_theta=theta,
        rope_parameters={"rope_type": "default", **(scaling or {}), "rope_theta": theta},
        **({"rope_scaling": scaling} if scaling else {}),
        use_sliding_window=False,
        sliding_window=None,
        num_experts=experts,
        num_experts_per_tok=top_k,
        norm_topk_prob=True,
        moe_intermediate_size=anchor["intermediate_size"],
        shared_expert_intermediate_size=anchor["intermediate_size"] if shared_expert else 0,
        decoder_sparse_step=1,
        mlp_only_layers=[layer for layer in range(layers) if layer not in sparse],
        output_router_logits=False,
        router_aux_loss_coef=0.001,
        qkv_bias=True,
        dtype=dtype,
        torch_dtype=dtype,
    )
    return config
