"""One more row for a gate whose other rows stay as they are: an expert that joins later.

Where tokens of all domains are at hand the row minimises the cross-entropy of the whole softmax, which is convex in it
alone. Where sums stand for the others' (gate_training/statistics.py), it is least squares: 0 on their tokens, on its
own as much more than the best of the other rows as those are apart.
"""

import torch

from fusion.sections.fusing import GateTraining
from gate_training.methods.ridge import solution
from gate_training.methods.solver import label_loss, minimise
from gate_training.methods.tokens import Moments, TokenPass, Tokens, summed

GAPS = (0.25, 0.5, 1.0, 2.0, 4.0)  # of what the other rows are apart


def fit(
    tokens: TokenPass,
    judges: TokenPass,
    moments: Moments,
    settings: GateTraining,
    rows: torch.Tensor,
    index: int,
) -> torch.Tensor:
    """The gate `(experts, hidden)` in float32: `rows` `(experts - 1, hidden)` and a new one at `index`.

    `moments` are sums over all experts' tokens. `tokens` are these, or, where `judges` are others, the new one's alone.
    """
    rows = rows.float()
    start = _least_squares(tokens, judges, moments, settings, rows, index)
    if judges is not tokens:
        return with_row(rows, start, index)

    def row_loss(scores: torch.Tensor, part: Tokens) -> tuple[torch.Tensor, torch.Tensor]:
        losses, slopes = label_loss(_scores(part, rows, scores[:, 0], index), part)
        return losses, slopes[:, index : index + 1]

    return with_row(rows, minimise(tokens, moments, start[None], row_loss)[0], index)


def with_row(rows: torch.Tensor, row: torch.Tensor, index: int) -> torch.Tensor:
    """`rows` `(experts - 1, hidden)` with `row` `(hidden,)` at `index`."""
    return torch.cat([rows[:index], row[None].to(rows), rows[index:]])


def _least_squares(
    tokens: TokenPass,
    judges: TokenPass,
    moments: Moments,
    settings: GateTraining,
    rows: torch.Tensor,
    index: int,
) -> torch.Tensor:
    """The row `(hidden,)` whose gap on its own tokens, of GAPS, loses least on the judges."""
    spread, count = torch.zeros(()), torch.zeros(())
    for part in judges.sample():
        old = part.targets[:, index] < 0.5
        scores = part.inputs[old] @ rows.T.to(part.inputs)  # (tokens, experts - 1)
        apart = scores.max(dim=1).values - scores.mean(dim=1)
        spread, count = spread + apart.sum().cpu(), count + len(apart)
    spread = summed(spread) / summed(count).clamp_min(1)
    best = own = torch.zeros(len(moments.gram), dtype=torch.double)
    for part in tokens():
        mine = part.inputs[part.targets[:, index] >= 0.5]
        others = (mine @ rows.T.to(mine)).max(dim=1).values  # (tokens,)
        best, own = best + (mine.T @ others).double().cpu(), own + mine.double().sum(dim=0).cpu()
    wanted = Moments(moments.gram, torch.stack([summed(best), summed(own)], dim=1), moments.count)
    base, slope = solution(wanted, settings.ridge).float()
    found = [base + gap * spread * slope for gap in GAPS]
    losses = torch.zeros(len(GAPS), dtype=torch.double)
    for part in judges.sample():
        for i, row in enumerate(found):
            scores = _scores(part, rows, part.inputs @ row.to(part.inputs), index)
            losses[i] += float(label_loss(scores, part)[0].double().sum())
    return found[int(summed(losses).argmin())]


def _scores(part: Tokens, rows: torch.Tensor, new: torch.Tensor, index: int) -> torch.Tensor:
    """The scores `(tokens, experts)` of `rows` and of a row whose scores are `new` `(tokens,)`."""
    others = part.inputs @ rows.T.to(part.inputs)  # (tokens, experts - 1)
    return torch.cat([others[:, :index], new[:, None], others[:, index:]], dim=1)
