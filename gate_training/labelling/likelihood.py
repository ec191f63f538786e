"""Likelihood labels: which expert the text itself asks for, token by token.

Every expert reads the conversation alone (label-forced routing through the fused checkpoint, which for an anchored
expert is that expert). A token's label is the softmax over the experts of the log-likelihood that they give to the
tokens around it, so that mixed text (a JSON answer in a dialogue on mathematics) changes hands within a conversation.
MergeME (2025) routes whole sequences by perplexity; here it is a window a token. The mean over an answer is what this
channel says of a whole example.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from fusion.checkpoint import Checkpoint
from fusion.data import ChatExample
from fusion.encoding import encode_batches, load_tokenizer
from fusion.layers import Batch, LayerStream, forced
from fusion.recipe import Recipe


@dataclass(frozen=True)
class LikelihoodLabel:
    """The expert that a text asks for: its own domain, all domains that it serves, its share of the text."""

    domain: str
    serves: tuple[str, ...]
    confidence: float


def answer_labels(recipe: Recipe, folder: Path, examples: Sequence[ChatExample]) -> list[LikelihoodLabel]:
    """What the experts of the fused model in `folder` say of each example, by its answer's tokens."""
    settings, experts = recipe.gate_training, len(recipe.experts)
    batches = encode_batches(
        load_tokenizer(folder), examples, max_length=settings.max_length, batch_tokens=settings.batch_tokens
    )
    shares = torch.zeros(len(examples), experts)
    for batch, found in zip(
        batches, token_targets(Checkpoint(folder), batches, experts, settings.window, answers=True), strict=True
    ):
        placed = torch.zeros(*batch.ids.shape, experts)  # (rows, length, experts)
        placed[batch.real] = found
        wanted = (batch.answer & batch.real)[:, 1:, None]  # the prediction at t is of token t + 1
        shares[batch.rows] = (placed[:, :-1] * wanted).sum(dim=1) / wanted.sum(dim=1).clamp_min(1)
    serves = [tuple(name for name in recipe.domains if recipe.expert_of(name) == index) for index in range(experts)]
    return [
        LikelihoodLabel(recipe.experts[index].domain, serves[index], share)
        for share, index in zip(shares.amax(dim=1).tolist(), shares.argmax(dim=1).tolist(), strict=True)
    ]


def token_targets(
    checkpoint: Checkpoint, batches: list[Batch], experts: int, window: int, answers: bool = False
) -> list[torch.Tensor]:
    """For each batch the experts' shares of every real token, `(tokens, experts)`.

    Position t asks an expert to predict token t + 1; the log-likelihoods of the predictions at t - `window` to
    t + `window` are added up, with `answers` those of answer tokens alone.
    """
    scores = [torch.zeros(*batch.ids.shape, experts) for batch in batches]  # (rows, length, experts)
    for expert in range(experts):
        stream = LayerStream(checkpoint, batches, description=f"likelihood of expert {expert + 1} of {experts}")
        stream.run(forced(expert))
        for number, (_, nats) in enumerate(stream.token_nats(answers)):
            scores[number][:, :-1, expert] = -nats[:, 1:]  # the prediction at t is of token t + 1
    return [_shares(score, batch, window) for score, batch in zip(scores, batches, strict=True)]


def _shares(scores: torch.Tensor, batch: Batch, window: int) -> torch.Tensor:
    """Softmax over experts of log-likelihoods `(rows, length, experts)` summed over the window; real tokens alone."""
    width = 2 * window + 1
    summed = F.avg_pool1d(scores.transpose(1, 2), width, stride=1, padding=window) * width  # zeros beyond both ends
    return torch.softmax(summed.transpose(1, 2)[batch.real], dim=1)  # (tokens, experts)
