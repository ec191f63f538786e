"""Answer loss by domain of a model, or of one that is yet to be written, under a routing rule: layer by layer."""

from collections.abc import Sequence

import torch

from fusion.layers import Batch, LayerStream, Route, Source


def answer_losses(
    source: Source,
    batches: list[Batch],
    domains: Sequence[str],
    route: Route,
    description: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> dict[str, float]:
    """Nats per answer token, {domain: loss}; `domains` names each row's, by the batches' row numbers."""
    stream = LayerStream(source, batches, dtype=dtype, description=description)
    stream.run(route)
    sums = {domain: [0.0, 0] for domain in domains}
    for batch, nats in stream.token_nats(answers=True):
        for line, row in enumerate(batch.rows.tolist()):
            entry = sums[domains[row]]
            entry[0] += float(nats[line].sum())
            entry[1] += int((batch.answer & batch.real)[line].sum())
    return {domain: nats / max(1, tokens) for domain, (nats, tokens) in sums.items()}
