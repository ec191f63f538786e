"""Shared parts: which attention, norms, embeddings and head the fused model gets where its experts have drifted.

    qwen-fusion merge configs/demo-drifted.yaml --set shared=auto

One checkpoint has one attention, so drifted experts have to agree on one: the anchor's, or a mean of theirs by
mergekit's linear, multislerp or karcher, or by RegMean (Jin et al., 2023, arXiv:2212.09849), which asks that every
linear map answers each expert's own inputs as that expert does. `auto` sends every held-out row through its own
expert's MLPs behind each candidate and keeps the one with the least answer loss. The result is an ordinary model,
which the merge takes as its base.
"""

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch
from mergekit.merge_methods.api import merge_tensors
from mergekit.merge_methods.karcher import karcher_merge_tensors

from fusion.architecture import is_mlp, layer_of, part_of, rope_theta, sparse_layers
from fusion.checkpoint import Checkpoint, staged_folder, write_json
from fusion.data import choosing_rows, train_rows
from fusion.encoding import encode_batches, load_tokenizer
from fusion.evaluation.answer_loss import answer_losses
from fusion.grafted import Grafted
from fusion.headers import write_index
from fusion.layers import Batch, Layer, LayerStream, Source, forced
from fusion.merge import checkpoint_dtype, copy_tokenizer, write_generation_config
from fusion.progress import track
from fusion.reader import Reader
from fusion.recipe import Recipe
from fusion.sections.fusing import SharedMethod
from fusion.shards import write_shards
from fusion.sources import SHARED_NOTE, anchor_source, expert_sources

CANDIDATES: tuple[SharedMethod, ...] = get_args(SharedMethod)  # of equals the first is taken
TOLERANCE = 1e-4  # nats by which another candidate has to be better
SHRINK = 0.9  # of a Gram matrix's off-diagonals, the paper's choice
JITTER = 1e-6  # of a Gram matrix's mean diagonal, for inputs that never occur


@dataclass(frozen=True)
class SharedResult:
    """Which method was taken, and by `auto` the held-out answer loss in nats of every candidate, {method: {domain}}.

    `own` is each domain's own expert, alone.
    """

    method: SharedMethod
    losses: dict[str, dict[str, float]]
    own: dict[str, float]
    notes: list[str]

    def sentence(self) -> str:
        """What was taken, and the candidates' gaps where they were compared."""
        table = ", ".join(f"{method} {self.gap(method):+.4f}" for method in self.losses)
        compared = f" (nats a held-out answer token above the own experts': {table})" if table else ""
        return "; ".join([f"shared parts: {self.method}{compared}", *self.notes])

    def gap(self, method: str) -> float:
        """The mean over domains of what `method` loses against the own experts."""
        found = self.losses[method]
        return sum(found[domain] - self.own[domain] for domain in found) / len(found)


def make_shared_parts(recipe: Recipe, out: Path) -> SharedResult:
    """Writes the recipe's shared parts to folder `out`: a model, or a note alone where the anchor's are best."""
    experts = _Experts(recipe)
    with staged_folder(out) as aside:
        if recipe.shared.method == "auto":
            result = _best(experts, aside)
        else:
            result = SharedResult(recipe.shared.method, {}, {}, experts.notes)
            _write_parts(experts, result.method, aside / result.method)
        parts = aside / result.method
        if parts.is_dir():
            _complete(experts.anchor, parts, aside)
        write_json(aside / SHARED_NOTE, asdict(result))
    return result


