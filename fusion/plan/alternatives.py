"""What the same experts cost on the same cards without a merge: dense engines side by side, or LoRA adapters.

    for row in alternatives(recipe, anchor_config, profile):
        print(row.name, row.weights_per_card, row.engine.kv_tokens)

Separate engines are dense Qwen2 models, one an expert. With adapters there is one engine of the anchor; vLLM allocates
`max_loras` slots of `max_lora_rank` for every linear map before any adapter is loaded (lora/layers/
column_parallel_linear.py, row_parallel_linear.py, create_lora_weights): A is whole on every card for maps that are cut
by their outputs, B for those cut by their inputs. The rank is the largest of the adapters'.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

from fusion.checkpoint import read_json
from fusion.errors import UserError
from fusion.hub import resolve_model
from fusion.plan.budget import DTYPE_BYTES, Layout, attention_widths, card_bytes, model_weights, planned_dtype
from fusion.plan.capacity import Capacity, capacity, formats, served_dtype
from fusion.plan.profile import HardwareProfile
from fusion.recipe import Recipe
from fusion.sections.fusing import Expert

LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # config/lora.py, MaxLoRARanks
DEFAULT_RANK = 16
SEPARATE, ADAPTERS = "separate engines", "one anchor with adapters"


@dataclass(frozen=True)
class Alternative:
    """One way to serve the experts apart, in one weight format: bytes on the fullest card, and one engine's capacity.

    `engines` are all that run. Cut over the cards, each gets its share of every card; on one card each, as many as fall
    on the fullest share it. `fits` says whether each starts with the recipe's max_model_len; `possible` whether the
    recipe's experts can be served that way at all, and `why` what stands against it.
    """

    name: str
    how: str
    engines: int
    weights: int  # over all cards
    weights_per_card: int
    engine: Capacity
    fits: bool
    possible: bool = True
    why: str = ""

    def as_dict(self) -> dict[str, Any]:
        """The alternative as plain data."""
        return asdict(self)


def alternatives(recipe: Recipe, anchor_config: dict[str, Any], profile: HardwareProfile) -> list[Alternative]:
    """Separate engines, cut over all cards or whole on one each, and one anchor with adapters, by weight format."""
    config = dense_config(anchor_config)
    weights = model_weights(config)
    dtype = served_dtype(recipe.serving, config["dtype"], profile.native_bfloat16)
    count, length = len(recipe.experts), recipe.serving.max_model_len
    cut = Layout(recipe.serving.tensor_parallel_size)
    found = []
    for weight_format in formats(profile, dtype):
        for layout in dict.fromkeys((cut, Layout()) if profile.cards else (cut,)):
            held = card_bytes(weights, config, layout, weight_format, dtype)
            groups = max(1, profile.cards // layout.ways)  # of cards, each with its engines
            together = math.ceil(count / groups)  # engines on the fullest group
            engine = capacity(recipe.serving, config, profile, layout, weight_format, held, 1 / together, count)
            how = f"{layout.ways} ways each" if layout.ways > 1 else "each on one card"
            found.append(
                Alternative(
                    name=SEPARATE,
                    how=how if profile.cards else "side by side",
                    engines=count,
                    weights=count * layout.ways * held,
                    weights_per_card=together * held,
                    engine=engine,
                    fits=engine.starts_with(length),
                )
            )
    rank, why = adapter_rank(recipe), no_adapters(recipe)
    assumed = ", assumed" if any(expert.adapter and not lora_rank(expert) for expert in recipe.experts) else ""
    slots = count * lora_slot_bytes(config, cut.ways, rank, DTYPE_BYTES[dtype])
    for weight_format in formats(profile, dtype):
        held = card_bytes(weights, config, cut, weight_format, dtype) + slots
        engine = capacity(recipe.serving, config, profile, cut, weight_format, held, engines=1)
        found.append(
            Alternative(
                name=ADAPTERS,
                how=f"{count} slots of rank {rank}{assumed}",
                engines=1,
                weights=cut.ways * held,
                weights_per_card=held,
                engine=engine,
                fits=engine.starts_with(length),
                possible=not why,
                why=why,
            )
        )
    return found


def dense_config(anchor_config: dict[str, Any]) -> dict[str, Any]:
    """The anchor's config as a plain dense one, with its dtype under one key."""
    known = {key: value for key, value in anchor_config.items() if key not in ("dtype", "torch_dtype", "quantization")}
    return {**known, "model_type": "qwen2", "dtype": planned_dtype(anchor_config)}


def lora_slot_bytes(config: dict[str, Any], ways: int, rank: int, width: int) -> int:
    """Bytes on a card of one adapter slot of `rank`: q, k, v, o, gate, up and down of every layer, A (rank, in) and
    B (out, rank), in the model's dtype."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    queries, keys = attention_widths(config, ways)
    attention = 3 * hidden + queries + 2 * keys + queries + hidden  # q, k, v cut by outputs, o by inputs
    mlp = 2 * (hidden + math.ceil(inner / ways)) + math.ceil(inner / ways) + hidden  # gate and up, down
    return int(config["num_hidden_layers"] * (attention + mlp) * rank * width)


def lora_rank(expert: Expert) -> int:
    """The largest rank of an expert's LoRA, branch or adapter; 0 where it has none, or one that cannot be read here.

    An adapter's as vLLM takes it: of `r` and all of `rank_pattern` (lora/peft_helper.py).
    """
    if expert.branch:
        return expert.branch.lora_rank or 0
    if not expert.adapter:
        return 0
    try:
        config = read_json(resolve_model(expert.adapter, allow_download=False) / "adapter_config.json")
    except UserError:
        return 0  # which is the preflight's to say
    ranks = [config.get("r"), *(config.get("rank_pattern") or {}).values()]
    return max((rank for rank in ranks if isinstance(rank, int)), default=0)


def adapter_rank(recipe: Recipe) -> int:
    """The smallest rank of vLLM's that holds every LoRA of the recipe, its largest where none does; DEFAULT_RANK where
    no rank is known."""
    wanted = max(map(lora_rank, recipe.experts)) or DEFAULT_RANK
    return next((rank for rank in LORA_RANKS if rank >= wanted), LORA_RANKS[-1])


def no_adapters(recipe: Recipe) -> str:
    """Why the experts cannot be served as adapters of the anchor; empty where they can."""
    for expert in recipe.experts:
        if expert.branch and not expert.branch.lora_rank:
            return f"expert '{expert.name}' is branched with whole weights (no lora_rank)"
        if expert.anchor:
            return f"expert '{expert.name}' is anchored with its MLPs whole, not as an adapter"
        if expert.model and expert.model != recipe.anchor.model:
            return f"expert '{expert.name}' is a model of its own"
        if (rank := lora_rank(expert)) > LORA_RANKS[-1]:
            return f"expert '{expert.name}' has an adapter of rank {rank}, vLLM's largest is {LORA_RANKS[-1]}"
    return ""
