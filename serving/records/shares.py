"""The experts' shares of a request, as the engine itself tells them: vLLM's `routed_experts`, decoded.

    shares_of("k05VTVBZ...", ("general", "math"), sparse_layers=(12, 13, 14, 15), prompt_tokens=24)

vLLM gives the experts of every token and layer, not their weights: a share is of the tokens' places among the top-k.
"""

import base64
import io
from collections.abc import Sequence

import numpy as np

from serving.records.record import WHOLE, Shares

GROUPS = ("early", "middle", "late")  # thirds of the sparse layers


def shares_of(encoded: str, experts: Sequence[str], sparse_layers: Sequence[int], prompt_tokens: int = 0) -> Shares:
    """Each expert's share by group of layers, from a base64 .npy of expert numbers `(tokens, layers, top_k)`.

    Of the answer's tokens, where it is told how many the prompt has; the last one was not routed any more. Dense layers
    are in the array, and say nothing. Raises ValueError on what is no such array.
    """
    routes = np.load(io.BytesIO(base64.b64decode(encoded, validate=True)), allow_pickle=False)
    if routes.ndim != 3 or not routes.size or (sparse_layers and max(sparse_layers) >= routes.shape[1]):
        raise ValueError(f"routed_experts of shape {routes.shape} are not (tokens, layers, top_k) of this model")
    if prompt_tokens < len(routes):
        routes = routes[prompt_tokens:]
    chosen = routes[:, list(sparse_layers)]  # (tokens, sparse layers, top_k)
    if chosen.min() < 0 or chosen.max() >= len(experts):
        raise ValueError(f"routed_experts name an expert beyond the {len(experts)} there are")
    counts = np.stack([(chosen == expert).sum(axis=(0, 2)) for expert in range(len(experts))])  # (experts, layers)
    return grouped(counts, experts)


def grouped(weights: np.ndarray, experts: Sequence[str]) -> Shares:
    """Shares from each expert's weight by sparse layer, `(experts, layers)`: of all layers, and of thirds of them."""
    parts = {WHOLE: weights, **dict(zip(GROUPS, np.array_split(weights, len(GROUPS), axis=1), strict=True))}
    found: Shares = {}
    for name, part in parts.items():
        total = part.sum()
        if total > 0:
            shares = part.sum(axis=1) / total
            found[name] = {e: round(float(share), 4) for e, share in zip(experts, shares, strict=True)}
    return found