class _Experts:
    """Anchor and experts, opened, with their weights and rows."""

    def __init__(self, recipe: Recipe):
        settings = recipe.shared
        self.recipe, self.anchor = recipe, Reader(anchor_source(recipe))
        self.readers = [Reader(source) for source in expert_sources(recipe)]
        self.weights = [settings.weights.get(expert.name, 1.0) for expert in recipe.experts]
        self.layers: int = self.anchor.config["num_hidden_layers"]
        self.sparse = sparse_layers(self.layers, recipe.routing.moe_layers)
        self.names = [name for name in self.anchor.names() if not is_mlp(name)]
        self.tokenizer = load_tokenizer(self.anchor.source.folder)
        self.notes = []
        theta = rope_theta(self.anchor.config)
        self.same_rope = [rope_theta(reader.config) == theta for reader in self.readers]
        for expert, reader, same in zip(recipe.experts, self.readers, self.same_rope, strict=True):
            if not same:
                self.notes.append(
                    f"expert '{expert.name}' has rope_theta {rope_theta(reader.config):g}, the anchor {theta:g}: "
                    "left out of q_proj and k_proj"
                )

    def batches(self, domains: Sequence[str], held_out: bool) -> tuple[list[Batch], list[str]]:
        """Rows of `domains` with their experts as labels, and each row's domain."""
        settings, recipe = self.recipe.shared, self.recipe
        if held_out:
            count, seed = settings.held_out_rows, settings.seed + 1
            rows = [row for name in domains for row in choosing_rows(recipe, name, count, seed)]
        else:
            rows = train_rows(recipe, settings.rows, settings.seed, domains)
        labels = [recipe.expert_of(row.domain) for row in rows]
        batches = encode_batches(self.tokenizer, rows, labels, settings.max_length, settings.batch_tokens)
        return batches, [row.domain for row in rows]

    def served(self, expert: int) -> list[str]:
        """The domains whose requests go to `expert`."""
        return [name for name in self.recipe.domains if self.recipe.expert_of(name) == expert]

    def in_mean(self, name: str) -> list[int]:
        """The experts that take part in tensor `name`."""
        rotated = any(part in name for part in (".q_proj.", ".k_proj."))
        return [i for i, same in enumerate(self.same_rope) if same or not rotated]


def _best(experts: _Experts, aside: Path) -> SharedResult:
    """The candidate with the least held-out loss; its folder under `aside` is the only one left, if it has one."""
    batches, domains = experts.batches(list(experts.recipe.domains), held_out=True)
    own: dict[str, float] = {}
    for index, reader in enumerate(experts.readers):
        rows = experts.batches(experts.served(index), held_out=True)
        own |= answer_losses(reader, *rows, forced(), f"{reader.source.name} alone")
    result = SharedResult(CANDIDATES[0], {}, own, experts.notes)
    for method in CANDIDATES:
        folder = aside / method
        source = _behind(experts, method, folder)
        result.losses[method] = answer_losses(source, batches, domains, forced(), f"shared parts: {method}")
        better = result.gap(method) < result.gap(result.method) - TOLERANCE
        if better:
            shutil.rmtree(aside / result.method, ignore_errors=True)
            result = replace(result, method=method)
        elif method != result.method:
            shutil.rmtree(folder)
    return result


def fused_behind(recipe: Recipe, method: SharedMethod, folder: Path) -> Source:
    """The fused model behind shared parts by `method`, which go to a new `folder` where they are not the anchor's."""
    return _behind(_Experts(recipe), method, folder)


def _behind(experts: _Experts, method: SharedMethod, folder: Path) -> Source:
    shared: Source = experts.anchor
    if set(experts.recipe.shared.methods(method).values()) != {"anchor"}:
        _write_parts(experts, method, folder)
        shared = Checkpoint(folder)
    return Grafted(shared, experts.anchor, experts.readers, experts.sparse)


def _write_parts(experts: _Experts, method: SharedMethod, folder: Path) -> None:
    """Writes the shared tensors alone, with the anchor's config."""
    folder.mkdir()
    dtype = getattr(torch, checkpoint_dtype(experts.anchor.source.folder))
    tensors = ((name, tensor.to(dtype)) for name, tensor in _parts(experts, method))
    write_index(folder, write_shards(folder, "shared", tensors))
    write_json(folder / "config.json", experts.anchor.config)


