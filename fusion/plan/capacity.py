"""How many tokens a machine keeps for how many requests: the KV cache that is left beside weights and reserves.

    for row in capacities(recipe, config, model_weights(config), profile):
        print(row.weight_format, row.kv_tokens, row.lengths)

vLLM 0.32's own arithmetic (v1/worker/gpu_worker.py, cpu_worker.py, v1/core/kv_cache_utils.py): of a card it asks for
`gpu_memory_utilization`; weights, the peak of a profile run and the CUDA graphs go off, and what is left is cut into
blocks of 16 tokens (128 on the CPU, where `kv_cache_memory_bytes` says what is left). The block size and the division
are exact and checked against the CPU server's log; the reserves are estimates, computed here from the shapes of the
profile run and nowhere measured on a GPU.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

from fusion.plan.budget import (
    DTYPE_BYTES,
    Format,
    Layout,
    Weight,
    attention_widths,
    card_bytes,
    kv_bytes_per_token,
    serving_layout,
)
from fusion.plan.profile import HardwareProfile
from fusion.recipe import Recipe
from fusion.sections.serving import Serving

BLOCK_GPU, BLOCK_CPU = 16, 128  # tokens: CacheConfig.DEFAULT_BLOCK_SIZE; platforms/cpu.py
YARN_FACTOR = 4.0  # Qwen2.5's model cards: 32768 positions become 131072
# kernels and libraries that load during the profile run: 0.5 GiB in the worked example of vLLM's memory_profiling
NON_TORCH = 2**29
# of each CUDA graph after the first: vLLM's profile_cudagraph_memory takes 1 MiB at least; its public logs of 86 graphs
# (51 piecewise, 35 full) have 0.2 to 1.6 GiB in all
GRAPH_BYTES = 8 * 2**20
LARGEST_GRAPH = 512  # tokens, config/vllm.py


@dataclass(frozen=True)
class Length:
    """How many sequences of `max_model_len` one engine keeps at once, and whether it would start with it."""

    max_model_len: int
    yarn: bool  # beyond the positions that the anchor has without it
    sequences: float
    fits: bool


@dataclass(frozen=True)
class Capacity:
    """What one engine has on its fullest card in one weight format, in bytes, and the KV cache that comes of it.

    `kv_tokens` is what vLLM logs at the recipe's max_model_len ("GPU KV cache size"); all cards of an engine together
    keep as many, each its own heads of every token. `engines` such engines find room side by side, one a group of
    cards, a data-parallel rank being one; `kv_tokens_in_all` is theirs. `kv_bytes` is negative by what is missing where
    the weights do not fit. `longest` is the largest max_model_len that vLLM would start with.
    """

    weight_format: Format
    weights: int
    activations: int
    graphs: int
    other: int
    usable: int
    kv_bytes: int
    kv_bytes_per_token: int
    kv_tokens: int
    engines: int
    kv_tokens_in_all: int
    longest: int
    lengths: tuple[Length, ...]

    def as_dict(self) -> dict[str, Any]:
        """The capacity as plain data."""
        return asdict(self)

    def starts_with(self, max_model_len: int) -> bool:
        """Whether vLLM would start with it: one whole sequence beside the block that it keeps for itself."""
        return max_model_len <= self.longest


def served_dtype(serving: Serving, checkpoint_dtype: str, native_bfloat16: bool = True) -> Format:
    """The dtype vLLM computes in: the recipe's; for `auto` float32 on a CPU without bfloat16, otherwise the
    checkpoint's, float32 made bfloat16 (config/model.py, _resolve_auto_dtype)."""
    if serving.dtype != "auto":
        return serving.dtype
    if not native_bfloat16:
        return "float32"
    return "float16" if checkpoint_dtype == "float16" else "bfloat16"


def formats(profile: HardwareProfile, dtype: Format) -> tuple[Format, ...]:
    """The weight formats to compare: on a CPU vLLM serves no quantised experts (without AMX), with float32 nor does it
    on a card."""
    return (dtype, "fp8", "w4a16") if profile.cards and dtype != "float32" else (dtype,)


def capacities(
    recipe: Recipe,
    config: dict[str, Any],
    weights: list[Weight],
    profile: HardwareProfile,
) -> list[Capacity]:
    """The capacity of an engine of a Qwen2 or Qwen2MoE `config` on the profile's machine, in every weight format."""
    layout = serving_layout(recipe.serving)
    dtype = served_dtype(recipe.serving, config["dtype"], profile.native_bfloat16)
    return [
        capacity(
            recipe.serving,
            config,
            profile,
            layout,
            weight_format,
            card_bytes(weights, config, layout, weight_format, dtype),
        )
        for weight_format in formats(profile, dtype)
    ]


