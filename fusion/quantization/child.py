"""What runs in llm-compressor's environment: quantises a fused model, or compares it with the one it was made from.

    PYTHON -I child.py job.json

Imports nothing of this project, which is not installed there; fusion/quantization/quantize.py writes the job and reads
the report, both JSON. How far it has come goes to standard output, a JSON object a line, all else to standard error.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
from compressed_tensors.offload import dispatch_model
from compressed_tensors.quantization import preset_name_to_scheme
from llmcompressor import model_free_ptq, oneshot
from llmcompressor.core import active_session
from llmcompressor.modeling.moe.linear_experts import LinearExperts2D
from llmcompressor.modeling.moe.linearize import get_linearized_moes
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.utils.hooks import HooksMixin
from llmcompressor.utils import load_context
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeExperts

HEAD_TOKENS = 128  # whose logits, of a vocabulary each, are in memory at a time
BATCH_TOKENS = 4096


def main(path: str) -> None:
    """Does the job in `path`."""
    job = json.loads(Path(path).read_text(encoding="utf-8"))
    report = {"fp8": fp8, "w4a16": w4a16, "compare": compare}[job["do"]](job)
    Path(job["report"]).write_text(json.dumps(report), encoding="utf-8")


def fp8(job: dict[str, Any]) -> dict[str, Any]:
    """Weights to FP8 with a scale a channel, shard by shard; activations get a scale a token when they are served."""
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    model_free_ptq(job["model"], job["out"], scheme="FP8_DYNAMIC", ignore=job["ignore"], device=device)
    return {}


def w4a16(job: dict[str, Any]) -> dict[str, Any]:
    """Weights to 4 bits by GPTQ (arXiv:2210.17323), layer by layer on what reaches it through those quantised before.

    Every expert is calibrated on what the gates send it and on all tokens of its own domain.
    """
    rows = job["rows"]
    DomainExperts.row_experts = [row["expert"] for row in rows]
    LinearExperts2D._registry[Qwen2MoeExperts] = DomainExperts
    model = load(job["model"], job)
    passes = 2  # one to calibrate a layer, one through the layer as quantised
    hooks = _report_layers(model, passes * len(rows))
    texts: Any = [torch.tensor([row["ids"]]) for row in rows]
    scheme = preset_name_to_scheme("W4A16", ["Linear"])
    scheme.weights.group_size = job["group_size"]
    oneshot(
        model=model,
        dataset=DataLoader(texts, batch_size=None, collate_fn=lambda ids: {"input_ids": ids}),
        recipe=GPTQModifier(config_groups={"group_0": scheme}, ignore=job["ignore"]),
        pipeline="sequential",
        moe_calibrate_all_experts=False,  # DomainExperts decides
        shuffle_calibration_samples=False,
    )
    for hook in hooks:
        hook.remove()
    seen = {name: [module.routed, module.own] for name, module in get_linearized_moes(model)}
    model.save_pretrained(job["out"], save_compressed=True, max_shard_size="2GB")
    return {"seen": seen}


Experts: Any = LinearExperts2D.get_linear_experts_cls(Qwen2MoeExperts)


class DomainExperts(Experts):
    """Qwen2MoE's experts as linear layers; while calibrating, a row's own expert also sees what is routed elsewhere.

    What comes of that is dropped: the output is that of the gates' choice. llm-compressor's own way, every expert on
    every token, takes as many times the work as there are experts and is no better (notebooks/LOG.md).
    """

    row_experts: ClassVar[list[int]] = []  # the expert of every calibration row

    def __init__(self, config: Any):
        super().__init__(config)
        self.routed = [0] * self.num_experts  # tokens by expert, one pass
        self.own = [0] * self.num_experts  # those among its own domain's that went to others

    def forward(self, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """`hidden` `(tokens, hidden)`, `chosen` and `weights` `(tokens, k)`."""
        output = torch.zeros_like(hidden)
        calibrating = not HooksMixin._HOOKS_DISABLED and active_session().state.current_batch_idx >= 0
        for number in range(self.num_experts):
            token, slot = torch.where(chosen == number)
            if len(token):
                part = self[number](hidden[token]) * weights[token, slot, None]
                output.index_add_(0, token, part.to(output.dtype))
            if calibrating:
                self.routed[number] += len(token)
                if self.row_experts[active_session().state.current_batch_idx] == number:
                    others = torch.ones(len(hidden), dtype=torch.bool, device=hidden.device)
                    others[token] = False
                    self.own[number] += int(others.sum())
                    if others.any():
                        self[number](hidden[others])
        return output


def load(folder: str, job: dict[str, Any]) -> Any:
    """The model in `folder`, its experts as linear layers, at most `cpu_bytes` of it in memory and the rest on disk.

    `dtype` is `auto` for the checkpoint's own, or float32.
    """
    for name, module in list(sys.modules.items()):
        # transformers' patching lists every loaded module, and listing these imports torchvision, which is not here
        if name.startswith("transformers") and str(vars(module).get("__doc__")).startswith("Alias module"):
            del sys.modules[name]
    with load_context():
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=job["dtype"],
            device_map="auto_offload",
            max_memory={"cpu": job["cpu_bytes"]},
            offload_folder=job["offload"],
        )
    if hasattr(model, "ct_decompress_hook"):  # of the whole model's forward, which is not called
        model.hf_quantizer.compressor.decompress_model(model)
    return model.eval()


def compare(job: dict[str, Any]) -> dict[str, Any]:
    """Both models on the same rows, row by row at the positions that predict its answer.

    nats: of the answer under each, summed; kl: of the original from the quantised, summed; mean_abs and max_abs: of the
    difference of logits, over tokens and vocabulary; same: tokens whose likeliest next token stayed.
    """
    rows = job["rows"]
    states, model = [], None
    for folder in (job["original"], job["quantized"]):
        del model
        model = load(folder, job)
        if torch.cuda.is_available():
            dispatch_model(model)
        hooks = _report_layers(model, len(list(_batches(rows))))
        states.append(answer_states(model, rows))
        for hook in hooks:
            hook.remove()
    return {"rows": [_row_figures(model, row, *pair) for row, *pair in zip(rows, *states, strict=True)]}


@torch.no_grad()
def answer_states(model: Any, rows: list[dict[str, Any]]) -> list[torch.Tensor]:
    """Of every row what the head sees where it predicts the answer, `(answer tokens, hidden)`."""
    found: dict[int, torch.Tensor] = {}
    device = model.get_input_embeddings().weight.device
    for batch in _batches(rows):
        ids = torch.zeros(len(batch), max(len(rows[number]["ids"]) for number in batch), dtype=torch.long)
        for line, number in enumerate(batch):
            ids[line, : len(rows[number]["ids"])] = torch.tensor(rows[number]["ids"])
        # right padding under a causal mask: no real token ever looks at a padded one
        states = model.model(input_ids=ids.to(device), use_cache=False).last_hidden_state
        for line, number in enumerate(batch):
            row = rows[number]
            found[number] = states[line, row["answer_start"] - 1 : len(row["ids"]) - 1].cpu()
    return [found[number] for number in range(len(rows))]


@torch.no_grad()
def _row_figures(model: Any, row: dict[str, Any], first: torch.Tensor, second: torch.Tensor) -> dict[str, float]:
    """One row's figures from the states of both models; the head is the same in both."""
    targets = torch.tensor(row["ids"][row["answer_start"] :])
    device = model.lm_head.weight.device
    sums = dict.fromkeys(("original", "quantized", "kl", "mean_abs", "same"), 0.0) | {"max_abs": 0.0}
    parts = zip(first.split(HEAD_TOKENS), second.split(HEAD_TOKENS), targets.split(HEAD_TOKENS), strict=True)
    for one, two, wanted in parts:
        a, b = (model.lm_head(part.to(device)).float().cpu() for part in (one, two))  # (tokens, vocabulary)
        log_a, log_b = a.log_softmax(-1), b.log_softmax(-1)
        sums["original"] -= float(log_a.gather(1, wanted[:, None]).sum())
        sums["quantized"] -= float(log_b.gather(1, wanted[:, None]).sum())
        sums["kl"] += float((log_a.exp() * (log_a - log_b)).sum())
        sums["same"] += int((a.argmax(-1) == b.argmax(-1)).sum())
        change = (a - b).abs()
        sums["mean_abs"] += float(change.mean(-1).sum())
        sums["max_abs"] = max(sums["max_abs"], float(change.max()))
    return {**sums, "tokens": len(targets)}


def _batches(rows: list[dict[str, Any]]) -> Iterator[list[int]]:
    """The rows' numbers, shortest first, in batches of at most BATCH_TOKENS with their padding."""
    batch: list[int] = []
    for number in sorted(range(len(rows)), key=lambda number: len(rows[number]["ids"])):
        if batch and len(rows[number]["ids"]) * (len(batch) + 1) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch


def _report_layers(model: Any, times: int) -> list[Any]:
    """Tells on standard output how many of the `times` that every layer is to be run have been."""
    total, done = times * len(model.model.layers), 0

    def passed(*_: Any) -> None:
        nonlocal done
        done += 1
        print(json.dumps({"done": done, "total": total}), flush=True)

    return [layer.register_forward_hook(passed) for layer in model.model.layers]


if __name__ == "__main__":
    main(sys.argv[1])
