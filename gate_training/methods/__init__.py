"""One file a method: labelled gate inputs in, a gate out.

Every method is `fit(tokens, experts, hidden, settings) -> gate (experts, hidden)`, where `tokens()` starts a fresh pass
that yields `(gate inputs (tokens, hidden), expert labels (tokens,))` batch by batch, so that no method needs all tokens
in memory.
"""

from collections.abc import Callable, Iterator

import torch

TokenPass = Callable[[], Iterator[tuple[torch.Tensor, torch.Tensor]]]
