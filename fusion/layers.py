"""A model as a sequence of layers over stored hidden states, with one layer's weights in memory.

    stream = LayerStream(Checkpoint(folder), batches)
    for layer in stream:
        layer.attend()                                   # attention half; the states are now the MLP's residual
        for batch in batches:
            x = stream.inputs(batch)                     # (tokens, hidden): what the gate of this layer sees
        layer.mix(gated(gates, top_k))                   # MLP half, each token through the experts its route picks
    for batch, logits in stream.logits(): ...

Everything that looks inside a model passes through here: gate training, and which experts served a text.
Dense (Qwen2) and fused (Qwen2MoE) checkpoints are both a source of layers, their experts read one at a time. The
arithmetic is transformers' own attention and rotary modules and the MoE block's formula, checked against both models
token by token in the tests.
"""

import hashlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from transformers import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, Qwen2RMSNorm, Qwen2RotaryEmbedding

from fusion.architecture import MLP_PARTS, gate_tensor, rope_scaling, rope_theta
from fusion.checkpoint import Checkpoint
from fusion.hardware import stream_device
from fusion.progress import progress_bar

STORE_BYTES = 2 * 2**30  # hidden states beyond this lie in a file
ATTENTION_INPUTS = ("q_proj", "o_proj")  # the first stands for k_proj and v_proj as well
HEAD_TOKENS = 512  # whose logits over the vocabulary are in memory at a time
MLP_TOKENS = 2048  # that pass an MLP at a time


@dataclass(frozen=True)
class Batch:
    """Right-padded token ids `(rows, length)`; `real` marks what is not padding, `answer` the answers' tokens.

    `start` is the batch's first row in the store of hidden states, which holds `(all rows x length, hidden)`.
    `labels` is the domain's expert of each row, -1 where there is none.
    """

    ids: torch.Tensor
    real: torch.Tensor
    answer: torch.Tensor
    labels: torch.Tensor  # (rows,)
    rows: torch.Tensor  # (rows,) position of each row in the caller's list
    start: int

    @property
    def span(self) -> slice:
        """The batch's rows in the flat store."""
        return slice(self.start, self.start + self.ids.numel())

    def token_labels(self) -> torch.Tensor:
        """The label of every real token, `(tokens,)`."""
        return self.labels[:, None].expand_as(self.ids)[self.real]


@dataclass(frozen=True)
class Choice:
    """The experts of each token and their weights, both `(tokens, k)`."""

    experts: torch.Tensor
    weights: torch.Tensor


class Source(Protocol):
    """Where layers are read from: an open checkpoint, dense or fused, or what stands for one."""

    config: dict[str, Any]

    def __contains__(self, name: str) -> bool: ...

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor `name`."""

    def tensors(self, prefix: str) -> dict[str, torch.Tensor]:
        """All tensors whose names start with `prefix`, under the rest of their names."""


Gates = dict[int, torch.Tensor]  # {layer: (experts, hidden)}
Inputs = Callable[[str, Batch, torch.Tensor], None]  # (linear map of an attention, batch, its inputs (tokens, in))
Route = Callable[[int, torch.Tensor, Batch], Choice]  # (layer, gate input (tokens, hidden), batch) -> Choice


def make_batches(
    token_ids: Sequence[Sequence[int]],
    answer_starts: Sequence[int] | None = None,
    labels: Sequence[int] | None = None,
    batch_tokens: int = 4096,
) -> list[Batch]:
    """Groups rows of like length into right-padded batches of at most `batch_tokens` ids (at least one row)."""
    order = sorted(range(len(token_ids)), key=lambda i: len(token_ids[i]))
    batches: list[Batch] = []
    start = 0
    position = 0
    while position < len(order):
        rows: list[int] = []
        while position < len(order):
            width = len(token_ids[order[position]])  # rows come in order of length: the newest is the widest
            if rows and (len(rows) + 1) * width > batch_tokens:
                break
            rows.append(order[position])
            position += 1
        length = len(token_ids[rows[-1]])
        ids = torch.zeros(len(rows), length, dtype=torch.long)
        real = torch.zeros(len(rows), length, dtype=torch.bool)
        answer = torch.zeros(len(rows), length, dtype=torch.bool)
        for line, row in enumerate(rows):
            count = len(token_ids[row])
            ids[line, :count] = torch.tensor(token_ids[row])
            real[line, :count] = True
            answer[line, answer_starts[row] if answer_starts else 0 : count] = True
        row_labels = torch.tensor([labels[row] if labels else -1 for row in rows])
        batches.append(Batch(ids, real, answer, row_labels, torch.tensor(rows), start))
        start += ids.numel()
    return batches


def joined(groups: Sequence[list[Batch]]) -> list[Batch]:
    """Groups of batches as one list over one store, the rows of each group numbered after those of the one before."""
    found: list[Batch] = []
    rows = start = 0
    for group in groups:
        found += [replace(b, rows=b.rows + rows, start=b.start + start) for b in group]
        rows += sum(len(b.rows) for b in group)
        start += sum(b.ids.numel() for b in group)
    return found


def normalised_top_k(logits: torch.Tensor, k: int) -> Choice:
    """Qwen2MoE's router on logits `(tokens, experts)`: softmax, top-k, weights scaled to sum 1."""
    probabilities = torch.softmax(logits.float(), dim=-1)
    weights, experts = torch.topk(probabilities, k, dim=-1)
    return Choice(experts, weights / weights.sum(dim=-1, keepdim=True))