def _complete(anchor: Reader, parts: Path, folder: Path) -> None:
    """Makes the shared tensors in `parts` a model in `folder`, with the anchor's MLPs and tokenizer."""
    weight_map = dict(Checkpoint(parts).weight_map)
    for path in [*parts.glob("*.safetensors"), parts / "config.json"]:
        path.replace(folder / path.name)
    shutil.rmtree(parts)
    dtype = getattr(torch, checkpoint_dtype(folder))
    mlps = ((name, anchor.tensor(name).to(dtype)) for name in anchor.names() if is_mlp(name))
    write_index(folder, weight_map | write_shards(folder, "mlp", mlps))
    copy_tokenizer(anchor.source.folder, folder)
    write_generation_config(anchor.source.folder, folder)


def _parts(experts: _Experts, method: SharedMethod) -> Iterator[tuple[str, torch.Tensor]]:
    """The shared tensors by name, each expert's read once."""
    methods = experts.recipe.shared.methods(method)
    statistics = _Statistics(experts) if methods["attention"] == "regmean" or methods["head"] == "regmean" else None
    order = sorted(experts.names, key=lambda name: _place(name, experts.layers))
    solved: dict[str, torch.Tensor] = {}
    at = -1
    for name in track(order, f"shared parts by {method}", unit="tensors"):
        layer = layer_of(name)
        if statistics and layer is not None and layer > at:
            solved, at = statistics.attention(layer, methods["attention"] == "regmean"), layer
        if name in solved:
            yield name, solved[name]
        elif methods[part_of(name)] == "regmean" and name == "model.embed_tokens.weight":
            yield name, _embeddings(experts, name)
        elif methods[part_of(name)] == "regmean" and name == "lm_head.weight":
            assert statistics is not None
            yield name, statistics.head(name)
        else:
            yield name, _mean(experts, name, methods[part_of(name)])


def _place(name: str, layers: int) -> int:
    """Where in a forward pass a tensor is used."""
    layer = layer_of(name)
    if layer is not None:
        return layer
    return -1 if part_of(name) == "embeddings" else layers + (part_of(name) == "head")


def _mean(experts: _Experts, name: str, method: SharedMethod) -> torch.Tensor:
    """One tensor by `method`; by the plain mean where RegMean has no inputs to go by (norms)."""
    taking_part = experts.in_mean(name)
    if method == "anchor" or not taking_part:
        return experts.anchor.tensor(name)
    tensors = [experts.readers[i].tensor(name).float() for i in taking_part]
    weights = [experts.weights[i] for i in taking_part]
    if method == "karcher":
        merged: torch.Tensor = karcher_merge_tensors(tensors, [weight / sum(weights) for weight in weights])
        return merged
    # on the sphere a tensor of zeros has no direction
    on_sphere = method == "multislerp" and len(tensors) > 1 and all(bool(tensor.any()) for tensor in tensors)
    return merge_tensors(tensors, "multislerp" if on_sphere else "linear", parameters={"weight": weights})


def _embeddings(experts: _Experts, name: str) -> torch.Tensor:
    """RegMean of embeddings `(vocabulary, hidden)`: inputs are one-hot, so each row is weighted by its token's count.

    One is added to every count: tokens that no expert has seen get the plain mean.
    """
    total: torch.Tensor | None = None
    seen = torch.zeros(())
    for i in experts.in_mean(name):
        weight = experts.readers[i].tensor(name).float()
        batches, _ = experts.batches(experts.served(i), held_out=False)
        ids = torch.cat([batch.ids[batch.real] for batch in batches])
        counts = experts.weights[i] * (1 + torch.bincount(ids, minlength=len(weight)))[:, None].float()
        total = counts * weight if total is None else total + counts * weight
        seen = seen + counts
    assert total is not None
    return total / seen


