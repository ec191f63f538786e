"""Answer loss by domain of a model, or of one that is yet to be written, under a routing rule: layer by layer."""

from collections.abc import Sequence

import torch

from fusion.layers import Batch, LayerStream, Route, Source

Nats = tuple[float, int]  # summed over a row's answer tokens; how many they are


def answer_losses(
    source: Source,
    batches: list[Batch],
    domains: Sequence[str],
    route: Route,
    description: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> dict[str, float]:
    """Nats per answer token, {domain: loss}; `domains` names each row's, by the batches' row numbers."""
    return by_domain(answer_nats(source, batches, route, description, dtype), domains)


def answer_nats(
    source: Source,
    batches: list[Batch],
    route: Route,
    description: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> list[Nats]:
    """Of each row, by the batches' row numbers, the summed nats of its answer's tokens and how many these are."""
    stream = LayerStream(source, batches, dtype=dtype, description=description)
    stream.run(route)
    found: dict[int, Nats] = {}
    for batch, nats in stream.token_nats(answers=True):
        for line, row in enumerate(batch.rows.tolist()):
            found[row] = float(nats[line].sum()), int((batch.answer & batch.real)[line].sum())
    return [found[row] for row in sorted(found)]


def by_domain(rows: Sequence[Nats], domains: Sequence[str]) -> dict[str, float]:
    """Nats a token of rows whose domains are `domains`."""
    sums = {domain: [0.0, 0] for domain in domains}
    for (nats, tokens), domain in zip(rows, domains, strict=True):
        sums[domain][0] += nats
        sums[domain][1] += tokens
    return {domain: nats / max(1, tokens) for domain, (nats, tokens) in sums.items()}
