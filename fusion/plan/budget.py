"""What the fused model weighs: parameters by group, bytes on disk and on every card, in every weight format.

    sizes = budget(recipe, describe_anchor(recipe).config)
    sizes.groups["experts"], sizes.bytes_per_card

Counted on the meta device, so nothing is allocated. How a weight is split is vLLM 0.32's way (model_executor/models/
qwen2_moe.py, layers/linear.py, layers/vocab_parallel_embedding.py, layers/fused_moe/expert_map_manager.py): query
heads, key and value heads and every MLP are cut by tensor parallelism, with less than one key-value head a card these
are copied; the vocabulary is padded to a multiple of 64 and cut; norms and gates are on every card. Expert parallelism
cuts the list of experts instead of each expert, and the first cards get the remainder. Experts are cut over the cards
of all data-parallel ranks, which hold everything else once each; every pipeline stage has its layers, and embeddings,
head and last norm besides.
"""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import Any, Literal

from fusion.architecture import fused_config, named_dtype, part_of
from fusion.recipe import Recipe
from fusion.sections.serving import Serving

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
GROUPS = ("experts", "shared_expert", "dense_mlps", "attention", "embeddings", "head", "norms", "gates")
QUANTISED = ("experts", "shared_expert", "dense_mlps", "attention")  # the linear maps: vLLM's LinearBase, RoutedExperts
VOCABULARY_PADDING = 64  # DEFAULT_VOCAB_PADDING_SIZE
GROUP_SIZE = 128  # weights that share a scale in w4a16
Format = Literal["float32", "bfloat16", "float16", "fp8", "w4a16"]


@dataclass(frozen=True)
class Weight:
    """A parameter of the model: its transformers name and shape, and its group of GROUPS."""

    name: str
    shape: tuple[int, ...]
    group: str

    @property
    def count(self) -> int:
        """Its elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Layout:
    """How vLLM spreads one server: every layer over `ways` cards, its layers over `stages` of such cards, and all that
    over `ranks` which share the experts alone; whole experts to a card with `expert_parallel`."""

    ways: int = 1
    expert_parallel: bool = False
    stages: int = 1
    ranks: int = 1

    @property
    def cards(self) -> int:
        """All that the server takes."""
        return self.ways * self.stages * self.ranks

    @property
    def expert_ways(self) -> int:
        """Over how many cards the experts of a layer go."""
        return self.ways * self.ranks


@dataclass(frozen=True)
class Budget:
    """Sizes of the fused model, bytes in the checkpoint's dtype; a card is the fullest of the recipe's ways."""

    parameters: int
    active_parameters: int
    groups: dict[str, int]  # parameters, by group
    dtype: str
    bytes: int
    bytes_per_card: int
    kv_bytes_per_token: int
    kv_bytes_per_token_per_card: int

    def as_dict(self) -> dict[str, Any]:
        """The budget as plain data."""
        return asdict(self)


def budget(recipe: Recipe, anchor_config: dict[str, Any]) -> Budget:
    """The sizes of the recipe's fused model, counted on the meta device (nothing is allocated)."""
    config = planned_config(recipe, anchor_config)
    weights = model_weights(config)
    groups = {name: sum(weight.count for weight in weights if weight.group == name) for name in GROUPS}
    parameters = sum(groups.values())
    dtype = config["dtype"]
    width = DTYPE_BYTES[dtype]
    layout = serving_layout(recipe.serving)
    return Budget(
        parameters=parameters,
        active_parameters=active_parameters(weights, config),
        groups=groups,
        dtype=dtype,
        bytes=parameters * width,
        bytes_per_card=card_bytes(weights, config, layout, dtype, dtype),
        kv_bytes_per_token=kv_bytes_per_token(config, 1, dtype),
        kv_bytes_per_token_per_card=kv_bytes_per_token(config, layout.ways, dtype, layout.stages),
    )


def planned_config(recipe: Recipe, anchor_config: dict[str, Any]) -> dict[str, Any]:
    """The config that the fused model will have. Raises UserError for a `moe_layers` the anchor does not have."""
    return fused_config(
        anchor_config,
        len(recipe.experts),
        recipe.routing.top_k,
        recipe.routing.moe_layers,
        recipe.routing.shared_expert is not None,
        planned_dtype(anchor_config),
    )


def planned_dtype(anchor_config: dict[str, Any]) -> str:
    """The dtype of a model of that config, bfloat16 where it names none that is known."""
    dtype = named_dtype(anchor_config)
    return dtype if dtype in DTYPE_BYTES else "bfloat16"


def serving_layout(serving: Serving) -> Layout:
    """The layout that the recipe asks for."""
    return Layout(
        ways=serving.tensor_parallel_size,
        expert_parallel=serving.enable_expert_parallel,
        stages=serving.pipeline_parallel_size,
        ranks=serving.data_parallel_size,
    )


