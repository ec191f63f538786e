"""Refines gates that are fitted layer by layer: the answers' loss through all gates of the whole model at once.

    qwen-fusion train-gates configs/demo.yaml --method lm

Everything but the gates is frozen. The routers serve as they will be served and learn by the straight-through gradient
of fusion/router.py, without which top-1 gates have none; a load-balance loss (Switch Transformer: Fedus et al., 2021,
arXiv:2101.03961, as transformers has it for Qwen2MoE) can be added. The step with the least held-out answer loss, in
the mean over domains, is kept, and the start is step 0: on those examples the result is never worse.
"""

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.models.qwen2_moe.modeling_qwen2_moe import load_balancing_loss_func

from fusion import training
from fusion.architecture import GATES_FILE
from fusion.checkpoint import weight_stamps
from fusion.encoding import load_tokenizer
from fusion.evaluation.answer_loss import by_domain
from fusion.evaluation.generate import answer_losses
from fusion.layers import Gates, gates_hash
from fusion.merge import checkpoint_dtype
from fusion.packing import answer_loss
from fusion.recipe import Recipe
from fusion.resumable import claim, release
from fusion.router import TrainedRouter, train_routers, trained_gates
from fusion.sources import ModelSource, load_model
from gate_training.compare import mean_loss
from gate_training.examples import RoutingData, RoutingExample


@dataclass(frozen=True)
class Refined:
    """What refining came to: losses in nats a held-out answer token, mean over domains; tokens without padding."""

    loss_before: float
    loss_after: float
    best_step: int
    steps: int
    tokens: int
    seconds: float
    curve: list[tuple[int, float]]  # (step, held-out loss)


def refine(recipe: Recipe, folder: Path, gates: Gates, data: RoutingData) -> tuple[Gates, Refined]:
    """`gates`, `(experts, hidden)` by layer, after the steps of `gate_training.refinement`, in the checkpoint's dtype.

    An interrupted call goes on when it is made again with the same gates and examples. Raises UserError where most
    examples are too long.
    """
    began = time.monotonic()
    settings, saved = recipe.gate_training.refinement, getattr(torch, checkpoint_dtype(folder))
    partial = folder.with_name(f".{folder.name}.refine")
    claim(partial, _fingerprint(folder, gates, data.digest(), settings, recipe.routing))
    tokenizer = load_tokenizer(folder)
    examples = [example.example for example in data.train_examples]
    rows = training.fitting(tokenizer, examples, settings.max_length, "gate_training.refinement")

    model = load_model(ModelSource("fused", folder), "sdpa", recipe.loading)  # which keeps packed rows apart
    model.config.use_cache = False
    model.requires_grad_(False)
    routers = train_routers(model, gates, saved)
    model.train()  # the fused model has no dropout: the routers alone tell

    def held_out_loss() -> float:
        return domain_mean(model, tokenizer, data.held_out_examples, settings.batch_rows)

    def loss(model: Any, batch: training.Batch) -> tuple[torch.Tensor, int]:
        nats, answers = answer_loss(model, batch)
        if settings.load_balance:
            nats = nats + settings.load_balance * answers * load_balance(routers, batch["position_ids"])
        return nats, answers

    before = round(held_out_loss(), 5)
    pad = tokenizer.pad_token_id or 0
    done = training.train(model, rows, partial, settings, pad, before, held_out_loss, saved, loss, keep_start=True)
    curve = dict(done.curve)
    seconds = round(time.monotonic() - began, 1)
    result = Refined(before, curve[done.best_step], done.best_step, settings.steps, done.tokens, seconds, done.curve)
    refined = trained_gates(model, saved)
    release(partial)
    return refined, result


def load_balance(routers: Sequence[TrainedRouter], positions: torch.Tensor) -> torch.Tensor:
    """transformers' load-balance loss of the last forward pass; 1 where tokens spread evenly over the experts.

    `positions`, `(sequences, width)`, are a packed batch's: what has position 0 and no successor is padding.
    """
    real = positions > 0
    real[:, :-1] |= positions[:, 1:] == 1
    logits = tuple(router.logits for router in routers)
    loss: torch.Tensor = load_balancing_loss_func(logits, logits[0].shape[1], routers[0].top_k, real)
    return loss


def domain_mean(model: Any, tokenizer: Any, held_out: Sequence[RoutingExample], batch_rows: int) -> float:
    """The whole model's answer loss in nats a token, in the mean over domains."""
    losses = answer_losses(model, tokenizer, [example.example for example in held_out], batch_rows)
    return mean_loss(by_domain(losses, [example.domain for example in held_out]))


def _fingerprint(folder: Path, gates: Gates, *parts: Any) -> str:
    """A hash of all that decides the steps."""
    stamps = [stamp for stamp in weight_stamps(folder) if stamp[0] != GATES_FILE]
    return hashlib.sha256(repr((stamps, gates_hash(gates), parts)).encode()).hexdigest()
