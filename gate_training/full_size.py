"""Gate training at the layer shapes of Qwen2.5-7B: memory, tokens/s, and the share of the machine's matmul rate.

    python -m gate_training.full_size 100000 5     # tokens, experts
    python -m gate_training.full_size 8192 5 4     # and layers: memory is that of one
    python -m gate_training.full_size 8192         # a plain forward pass of transformers' dense layer, for comparison

Layers (one, where no number is given) with random weights, written to disk as a fused checkpoint is, and hidden states
in a file. Every expert's tokens come from a part of the vocabulary, so that there is something to learn. Prints one
JSON object.
"""

import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2Config, Qwen2Model

from fusion.architecture import MLP_PARTS, fused_config
from fusion.checkpoint import Checkpoint, write_json
from fusion.errors import counted, run_main
from fusion.hardware import compute_dtype, peak_memory, stream_device
from fusion.headers import write_index
from fusion.layers import Gates, LayerStream, gated, make_batches
from fusion.sections.fusing import GateTraining
from fusion.shards import write_shards
from gate_training.layer_tokens import LayerTokens, label_targets, token_marks
from gate_training.methods import cross_entropy
from gate_training.methods.tokens import moments

HIDDEN, INNER, VOCABULARY, KEYS = 3584, 18944, 152064, 512  # keys: of 4 heads, as values
SHAPES = {  # config.json of Qwen/Qwen2.5-7B-Instruct, one layer of it
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "num_hidden_layers": 1,
    "vocab_size": VOCABULARY,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
ROW = 512  # tokens a conversation


def tensors(experts: int, layers: int) -> Iterator[tuple[str, torch.Tensor]]:
    """The random tensors that a stream of `layers` reads, one at a time, in bfloat16."""

    def random(*shape: int, std: float = 0.02) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16).normal_(std=std)

    yield "model.embed_tokens.weight", random(VOCABULARY, HIDDEN, std=1.0)
    for layer in (f"model.layers.{index}." for index in range(layers)):
        yield layer + "input_layernorm.weight", torch.ones(HIDDEN, dtype=torch.bfloat16)
        yield layer + "post_attention_layernorm.weight", torch.ones(HIDDEN, dtype=torch.bfloat16)
        for name, size in (("q", HIDDEN), ("k", KEYS), ("v", KEYS)):
            yield f"{layer}self_attn.{name}_proj.weight", random(size, HIDDEN)
            yield f"{layer}self_attn.{name}_proj.bias", random(size)
        yield layer + "self_attn.o_proj.weight", random(HIDDEN, HIDDEN)
        for expert in range(experts):
            for part in MLP_PARTS:
                shape = (HIDDEN, INNER) if part == "down_proj" else (INNER, HIDDEN)
                yield f"{layer}mlp.experts.{expert}.{part}.weight", random(*shape)


def matmul_rate() -> float:
    """FLOP/s of (2048, hidden) x (hidden, intermediate) in the dtype and on the device of a fit, the best of five."""
    device, dtype = stream_device(), compute_dtype()
    x = torch.randn(2048, HIDDEN, device=device, dtype=dtype)
    weight = torch.randn(INNER, HIDDEN, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        float(torch.nn.functional.linear(x, weight)[0, 0])  # waits for the device
        best = min(best, time.perf_counter() - start)
    return 2 * 2048 * HIDDEN * INNER / best


def measure(tokens: int, experts: int, layers: int = 1) -> dict[str, Any]:
    """Fits the gate of each of `layers` on `tokens` tokens and moves them on, at top-1."""
    rate = matmul_rate()
    with tempfile.TemporaryDirectory(prefix="qwen-fusion-full-size-") as name:
        folder = Path(name)
        write_index(folder, write_shards(folder, "layer", tensors(experts, layers), shard_bytes=2**28))
        write_json(
            folder / "config.json",
            fused_config({**SHAPES, "num_hidden_layers": layers}, experts, 1, None, False, "bfloat16"),
        )
        generator = torch.Generator().manual_seed(0)
        rows = tokens // ROW
        labels = [row % experts for row in range(rows)]
        span = VOCABULARY // experts
        ids = [(torch.randint(span, (ROW,), generator=generator) + label * span).tolist() for label in labels]
        batches = make_batches(ids, labels=labels)
        start = time.perf_counter()
        stream = LayerStream(Checkpoint(folder), batches, dtype=compute_dtype(), memory_bytes=0)
        marks = torch.cat(token_marks(batches, stream.hidden))
        given = LayerTokens(stream, batches, label_targets(batches, experts), marks)
        gates: Gates = {}
        for layer in stream:
            layer.attend()
            given.reach(layer)
            gates[layer.index] = cross_entropy.fit(given, moments(given), GateTraining()).cpu()
            layer.mix(gated(gates, 1))
        seconds = time.perf_counter() - start
        # FLOP of the dense layers' products
        needed = 2 * layers * stream.tokens * HIDDEN * (2 * HIDDEN + 2 * KEYS + 3 * INNER)
        inputs = torch.cat([stream.inputs(batch)[:8].float() for batch in batches])
        wanted = torch.cat([batch.token_labels()[:8] for batch in batches])
        right = (inputs @ gates[layers - 1].T).argmax(dim=1) == wanted
    return {
        "tokens": stream.tokens,
        "experts": experts,
        "layers": layers,
        "device": str(stream.device),
        "seconds": seconds,
        "tokens_per_s": layers * stream.tokens / seconds,  # through one layer
        "share_of_matmul_rate": needed / seconds / rate,
        "accuracy": float(right.float().mean()),
        "peak_rss_gb": peak_memory() / 1e9,
    }


def forward(tokens: int) -> dict[str, float]:
    """tokens/s of transformers' dense layer without head on rows as above, a few at a time."""
    config = Qwen2Config(
        **{**SHAPES, "vocab_size": ROW, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
    )
    model = Qwen2Model(config).to(stream_device(), compute_dtype()).eval()
    rows = torch.arange(ROW, device=model.device).expand(8, -1)  # (8, ROW)
    with torch.inference_mode():
        start = time.perf_counter()
        for _ in range(tokens // rows.numel()):
            states = model(input_ids=rows, use_cache=False).last_hidden_state
        float(states[0, 0, 0])  # waits for the device
    return {"tokens_per_s": tokens // rows.numel() * rows.numel() / (time.perf_counter() - start)}


def main(tokens: str, experts: str | None = None, layers: str = "1") -> None:
    """Prints the figures of a fit, or without `experts` those of a plain forward pass."""
    count = counted(tokens)
    print(json.dumps(forward(count) if experts is None else measure(count, counted(experts), counted(layers))))


if __name__ == "__main__":
    run_main(main)