class _Statistics:
    """RegMean over the layers: every expert reads its own domain's rows, all in step, one layer in memory."""

    def __init__(self, experts: _Experts):
        self._experts = experts
        self._streams = []
        for index, reader in enumerate(experts.readers):
            batches, _ = experts.batches(experts.served(index), held_out=False)
            self._streams.append(LayerStream(reader, batches))
        self._layers = [iter(stream) for stream in self._streams]

    def attention(self, index: int, solve: bool) -> dict[str, torch.Tensor]:
        """Passes layer `index` (layers in order) and returns its linear maps, by name; none without `solve`."""
        grams: list[dict[str, torch.Tensor]] = []
        for layers in self._layers:
            layer: Layer = next(layers)
            found: dict[str, torch.Tensor] = {}

            def observe(name: str, batch: Batch, x: torch.Tensor, found: dict[str, torch.Tensor] = found) -> None:
                x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)  # (tokens, in + 1): the bias is a weight of 1
                found[name] = found.get(name, 0) + (x.T @ x).double()

            layer.attend(observe if solve else None)
            layer.mix(forced(0))
            grams.append(found)
        solved: dict[str, torch.Tensor] = {}
        inputs = {"q_proj": "q_proj", "k_proj": "q_proj", "v_proj": "q_proj", "o_proj": "o_proj"} if solve else {}
        for name, seen in inputs.items():
            stem = f"model.layers.{index}.self_attn.{name}"
            taking_part = [i for i in self._experts.in_mean(f"{stem}.weight") if seen in grams[i]]
            if taking_part:
                solved |= self._solve(stem, {i: grams[i][seen] for i in taking_part})
        return solved

    def _solve(self, stem: str, grams: dict[int, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The linear map `stem` that answers each expert's inputs, Gram matrices `(in + 1, in + 1)`, as it does."""
        biased = f"{stem}.bias" in self._experts.names
        maps = {}
        for i in grams:
            weight = self._experts.readers[i].tensor(f"{stem}.weight").double()  # (out, in)
            bias = self._experts.readers[i].tensor(f"{stem}.bias").double()[:, None] if biased else weight[:, :0]
            maps[i] = torch.cat([weight, bias], dim=1)  # (out, in + 1)
        size = next(iter(maps.values())).shape[1]
        solution = regmean(
            [maps[i] for i in grams],
            [gram[:size, :size].cpu() for gram in grams.values()],
            [self._experts.weights[i] for i in grams],
        )
        if not biased:
            return {f"{stem}.weight": solution.float()}
        return {f"{stem}.weight": solution[:, :-1].float(), f"{stem}.bias": solution[:, -1].float()}

    def head(self, name: str) -> torch.Tensor:
        """The head `(vocabulary, hidden)`, after all layers."""
        maps, grams, weights = [], [], []
        for i, stream in enumerate(self._streams):
            gram: Any = 0
            for _, x in stream.head_inputs():
                gram = gram + (x.T @ x).double().cpu()
            maps.append(self._experts.readers[i].tensor(name).double())
            grams.append(gram)
            weights.append(self._experts.weights[i])
        return regmean(maps, grams, weights).float()


def regmean(maps: Sequence[torch.Tensor], grams: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """Σ w W G̃ (Σ w G̃)⁻¹: of all linear maps `(out, in)` the one nearest to each of `maps` on its own inputs.

    `grams` are XᵀX of those inputs, `(in, in)` in float64; G̃ is G with its off-diagonals shrunk.
    """
    left = torch.zeros_like(grams[0])
    right = torch.zeros_like(maps[0])
    for matrix, gram, weight in zip(maps, grams, weights, strict=True):
        shrunk = SHRINK * gram
        shrunk.diagonal().copy_(gram.diagonal() + JITTER * gram.diagonal().mean())
        left += weight * shrunk
        right += weight * matrix @ shrunk
    return torch.linalg.solve(left, right, left=False)
