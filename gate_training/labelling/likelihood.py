"""Likelihood labels: which expert the text itself asks for, token by token.

Every expert reads the conversation alone (label-forced routing through the fused checkpoint, which for an anchored
expert is that expert). A token's label is the softmax over the experts of the log-likelihood that they give to the
tokens around it, so that mixed text (a JSON answer in a dialogue on mathematics) changes hands within a conversation.
MergeME (2025) routes whole sequences by perplexity; here it is a window a token.
"""

import torch
import torch.nn.functional as F

from fusion.checkpoint import Checkpoint
from fusion.layers import Batch, LayerStream, forced


def token_targets(checkpoint: Checkpoint, batches: list[Batch], experts: int, window: int) -> list[torch.Tensor]:
    """For each batch the experts' shares of every real token, `(tokens, experts)`.

    Position t asks an expert to predict token t + 1; the log-likelihoods of the predictions at t - `window` to
    t + `window` are added up.
    """
    scores = [torch.zeros(*batch.ids.shape, experts) for batch in batches]  # (rows, length, experts)
    for expert in range(experts):
        stream = LayerStream(checkpoint, batches, description=f"likelihood of expert {expert + 1} of {experts}")
        stream.run(forced(expert))
        for number, (_, nats) in enumerate(stream.token_nats()):
            scores[number][:, :-1, expert] = -nats[:, 1:]  # the prediction at t is of token t + 1
    return [_shares(score, batch, window) for score, batch in zip(scores, batches, strict=True)]


def _shares(scores: torch.Tensor, batch: Batch, window: int) -> torch.Tensor:
    """Softmax over experts of log-likelihoods `(rows, length, experts)` summed over the window; real tokens alone."""
    width = 2 * window + 1
    summed = F.avg_pool1d(scores.transpose(1, 2), width, stride=1, padding=window) * width  # zeros beyond both ends
    return torch.softmax(summed.transpose(1, 2)[batch.real], dim=1)  # (tokens, experts)