def forced(expert: int | None = None) -> Route:
    """Every token to one expert, or (None) to the expert that its row is labelled with."""

    def route(layer: int, x: torch.Tensor, batch: Batch) -> Choice:
        chosen = batch.token_labels() if expert is None else torch.full((x.shape[0],), expert)
        return Choice(chosen[:, None].to(x.device), torch.ones(x.shape[0], 1, device=x.device))

    return route


def gated(gates: Gates, top_k: int) -> Route:
    """Each token to the top-k experts of `gates`."""

    def route(layer: int, x: torch.Tensor, batch: Batch) -> Choice:
        return normalised_top_k(x.float() @ gates[layer].to(x.device).float().T, top_k)

    return route


def checkpoint_gates(checkpoint: Checkpoint) -> Gates:
    """The gates of a fused checkpoint."""
    layers = range(checkpoint.config["num_hidden_layers"])
    return {i: checkpoint.tensor(gate_tensor(i)) for i in layers if gate_tensor(i) in checkpoint}


def gates_hash(gates: Gates) -> str:
    """A hash of gates' values."""
    digest = hashlib.sha256()
    for _, gate in sorted(gates.items()):
        digest.update(gate.float().numpy().tobytes())
    return digest.hexdigest()


class Layer:
    """One decoder layer over the stream's hidden states; its attention's weights live as long as the object."""

    def __init__(self, stream: "LayerStream", index: int):
        self.index = index
        self.device = stream.device
        self._stream = stream
        self._prefix = f"model.layers.{index}."
        with torch.device("meta"):
            self._attention = Qwen2Attention(stream.model_config, index)
            self._norm_in = Qwen2RMSNorm(stream.hidden, eps=stream.eps)
            self._norm_mlp = Qwen2RMSNorm(stream.hidden, eps=stream.eps)
        for module, name in (
            (self._attention, "self_attn."),
            (self._norm_in, "input_layernorm."),
            (self._norm_mlp, "post_attention_layernorm."),
        ):
            module.load_state_dict(self._read(name), assign=True)
        self.experts = 0
        while f"{self._prefix}mlp.experts.{self.experts}.gate_proj.weight" in stream.checkpoint:
            self.experts += 1
        self._mlps: dict[str, dict[str, torch.Tensor]] = {}

    @property
    def sparse(self) -> bool:
        """Whether the layer has experts."""
        return self.experts > 0

    def _read(self, part: str) -> dict[str, torch.Tensor]:
        tensors = self._stream.checkpoint.tensors(self._prefix + part)
        return {name: tensor.to(self.device, self._stream.dtype) for name, tensor in tensors.items()}

    @torch.no_grad()
    def attend(self, observe: Inputs | None = None) -> None:
        """Adds the attention's output to the states of every batch, in place, and makes the MLPs' inputs of them.

        `observe` sees what goes into `q_proj` (and `k_proj`, `v_proj`) and into `o_proj`, real tokens alone.
        """
        for batch in self._stream.batches:
            states = self._stream.load(batch)  # (rows, length, hidden)
            positions = torch.arange(states.shape[1], device=states.device)[None]
            rotary = self._stream.rotary(states, positions)
            with self._watched(batch, observe):
                # right padding under a causal mask: no real token ever looks at a padded one
                update, _ = self._attention(self._norm_in(states), rotary, attention_mask=None)
            states += update
            self._stream.store(batch, states)
            self._stream.inputs(batch).copy_(self._norm_mlp(states)[batch.real.to(self.device)])
            self._stream.passed(int(batch.real.sum()))

    @contextmanager
    def _watched(self, batch: Batch, observe: Inputs | None) -> Iterator[None]:
        with ExitStack() as stack:
            if observe is not None:
                for name in ATTENTION_INPUTS:
                    module, seen = getattr(self._attention, name), partial(observe, name, batch)
                    hook = module.register_forward_pre_hook(lambda _, args, seen=seen: seen(args[0][batch.real]))
                    stack.callback(hook.remove)
            yield

    @torch.no_grad()
    def mix(self, route: Route) -> None:
        """Sends every token through the MLPs that `route` picks and adds their outputs to the states, in place."""
        stream = self._stream
        every = torch.arange(stream.tokens)
        if not self.sparse:
            self._pass("mlp.", every, None)
            return
        choices = [route(self.index, stream.inputs(batch).to(self.device), batch) for batch in stream.batches]
        experts = torch.cat([choice.experts.cpu() for choice in choices])  # (tokens, k)
        weights = torch.cat([choice.weights.float().cpu() for choice in choices])
        for expert in range(self.experts):
            token, slot = (experts == expert).nonzero(as_tuple=True)
            if len(token):
                self._pass(f"mlp.experts.{expert}.", token, weights[token, slot, None], 1 / experts.shape[1])
        if f"{self._prefix}mlp.shared_expert.gate_proj.weight" in stream.checkpoint:
            gate = self._read("mlp.shared_expert_gate.")["weight"]
            shares = [torch.sigmoid(F.linear(stream.inputs(batch).to(self.device), gate)) for batch in stream.batches]
            self._pass("mlp.shared_expert.", every, torch.cat(shares).float().cpu(), 0)
        self._mlps.clear()

    def _pass(self, mlp: str, tokens: torch.Tensor, weights: torch.Tensor | None, share: float = 1) -> None:
        """Adds the output of one MLP, times `weights` `(tokens, 1)`, to the states of `tokens`, by number.

        `share` is the part of a token's way through the layer that this is, for the bar.
        """
        for start in range(0, len(tokens), MLP_TOKENS):
            part = tokens[start : start + MLP_TOKENS]
            output = self._mlp(mlp, self._stream.inputs(part).to(self.device))  # (part, hidden)
            if weights is not None:
                output *= weights[start : start + MLP_TOKENS].to(self.device, output.dtype)
            self._stream.add(part, output)
            self._stream.passed(share * len(part))
        self._mlps.pop(mlp, None)

    @torch.no_grad()
    def every_expert(self, x: torch.Tensor) -> torch.Tensor:
        """What each routed expert makes of gate input `x`, `(experts, tokens, hidden)`; kept in memory for `mix`."""
        x = x.to(self.device, self._stream.dtype)
        return torch.stack([self._mlp(f"mlp.experts.{expert}.", x) for expert in range(self.experts)])

    def dense_mlp(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """A dense layer's gate_proj and up_proj, `(intermediate, hidden)`, and down_proj, `(hidden, intermediate)`."""
        return self._weights("mlp.")

    def replace_dense_mlp(self, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> None:
        """Puts other weights of the same shapes in the place of a dense layer's MLP, until `mix` has passed them."""
        parts = zip(MLP_PARTS, (gate, up, down), strict=True)
        self._mlps["mlp."] = {f"{part}.weight": weight.to(self.device, self._stream.dtype) for part, weight in parts}

    @torch.no_grad()
    def dense_output(self, x: torch.Tensor) -> torch.Tensor:
        """What a dense layer's MLP makes of `x` `(tokens, hidden)`."""
        return self._mlp("mlp.", x)

    def _weights(self, mlp: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if mlp not in self._mlps:
            self._mlps[mlp] = self._read(mlp)
        gate, up, down = (self._mlps[mlp][f"{part}.weight"] for part in MLP_PARTS)
        return gate, up, down

    def _mlp(self, name: str, x: torch.Tensor) -> torch.Tensor:
        gate, up, down = self._weights(name)
        return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


class LayerStream:
    """Tokens on their way through a checkpoint, layer by layer.

    The hidden states `(all rows x length, hidden)` lie in a `state_store`, what the MLPs of a layer see of the `tokens`
    real ones `(tokens, hidden)` in another; one layer at a time is on `device`, a GPU where there is one.
    """

    def __init__(
        self,
        checkpoint: Source,
        batches: list[Batch],
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        memory_bytes: int = STORE_BYTES,
        description: str | None = None,
    ):
        config = checkpoint.config
        self.checkpoint, self.batches, self.dtype = checkpoint, batches, dtype
        self.device = torch.device(device or stream_device())
        self.hidden, self.eps = config["hidden_size"], config["rms_norm_eps"]
        self.layers = config["num_hidden_layers"]
        self.model_config = attention_config(config)
        self.rotary = Qwen2RotaryEmbedding(self.model_config).to(self.device)
        self._description = description
        self.passed: Callable[[float], None] = _ignore  # takes the tokens that half a layer is done for
        self._place = torch.cat([batch.start + batch.real.flatten().nonzero()[:, 0] for batch in batches])  # (tokens,)
        self.tokens = len(self._place)
        counts = [int(batch.real.sum()) for batch in batches]
        self._first = dict(zip([b.start for b in batches], accumulate([0, *counts]), strict=False))
        self._next = 0  # the layer that comes next
        self._states = state_store(sum(batch.ids.numel() for batch in batches), self.hidden, dtype, memory_bytes)
        self._inputs = state_store(self.tokens, self.hidden, dtype, memory_bytes)
        embedding = checkpoint.tensor("model.embed_tokens.weight")
        for batch in batches:
            self.store(batch, F.embedding(batch.ids, embedding).to(dtype))

    def __iter__(self) -> Iterator[Layer]:
        if self._description is None:
            yield from (Layer(self, index) for index in range(self._next, self.layers))
            return
        with progress_bar() as bar:
            total = 2 * (self.layers - self._next) * self.tokens
            task = bar.add_task(self._description, total=total, unit="half-layer tokens")
            self.passed = partial(bar.advance, task)
            for index in range(self._next, self.layers):
                bar.update(task, description=f"{self._description}, layer {index} of {self.layers}")
                yield Layer(self, index)

    @property
    def states(self) -> torch.Tensor:
        """All hidden states, `(all rows x length, hidden)`."""
        return self._states

    def resume(self, layer: int, states: torch.Tensor) -> None:
        """Goes on with `layer` from the `states` that the one before has left."""
        self._states.copy_(states)
        self._next = layer

    def load(self, batch: Batch) -> torch.Tensor:
        """A copy of the batch's states, `(rows, length, hidden)`, on the stream's device."""
        flat = self._states[batch.span].to(self.device, copy=True)
        return flat.view(*batch.ids.shape, self.hidden)

    def store(self, batch: Batch, states: torch.Tensor) -> None:
        """Puts the batch's states back."""
        self._states[batch.span] = states.reshape(-1, self.hidden).to(self._states.device)

    def inputs(self, of: Batch | slice | torch.Tensor) -> torch.Tensor:
        """What the gate and the MLPs see of a batch, or of tokens by number, `(tokens, hidden)`, after `attend`.

        A batch's, and a slice, are parts of the store, which the next layer fills anew.
        """
        return self._inputs[self.tokens_of(of) if isinstance(of, Batch) else of]

    def tokens_of(self, batch: Batch) -> slice:
        """The numbers of the batch's real tokens."""
        first = self._first[batch.start]
        return slice(first, first + int(batch.real.sum()))

    def add(self, tokens: torch.Tensor, update: torch.Tensor) -> None:
        """Adds `update` `(tokens, hidden)` to the states of `tokens`, by number."""
        self._states.index_add_(0, self._place[tokens], update.to(self._states.device, self._states.dtype))

    def run(self, route: Route, observe: Callable[[Layer, Batch, torch.Tensor, Choice], None] | None = None) -> None:
        """All layers under one routing rule; `observe` sees each sparse layer's gate inputs and choices."""

        def watched(layer: Layer) -> Route:
            def choose(index: int, x: torch.Tensor, batch: Batch) -> Choice:
                choice = route(index, x, batch)
                if observe is not None:
                    observe(layer, batch, x, Choice(choice.experts.cpu(), choice.weights.cpu()))
                return choice

            return choose

        for layer in self:
            layer.attend()
            layer.mix(watched(layer))

    @torch.no_grad()
    def head_inputs(self) -> Iterator[tuple[Batch, torch.Tensor]]:
        """After the last layer: each batch with what the head sees of its real tokens, `(tokens, hidden)`."""
        norm, _ = self._final()
        for batch in self.batches:
            yield batch, norm(self.load(batch)[batch.real.to(self.device)])

    def _final(self) -> tuple[Qwen2RMSNorm, torch.Tensor]:
        """The norm after the last layer, and the head `(vocabulary, hidden)`, tied or not."""
        norm = Qwen2RMSNorm(self.hidden, eps=self.eps).to(self.device)
        weight = self.checkpoint.tensor("model.norm.weight").to(self.device, self.dtype)
        norm.load_state_dict({"weight": weight}, assign=True)
        tied = "lm_head.weight" not in self.checkpoint
        head = self.checkpoint.tensor("model.embed_tokens.weight" if tied else "lm_head.weight")
        return norm, head.to(self.device, self.dtype)

    @torch.no_grad()
    def logits(self) -> Iterator[tuple[Batch, torch.Tensor]]:
        """After the last layer: each batch with its logits `(rows, length, vocabulary)`; for short texts."""
        norm, head = self._final()
        for batch in self.batches:
            yield batch, F.linear(norm(self.load(batch)), head)

    @torch.no_grad()
    def token_nats(self, answers: bool = False) -> Iterator[tuple[Batch, torch.Tensor]]:
        """After the last layer: each batch with the loss in nats of each token given those before, `(rows, length)`.

        0 for first tokens and padding, and with `answers` for all but the answers' tokens.
        """
        norm, head = self._final()
        for batch in self.batches:
            wanted = (batch.answer & batch.real if answers else batch.real).clone()
            wanted[:, 0] = False
            states = norm(self.load(batch))[:, :-1][wanted[:, 1:].to(self.device)]  # (predictions, hidden)
            ids = batch.ids[wanted].to(self.device)
            losses = [
                F.cross_entropy(F.linear(x, head).float(), y, reduction="none").cpu()
                for x, y in zip(states.split(HEAD_TOKENS), ids.split(HEAD_TOKENS), strict=True)
            ]
            nats = torch.zeros(batch.ids.shape)
            nats[wanted] = torch.cat(losses) if losses else torch.zeros(0)
            yield batch, nats


def _ignore(tokens: float) -> None:
    """Without a bar."""


def attention_config(config: dict[str, object]) -> Qwen2Config:
    """The Qwen2Config of a dense or fused checkpoint's attention and rotary embedding, on SDPA."""
    names = [
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "rms_norm_eps",
        "max_position_embeddings",
        "attention_dropout",
    ]
    settings = {name: config[name] for name in names if name in config}
    rope = rope_scaling(config) or {"rope_type": "default"}
    built = Qwen2Config(**settings, rope_parameters={"rope_theta": rope_theta(config), **rope})
    built._attn_implementation = "sdpa"
    return built


def state_store(
    rows: int, hidden: int, dtype: torch.dtype = torch.float32, memory_bytes: int = STORE_BYTES
) -> torch.Tensor:
    """Room for `(rows, hidden)`, in memory or, beyond `memory_bytes`, in an unlinked memory-mapped file."""
    if rows * hidden * dtype.itemsize <= memory_bytes:
        return torch.empty(rows, hidden, dtype=dtype)
    with tempfile.NamedTemporaryFile(prefix="qwen-fusion-states-") as file:  # unlinked on leaving; the mapping lives on
        return torch.from_file(file.name, shared=True, size=rows * hidden, dtype=dtype).view(rows, hidden)
