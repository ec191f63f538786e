"""The training tokens of a layer stream as what the methods pass over: gate inputs, labels, what experts would cost."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch.nn.functional import one_hot

from fusion.layers import STORE_BYTES, Batch, Layer, LayerStream
from gate_training.methods.regression import costs
from gate_training.methods.tokens import Tokens, held_back

CHUNK = 2048  # tokens a method sees at a time
SAMPLE = 32  # tokens for every dimension of the hidden states choose a penalty


class LayerTokens:
    """The tokens of `batches`, which follow each other in `stream`; a call is one pass over them at the layer reached.

    `targets` `(tokens, experts)`: the share of each expert that the labels ask for. `marks` `(tokens, 2)`: which are
    held back, which are sampled. With `top_k` every expert is run on the tokens, for what it costs. On a GPU the tokens
    are there as far as the layer's inputs fit STORE_BYTES.
    """

    def __init__(
        self,
        stream: LayerStream,
        batches: Sequence[Batch],
        targets: torch.Tensor,
        marks: torch.Tensor,
        top_k: int | None = None,
    ):
        self._stream, self._top_k = stream, top_k
        first = stream.tokens_of(batches[0]).start if batches else 0
        self._span = slice(first, first + len(targets))
        answers = torch.cat([torch.zeros(0, dtype=torch.bool), *(batch.answer[batch.real] for batch in batches)])
        held = marks[:, 0]
        parts = (part.to(stream.device) for part in (targets, held, held & answers))
        self._all = Tokens(torch.empty(0), *parts)
        self._sampled = marks[:, 1].nonzero()[:, 0].to(stream.device)  # (sample,)
        self._sample = self._all

    @property
    def hidden(self) -> int:
        """The width of the inputs."""
        return self._stream.hidden

    def reach(self, layer: Layer) -> None:
        """Takes the inputs of `layer`, after its attention."""
        inputs = self._stream.inputs(self._span)
        if inputs.numel() * inputs.element_size() <= STORE_BYTES:
            inputs = inputs.to(self._stream.device)
        self._all = replace(self._all, inputs=inputs)
        if self._top_k is not None:
            found = [costs(layer.every_expert(p.inputs).float(), p.targets, self._top_k) for p in self()]
            self._all = replace(self._all, costs=torch.cat(found))
        everything = len(self._sampled) == len(inputs)
        self._sample = self._all if everything else self._all.part(self._sampled)

    def __call__(self) -> Iterator[Tokens]:
        """One pass over all tokens, CHUNK at a time."""
        return _parts(self._all)

    def sample(self) -> Iterator[Tokens]:
        """One pass over about SAMPLE tokens for every dimension of the hidden states, whole conversations."""
        return _parts(self._sample)


def _parts(tokens: Tokens) -> Iterator[Tokens]:
    for start in range(0, len(tokens.targets), CHUNK):
        part = tokens.part(slice(start, start + CHUNK))
        yield replace(part, inputs=part.inputs.to(part.targets))  # on the labels' device, in float32


def label_targets(batches: Sequence[Batch], experts: int) -> torch.Tensor:
    """All of a token's share to its row's label, `(tokens, experts)`."""
    none = torch.zeros(0, dtype=torch.long)
    return one_hot(torch.cat([none, *(batch.token_labels() for batch in batches)]), experts).float()


def token_marks(batches: Sequence[Batch], hidden: int) -> list[torch.Tensor]:
    """Which tokens of each batch are held back and which are sampled, `(tokens, 2)`, whole conversations by label."""
    labels = torch.empty(sum(len(batch.rows) for batch in batches), dtype=torch.long)  # (rows,)
    for batch in batches:
        labels[batch.rows] = batch.labels
    tokens = sum(int(batch.real.sum()) for batch in batches)
    chosen = torch.stack(held_back(labels, max(1, tokens // (SAMPLE * hidden))), dim=1)  # (rows, 2)
    return [chosen[batch.rows][:, None].expand(*batch.ids.shape, 2)[batch.real] for batch in batches]