def model_weights(config: dict[str, Any]) -> list[Weight]:
    """The parameters of a Qwen2 or Qwen2MoE config, each tied tensor once, from the model on the meta device."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM

    given = {key: value for key, value in config.items() if key not in ("torch_dtype", "dtype")}
    with torch.device("meta"):
        if config.get("model_type") == "qwen2_moe":
            model = Qwen2MoeForCausalLM(Qwen2MoeConfig(**given))
        else:
            model = Qwen2ForCausalLM(Qwen2Config(**given))
    return [Weight(name, tuple(value.shape), _group_of(name)) for name, value in model.named_parameters()]


def _group_of(name: str) -> str:
    if ".mlp.experts." in name:
        return "experts"
    if ".mlp.shared_expert." in name:
        return "shared_expert"
    if ".mlp.gate." in name or ".mlp.shared_expert_gate." in name:
        return "gates"
    return "dense_mlps" if ".mlp." in name else part_of(name)


def active_parameters(weights: list[Weight], config: dict[str, Any]) -> int:
    """The parameters that a token passes: of the routed experts its top-k alone."""
    experts = sum(weight.count for weight in weights if weight.group == "experts")
    idle = config.get("num_experts", 0) - config.get("num_experts_per_tok", 0)
    return sum(weight.count for weight in weights) - (experts * idle // config["num_experts"] if experts else 0)


def attention_widths(config: dict[str, Any], ways: int) -> tuple[int, int]:
    """How wide a token's queries are on a card, and its keys (and values), at least one head of them."""
    head_size = config["hidden_size"] // config["num_attention_heads"]
    return config["num_attention_heads"] * head_size // ways, max(1, config["num_key_value_heads"] // ways) * head_size


def kv_bytes_per_token(config: dict[str, Any], ways: int, dtype: str, stages: int = 1) -> int:
    """Bytes of keys and values that one token takes on a card of the stage with most layers: 2 x layers x width of its
    keys x bytes a number."""
    layers = max(stage_layers(config["num_hidden_layers"], stages))
    return int(2 * layers * attention_widths(config, ways)[1] * DTYPE_BYTES[dtype])


def stage_layers(layers: int, stages: int) -> list[int]:
    """How many layers each pipeline stage has: evenly, the rest one each from the last but one backwards
    (distributed/utils.py, get_pp_indices)."""
    rest = layers % stages
    return [layers // stages + (stages - 1 - rest <= stage < stages - 1) for stage in range(stages)]


def card_bytes(weights: list[Weight], config: dict[str, Any], layout: Layout, weight_format: Format, dtype: str) -> int:
    """Bytes of all weights on the fullest card, as vLLM holds them once loaded; what is not converted has `dtype`."""
    return sum(group_card_bytes(weights, config, layout, weight_format, dtype).values())


def group_card_bytes(
    weights: list[Weight], config: dict[str, Any], layout: Layout, weight_format: Format, dtype: str
) -> dict[str, int]:
    """The same by group of GROUPS."""
    stages = [dict.fromkeys(GROUPS, 0) for _ in range(layout.stages)]
    for weight in weights:
        held = _stored(weight, on_card(weight, config, layout), weight_format, dtype)
        for stage in _stages_of(weight, config, layout.stages):
            stages[stage][weight.group] += held
    return max(stages, key=lambda groups: sum(groups.values()))


def _stages_of(weight: Weight, config: dict[str, Any], stages: int) -> Iterable[int]:
    """The pipeline stages that hold `weight`: a layer's one, all for what belongs to no layer."""
    if ".layers." not in weight.name:
        return range(stages)
    layer = int(weight.name.split(".layers.")[1].split(".")[0])
    ends = accumulate(stage_layers(config["num_hidden_layers"], stages))
    return [next(stage for stage, end in enumerate(ends) if layer < end)]


def on_card(weight: Weight, config: dict[str, Any], layout: Layout) -> tuple[int, ...]:
    """The shape of the part of `weight` that the fullest card holds."""
    ways, shape, name = layout.ways, weight.shape, weight.name
    if weight.group in ("norms", "gates"):
        return shape
    if weight.group == "experts":
        ways = layout.expert_ways
    if weight.group in ("embeddings", "head"):
        padded = math.ceil(shape[0] / VOCABULARY_PADDING) * VOCABULARY_PADDING
        return (math.ceil(padded / ways), *shape[1:])
    if ways == 1:
        return shape
    if weight.group == "experts" and layout.expert_parallel:
        return (math.ceil(shape[0] / ways), *shape[1:])
    if name.endswith((".o_proj.weight", ".down_proj.weight", ".experts.down_proj")):  # row parallel: inputs are cut
        return (*shape[:-1], math.ceil(shape[-1] / ways))
    if ".k_proj." in name or ".v_proj." in name:
        heads = config["num_key_value_heads"]
        return (shape[0] // heads * max(1, heads // ways), *shape[1:])
    if weight.group == "experts":
        return (shape[0], math.ceil(shape[1] / ways), shape[2])
    return (math.ceil(shape[0] / ways), *shape[1:])


def _stored(weight: Weight, shape: tuple[int, ...], weight_format: Format, dtype: str) -> int:
    """Bytes of a part of `weight`; biases, norms, gates, embeddings and head are not converted."""
    count = math.prod(shape)
    if weight_format not in ("fp8", "w4a16") or weight.group not in QUANTISED or weight.name.endswith(".bias"):
        return count * DTYPE_BYTES[dtype]
    if weight_format == "fp8":
        # `--quantization fp8_per_tensor`: one float32 scale for each fused linear map (q, k and v are one, gate and up
        # are one) and for each expert's two (layers/quantization/online/fp8.py)
        fused_into_another = weight.name.endswith((".k_proj.weight", ".v_proj.weight", ".up_proj.weight"))
        scales = shape[0] if weight.group == "experts" else int(not fused_into_another)
        return count + 4 * (scales if count else 0)
    rows = count // shape[-1] if count else 0
    return math.ceil(count / 2) + rows * math.ceil(shape[-1] / GROUP_SIZE) * DTYPE_BYTES[dtype]