def capacity(
    serving: Serving,
    config: dict[str, Any],
    profile: HardwareProfile,
    layout: Layout,
    weight_format: Format,
    weights: int,
    share: float = 1.0,
    engines: int | None = None,
) -> Capacity:
    """The same for one format with `weights` bytes on the fullest card, of which the engine gets `share`; `engines` run
    in all, None: as many as there are groups of cards."""
    dtype = served_dtype(serving, config["dtype"], profile.native_bfloat16)
    tokens_a_step, sequences = profile.batch(layout.ways, serving.max_model_len)
    activations = activation_bytes(config, layout, tokens_a_step, sequences, dtype)
    graphs = graph_bytes(config, layout, sequences, dtype) if profile.cards else 0  # CPU: --enforce-eager
    other = NON_TORCH if profile.cards else 0
    if profile.cards:
        usable = int(profile.memory * serving.gpu_memory_utilization * share)
        left = usable - weights - activations - graphs - other
    else:  # all workers share the machine's memory, and each is told how much its cache gets
        usable = int(profile.memory * share) // layout.ways
        left = min(serving.cpu_kv_cache_bytes, usable - weights - activations)
    block = BLOCK_GPU if profile.cards else BLOCK_CPU
    per_token = kv_bytes_per_token(config, layout.ways, dtype, layout.stages)
    blocks = kv_blocks(left, per_token, block)
    engines = engines or max(1, profile.cards // layout.cards) * layout.ranks
    tokens = logged_tokens(blocks, block, serving.max_model_len)
    longest = max(0, blocks - 1) * block
    positions = config.get("max_position_embeddings") or serving.max_model_len
    lengths = tuple(
        Length(length, length > positions, blocks / math.ceil(length / block), length <= longest)
        for length in lengths_to_show(serving, positions)
    )
    return Capacity(
        weight_format=weight_format,
        weights=weights,
        activations=activations,
        graphs=graphs,
        other=other,
        usable=usable,
        kv_bytes=left,
        kv_bytes_per_token=per_token,
        kv_tokens=tokens,
        engines=engines,
        kv_tokens_in_all=engines * tokens,
        longest=longest,
        lengths=lengths,
    )


def kv_blocks(memory: int, bytes_per_token: int, block: int) -> int:
    """Blocks of `block` tokens in `memory` bytes (get_kv_cache_config_from_groups)."""
    return max(0, memory) // (bytes_per_token * block)


def logged_tokens(blocks: int, block: int, max_model_len: int) -> int:
    """The tokens of "KV cache size" in vLLM's log: full sequences by whole blocks, times their length
    (get_kv_cache_capacity)."""
    return int(blocks / math.ceil(max_model_len / block) * max_model_len)


def lengths_to_show(serving: Serving, positions: int) -> list[int]:
    """An eighth, a quarter, a half and all of the recipe's max_model_len, the anchor's positions, and these by YaRN."""
    longest = serving.max_model_len
    shown = {longest // 8, longest // 4, longest // 2, longest, positions}
    shown.add(int(positions * (serving.yarn_factor or YARN_FACTOR)))
    return sorted(length for length in shown if length)


def activation_bytes(config: dict[str, Any], layout: Layout, tokens: int, sequences: int, dtype: Format) -> int:
    """An estimate of the profile run's peak on a card: the larger of its forward pass and its sampler.

    `tokens` and `sequences` are a step's. The forward pass is as in `forward_bytes`. The sampler's rows are as long as
    the vocabulary: logits in `dtype`, the same in float32, probabilities, the sorted values with their int64 places.
    """
    sampler = sequences * config["vocab_size"] * (DTYPE_BYTES[dtype] + 4 + 4 + 4 + 8)
    return max(forward_bytes(config, layout, tokens, dtype), sampler)


def forward_bytes(config: dict[str, Any], layout: Layout, tokens: int, dtype: Format) -> int:
    """An estimate of a forward pass's peak on a card: hidden states and residual, and the largest block between them.

    Attention holds q, k, v and its output. The experts hold their two workspaces of (tokens, top-k, width) and the
    output (fused_moe/experts/triton_moe.py, workspace_shapes), for the tokens of all ranks, which are gathered before
    them; a dense MLP gate, up and their product.
    """
    hidden, ways = config["hidden_size"], layout.ways
    queries, keys = attention_widths(config, ways)
    blocks = [2 * queries + 2 * keys, 3 * math.ceil(config["intermediate_size"] / ways)]
    if config.get("num_experts"):
        width = math.ceil(config["moe_intermediate_size"] / (1 if layout.expert_parallel else layout.expert_ways))
        workspaces = max(width, hidden) + max(2 * width, hidden)
        blocks.append(layout.ranks * (config["num_experts_per_tok"] * workspaces + hidden))
    return tokens * (2 * hidden + max(blocks)) * DTYPE_BYTES[dtype]


def graph_bytes(config: dict[str, Any], layout: Layout, sequences: int, dtype: Format) -> int:
    """An estimate of the CUDA graphs' memory: the first of each of the two modes holds a pass, the others GRAPH_BYTES.

    Sizes as in config/vllm.py: 1, 2, 4, by 8 to 256 and by 16 to 512 tokens; full graphs up to the sequences of a step.
    """
    largest = min(2 * sequences, LARGEST_GRAPH)
    piecewise = [size for size in (1, 2, 4, *range(8, 256, 8), *range(256, LARGEST_GRAPH + 1, 16)) if size <= largest]
    full = [size for size in piecewise if size <= sequences]
    first = sum(forward_bytes(config, layout, sizes[-1], dtype) for sizes in (piecewise, full))
    return first + GRAPH_BYTES * (len(piecewise) + len(full) - 2)
