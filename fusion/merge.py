"""Merge: the experts' MLPs and the anchor's shared parts become one Qwen2MoE checkpoint.

    qwen-fusion merge configs/demo.yaml

mergekit is the engine: its MoEMergeConfig, model references and lazy loaders, with an output architecture of ours
beside its QwenMoE, which forces in a shared expert of the dense model's size. The writer is ours: one shard group for
the shared parts, one per expert, and one for the gates, so that new gates rewrite megabytes. It passes over the sources
once, a piece in memory at a time, and goes on where it was killed.
"""

import hashlib
import json
import logging
import math
import shutil
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from mergekit.common import ModelReference
from mergekit.moe.arch import MoEOutputArchitecture
from mergekit.moe.config import Expert as MergekitExpert
from mergekit.moe.config import MoEMergeConfig
from mergekit.moe.router import get_gate_params
from mergekit.options import MergeOptions

from fusion.architecture import (
    GATES_FILE,
    MANIFEST,
    expert_of_tensor,
    expert_tensor,
    fused_config,
    gate_tensor,
    is_mlp,
    lacking_biases,
    layer_of,
    named_dtype,
    shared_expert_tensor,
    shared_gate_tensor,
    sparse_layers,
)
from fusion.checkpoint import (
    Checkpoint,
    file_hash,
    link_file,
    read_json,
    weight_stamps,
    write_json,
    write_text,
    written_aside,
)
from fusion.errors import UserError
from fusion.headers import all_finite, read_header, same_bits, write_index
from fusion.hub import is_hub_id, resolve_model
from fusion.layers import Gates
from fusion.model_card import model_card
from fusion.progress import bytes_bar
from fusion.reader import Reader, reference_of
from fusion.recipe import Recipe
from fusion.registry_weights import ORIGIN
from fusion.resumable import Journal, resumable_folder
from fusion.shards import Entry, entries_of, laid_out, write_shard
from fusion.sources import (
    SHARED_NOTE,
    ModelSource,
    base_source,
    expert_sources,
    shared_expert_source,
    shared_parts,
)
from fusion.steps import lock, taken

ROOM = 32 * 2**20  # bytes for gates, tokenizer and papers beside the shards
PAGE, STRIDE, TAIL = 2**11, 2**19, 2**21  # elements: 4 KiB in every MiB, and the last 4 MiB, in bfloat16
LENGTH_LIMITS = ("max_new_tokens", "max_length")
CONFIGS = ("config.json", "adapter_config.json")
PAPERS = ("README.md", "recipe.yaml")  # about the checkpoint, not part of it
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
SMALL_FILES = ("config.json", "generation_config.json", *TOKENIZER_FILES)


@dataclass(frozen=True)
class Reuse:
    """A fused checkpoint with some experts less or more: shards that a merge would write again are linked instead."""

    folder: Path
    gates: Gates  # of the merge, {layer: `(experts, hidden)`}
    gates_note: dict[str, Any]  # what the manifest says of them

    def differs_at(self) -> dict[str, str | None]:
        """What is known of its experts, by name."""
        return {row["name"]: row["differs_at"] for row in read_json(self.folder / MANIFEST)["experts"]}

    def sha256(self, file: str, entries: list[Entry]) -> str | None:
        """The hash of its shard `file` where that holds tensors of just these names, dtypes and shapes."""
        sha256: str | None = read_json(self.folder / MANIFEST)["sha256"].get(file)
        if sha256 is None:
            return None
        return sha256 if _holds(self.folder / file, entries) else None


@dataclass
class QwenSparseMoE(MoEOutputArchitecture):
    """mergekit output architecture: every expert routed, a shared one only where the merge names it.

    The journal says which shards an interrupted merge has finished; these are not written again.
    """

    moe_layers: tuple[int, ...] | None
    sources: dict[str, ModelSource]  # by str(ModelReference), in which mergekit's config names them
    expert_names: list[str]
    shard_bytes: int
    journal: Journal
    reuse: "Reuse | None" = None
    # expert -> the first shared tensor that is not the anchor's, None where all are
    differs_at: dict[str, str | None] = field(default_factory=dict)
    sha256: dict[str, str] = field(default_factory=dict)  # of the shards but the gates'

    def name(self) -> str:
        """mergekit's display name."""
        return "Qwen sparse MoE"

    def supports_config(self, config: MoEMergeConfig, explain: bool = False, trust_remote_code: bool = False) -> bool:
        """True for Qwen2 models alone, with at most one shared expert; no remote code whatever the caller says."""
        models = [config.base_model, *(e.source_model for e in [*config.experts, *(config.shared_experts or [])])]
        types = {model.config(trust_remote_code=False).model_type for model in models}
        if explain and types != {"qwen2"}:
            logging.warning("Qwen sparse MoE merges Qwen2 models only, found %s", sorted(types))
        return types == {"qwen2"} and len(config.shared_experts or []) <= 1

    def write_model(
        self,
        out_path: str,
        config: MoEMergeConfig,
        merge_options: MergeOptions,
        router_weights: list[torch.Tensor],
        shared_router_weights: list[torch.Tensor] | None = None,
    ) -> None:
        """Writes config, shard groups and index into `out_path`. `router_weights`: one `(experts, hidden)` a layer.

        Raises UserError where an expert's MLPs are not of the anchor's shapes, or the disk has no room.
        """
        out = Path(out_path)
        anchor = Reader(self._source(config.base_model))
        experts = [Reader(self._source(e.source_model)) for e in config.experts]
        shared_expert = Reader(self._source(config.shared_experts[0].source_model)) if config.shared_experts else None
        anchor_config, names = anchor.config, anchor.names()
        dtype = getattr(torch, config.dtype or checkpoint_dtype(anchor.source.folder))
        sparse = sparse_layers(anchor_config["num_hidden_layers"], self.moe_layers)
        mlp = [name for name in names if is_mlp(name) and layer_of(name) in sparse]
        shared = [name for name in names if name not in set(mlp)]

        known = self.reuse.differs_at() if self.reuse else {}
        named = dict(zip(self.expert_names, experts, strict=True))
        self.differs_at.update({name: known.get(name) for name in named})
        new = {name: reader for name, reader in named.items() if name not in known}
        compared = _Compared(anchor, new, self.differs_at)
        groups = {
            "shared": [Entry(n, dtype, anchor.place(n).shape, partial(compared.pieces, n, dtype)) for n in shared]
        }
        for name, shape in lacking_biases(anchor_config, names).items():
            groups["shared"].append(Entry(name, dtype, shape, partial(_zeros, shape, dtype)))
        for number, reader in enumerate(experts):
            entries = [_entry(reader, anchor, name, expert_tensor(name, number), dtype) for name in mlp]
            groups[f"expert-{self.expert_names[number]}"] = entries
        if shared_expert:
            entries = [_entry(shared_expert, anchor, name, shared_expert_tensor(name), dtype) for name in mlp]
            groups["shared-expert"] = entries
        weight_map = self._write_groups(out, groups, compared)
        gates = {gate_tensor(layer): router_weights[layer] for layer in sparse}
        write_index(out, weight_map | write_gates(out, gates, dtype))
        write_json(
            out / "config.json",
            fused_config(
                anchor_config,
                len(experts),
                config.experts_per_token,
                self.moe_layers,
                shared_expert is not None,
                str(dtype).removeprefix("torch."),
            ),
        )

    def _write_groups(self, out: Path, groups: dict[str, list[Entry]], compared: "_Compared") -> dict[str, str]:
        """Writes the groups' shards but those that are there already; returns their part of the index."""
        files: dict[str, list[Entry]] = {}
        for stem, entries in groups.items():
            files |= laid_out(stem, entries, self.shard_bytes)
        linked = {file: sha256 for file in files if self.reuse and (sha256 := self.reuse.sha256(file, files[file]))}
        total = sum(entry.nbytes for file in files.keys() - linked.keys() for entry in files[file])
        self.journal.check_room(total + ROOM)
        for file in linked:
            assert self.reuse is not None
            link_file(self.reuse.folder / file, out / file)
            compared.look_at([entry.name for entry in files[file]], files[file][0].dtype)
        self.sha256 |= linked
        with bytes_bar() as bar:
            task = bar.add_task("merge", total=total)
            for file in [file for file in files if file not in linked]:
                entries, note = files[file], self.journal.verified(file)
                if note and not _holds(out / file, entries):
                    note = None
                if note is None:
                    sha256 = write_shard(out / file, entries, partial(bar.advance, task))
                    note = {"sha256": sha256, "differs_at": dict(self.differs_at)}
                    self.journal.record(file, note)
                else:
                    bar.advance(task, sum(entry.nbytes for entry in entries))
                self.differs_at.update(note["differs_at"])
                self.sha256[file] = note["sha256"]
        return {entry.name: file for file, entries in files.items() for entry in entries}

    def _source(self, reference: ModelReference) -> ModelSource:
        return self.sources[str(reference)]


def _holds(path: Path, entries: list[Entry]) -> bool:
    """Whether a shard has tensors of just these names, dtypes and shapes."""
    held = {name: (place.dtype, place.shape) for name, place in read_header(path).items()}
    return held == {entry.name: (entry.dtype, entry.shape) for entry in entries}


def _finite(reader: Reader, name: str, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """A source's tensor in pieces. Raises UserError where it holds NaN or infinity, also by its cast to `dtype`."""
    for piece in reader.pieces(name, dtype):
        if not all_finite(piece):
            what = f"{reader.source.folder}: {name} holds NaN or infinity in {str(dtype).removeprefix('torch.')}"
            raise UserError(f"{what}, and so would every answer: make or download the model again")
        yield piece


class _Compared:
    """The anchor's shared tensors, compared with every expert's on their way until the first that differs.

    Of an expert's tensor a page in every STRIDE is read, and the end, where added tokens have their rows: all of it
    would be a third more to read. `verify` compares all.
    """

    def __init__(self, anchor: Reader, experts: dict[str, Reader], differs_at: dict[str, str | None]):
        self._anchor = anchor
        self._experts = experts
        self._differs_at = differs_at

    def pieces(self, name: str, dtype: torch.dtype) -> Iterator[torch.Tensor]:
        """The anchor's tensor `name`, flat, in pieces of `dtype`."""
        place, begin = self._anchor.place(name), 0
        left = {}
        for expert, reader in self._experts.items():
            if self._differs_at[expert] is None and not self._same_bytes(reader, name):
                if name in reader and reader.place(name).shape == place.shape:
                    left[expert] = reader
                else:
                    self._differs_at[expert] = name
        for piece in _finite(self._anchor, name, dtype):
            for first, last in _looked_at(begin, begin + piece.numel(), math.prod(place.shape)):
                for expert, reader in list(left.items()):
                    if not same_bits(reader.part(name, first, last).to(dtype), piece[first - begin : last - begin]):
                        self._differs_at[expert] = name
                        del left[expert]
            begin += piece.numel()
            yield piece

    def _same_bytes(self, reader: Reader, name: str) -> bool:
        """Whether tensor `name` of an expert is read from where the anchor's is: nothing to compare."""
        changed = reader.adapter is not None and name in reader.adapter.targets
        return reader.source.folder == self._anchor.source.folder and not changed

    def look_at(self, names: list[str], dtype: torch.dtype) -> None:
        """Compares those of the tensors that are the anchor's, as far as there is anything left to find."""
        for name in names:
            if (
                expert_of_tensor(name)[0] is None
                and name in self._anchor
                and None in map(self._differs_at.get, self._experts)
            ):
                deque(self.pieces(name, dtype), maxlen=0)


def _looked_at(begin: int, end: int, count: int) -> Iterator[tuple[int, int]]:
    """Which elements from `begin` to `end` of a tensor of `count` are compared: a page in every STRIDE, and its end."""
    tail = max(begin, count - TAIL)
    for page in range(begin, min(end, tail), STRIDE):
        yield page, min(page + PAGE, end, tail)
    if tail < end:
        yield tail, end


def _entry(reader: Reader, anchor: Reader, name: str, fused_name: str, dtype: torch.dtype) -> Entry:
    """An expert's MLP tensor under its name in the fused model. Raises UserError unless it has the anchor's shape."""
    shape, wanted = reader.place(name).shape, anchor.place(name).shape
    if shape != wanted:
        raise UserError(
            f"{name} is {shape} in {reader.source.folder}, {wanted} in the anchor: name a model of the anchor's shape"
        )
    return Entry(fused_name, dtype, shape, partial(_finite, reader, name, dtype))


def _zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """A bias that the anchor does without and vLLM's Qwen2Moe does not."""
    yield torch.zeros(shape, dtype=dtype)


def checkpoint_dtype(folder: Path) -> str:
    """The dtype of a checkpoint by its config, otherwise by its final norm."""
    named = named_dtype(read_json(folder / "config.json"))
    return named or str(Checkpoint(folder).tensor("model.norm.weight").dtype).removeprefix("torch.")


def write_gates(folder: Path, gates: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, str]:
    """Writes the gate shard aside, renames it, and returns its part of the index.

    `gates`: {gate_tensor(layer): `(experts, hidden)`}. The shared-expert gates that Qwen2MoE also wants are zeros: a
    shared expert then counts half, sigmoid(0), until it is trained.
    """
    tensors = {name: weight.to(dtype) for name, weight in gates.items()}
    for name, weight in gates.items():
        layer = layer_of(name)
        assert layer is not None
        tensors[shared_gate_tensor(layer)] = torch.zeros(1, weight.shape[1], dtype=dtype)
    with written_aside(folder / GATES_FILE) as aside:
        write_shard(aside, entries_of(tensors.items()))
    return dict.fromkeys(tensors, GATES_FILE)


def merge(recipe: Recipe, out: Path | None = None, reuse: Reuse | None = None) -> Path:
    """Merges the recipe's experts into `out` (default: the recipe's fused folder) and returns the folder.

    One that was interrupted goes on. The gates are mergekit's random ones, seeded, until `train-gates` replaces them,
    or with `reuse` those that it brings along; the experts that it knows are taken to be what they were. Raises
    UserError where a model is missing or does not fit, or the disk has no room.
    """
    out = out or recipe.fused
    anchor, experts, shared_expert = base_source(recipe), expert_sources(recipe), shared_expert_source(recipe)
    config, sources, references = mergekit_config(recipe, anchor, experts, shared_expert)
    busy = f"another merge is at work on {out}: waiting for it"
    with taken(lock(out, "merge"), busy), resumable_folder(out, _key(recipe, config, sources)) as (aside, journal):
        architecture = QwenSparseMoE(
            recipe.routing.moe_layers, sources, [e.name for e in experts], recipe.merging.shard_bytes, journal, reuse
        )
        if not architecture.supports_config(config, explain=True):
            raise UserError("the models do not fit together: `qwen-fusion plan` on the recipe says where")
        torch.manual_seed(recipe.gate_training.seed)
        gates = get_gate_params(config.base_model, None, config.experts, mode="random")  # (layers, experts, hidden)
        rows = [reuse.gates.get(layer, gate) for layer, gate in enumerate(gates)] if reuse else list(gates)
        architecture.write_model(str(aside), config, MergeOptions(), router_weights=rows)
        copy_tokenizer(anchor.folder, aside)
        write_generation_config(anchor.folder, aside)
        made_of = {"shared": anchor, **({"shared-expert": shared_expert} if shared_expert else {})}
        made_of |= {expert.name: source for expert, source in zip(recipe.experts, experts, strict=True)}
        manifest = _manifest(recipe, experts, architecture, aside)
        manifest["sources"] = {name: source_stamp(source) for name, source in made_of.items()}
        manifest["gates"] |= reuse.gates_note if reuse else {}
        write_json(aside / MANIFEST, manifest)
        write_papers(recipe, aside)
        dump = yaml.safe_dump(_with_folders(config, references), sort_keys=False, allow_unicode=True)
        (aside / "mergekit_moe_config.yml").write_text(dump, encoding="utf-8")
    return out


def _key(recipe: Recipe, config: MoEMergeConfig, sources: dict[str, ModelSource]) -> str:
    """What the shards of a merge depend on: an interrupted one goes on only where all of it is as it was."""
    models = [config.base_model, *(row.source_model for row in [*config.experts, *(config.shared_experts or [])])]
    stamps = [source_stamp(sources[str(model)]) for model in models]
    names = [expert.name for expert in recipe.experts]
    parts = [stamps, names, config.dtype, recipe.routing.model_dump(mode="json"), recipe.merging.shard_bytes]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def source_stamp(source: ModelSource) -> str:
    """Tells that a source's weights, config or adapter are others, without reading the weights."""
    told = [
        [weight_stamps(path), [file_hash(path / name) for name in CONFIGS if (path / name).is_file()]]
        for path in source.paths
    ]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:32]


def write_papers(recipe: Recipe, folder: Path) -> None:
    """Writes the model card and the recipe as it is now into `folder`, whose manifest says how it was made."""
    plain = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    for name, text in zip(PAPERS, (model_card(recipe, read_json(folder / MANIFEST)), plain), strict=True):
        path = folder / name
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            write_text(path, text)


def record_gates(folder: Path, method: str, labels: str, tokens: int, threshold: float | None) -> None:
    """Notes in the manifest how the gates that are in place were made."""
    gates = {"method": method, "labels": labels, "tokens": tokens, "threshold": threshold}
    gates |= {"sha256": file_hash(folder / GATES_FILE)}
    write_json(folder / MANIFEST, {**read_json(folder / MANIFEST), "gates": gates})


def gates_are_trained(folder: Path) -> bool:
    """Whether the manifest says that the gates in place were trained; a merge leaves random ones."""
    gates = read_json(folder / MANIFEST).get("gates", {})
    return gates.get("method") != "random" and gates.get("sha256") == file_hash(folder / GATES_FILE)


def other_experts(recipe: Recipe, folder: Path) -> str | None:
    """Which experts the checkpoint has and which the recipe names, None where they are the same."""
    have, wanted = ([row["name"] for row in read_json(folder / MANIFEST)["experts"]], [e.name for e in recipe.experts])
    return None if have == wanted else f"{folder} has the experts {', '.join(have)}, the recipe {', '.join(wanted)}"


def mergekit_config(
    recipe: Recipe, anchor: ModelSource, experts: list[ModelSource], shared_expert: ModelSource | None
) -> tuple[MoEMergeConfig, dict[str, ModelSource], dict[str, str]]:
    """The recipe as mergekit's own configuration, the sources by model reference, and references by recipe name.

    mergekit knows a model by its path alone. Two experts on one base (adapters, or the anchor itself twice) stay two
    references: the second is named through a differently written path of the same folder.
    """
    sources: dict[str, ModelSource] = {}
    names: dict[str, str] = {}
    ids = {str(resolve_model(model)): model for model in _named(recipe)}

    def named(source: ModelSource) -> str:
        """The model's hub id where the recipe names one, otherwise its folder; an adapter follows after a plus."""
        paths = map(str, source.paths)
        return "+".join(ids.get(path, path) for path in paths)

    def reference(source: ModelSource) -> ModelReference:
        path = str(source.folder)
        while path in sources and sources[path] != source:
            path = str(Path(path)) + "/." * (path.count("/.") + 1)
        parsed = reference_of(path)
        sources[str(parsed)] = source
        names[str(parsed)] = named(source)
        return parsed

    config = MoEMergeConfig(
        base_model=reference(anchor),
        experts=[
            MergekitExpert(source_model=reference(source), positive_prompts=[expert.purpose or expert.domain])
            for expert, source in zip(recipe.experts, experts, strict=True)
        ],
        gate_mode="random",
        dtype=checkpoint_dtype(anchor.folder),
        experts_per_token=recipe.routing.top_k,
        shared_experts=[MergekitExpert(source_model=reference(shared_expert))] if shared_expert else None,
    )
    return config, sources, names


def _with_folders(config: MoEMergeConfig, folders: dict[str, str]) -> dict[str, Any]:
    """mergekit's YAML form of the merge, each model by its hub id or folder (and adapter)."""

    def experts(rows: list[MergekitExpert]) -> list[dict[str, Any]]:
        return [
            {"source_model": folders[str(row.source_model)], "positive_prompts": row.positive_prompts or []}
            for row in rows
        ]

    return {
        "base_model": folders[str(config.base_model)],
        "gate_mode": config.gate_mode,
        "dtype": config.dtype,
        "experts_per_token": config.experts_per_token,
        "experts": experts(config.experts),
        **({"shared_experts": experts(config.shared_experts)} if config.shared_experts else {}),
    }


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copies the tokenizer's files, chat template included."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def write_generation_config(source: Path, target: Path) -> None:
    """The anchor's generation config without length limits, which vLLM would put on every request."""
    path = source / "generation_config.json"
    config = read_json(path) if path.is_file() else {}
    if not config:
        anchor = read_json(source / "config.json")
        config = {key: anchor[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in anchor}
    for key in LENGTH_LIMITS:
        config.pop(key, None)
    write_json(target / "generation_config.json", config)


def _named(recipe: Recipe) -> list[str]:
    """The hub ids that the recipe names, each once."""
    parts = [recipe.anchor.model, recipe.routing.shared_expert]
    parts += [model for expert in recipe.experts for model in (expert.model, expert.adapter)]
    return [model for model in dict.fromkeys(parts) if model and is_hub_id(model)]


def _origin(folder: Path) -> dict[str, str] | None:
    """Where the weights in `folder` come from where that is not the hub itself."""
    origin: dict[str, str] | None = read_json(folder / ORIGIN) if (folder / ORIGIN).is_file() else None
    return origin


def _manifest(recipe: Recipe, experts: list[ModelSource], written: QwenSparseMoE, folder: Path) -> dict[str, Any]:
    anchor = recipe.anchor.model or "trained by the recipe"
    rows = []
    for expert, source in zip(recipe.experts, experts, strict=True):
        rows.append(
            {
                "name": expert.name,
                "domain": expert.domain,
                "purpose": expert.purpose,
                "model": expert.model or recipe.anchor.model or "branched from the recipe's own anchor",
                "branched": expert.branch is not None,
                "distilled": expert.anchor is not None,
                "adapter": expert.adapter or ("the recipe's own" if source.adapter else None),
                "license": expert.license,
                "anchored": written.differs_at[expert.name] is None,
                "differs_at": written.differs_at[expert.name],
            }
        )
    return {
        "recipe": recipe.name,
        "anchor": anchor,
        "shared": "anchor" if recipe.shared.is_anchor else read_json(shared_parts(recipe) / SHARED_NOTE)["method"],
        "experts": rows,
        "routing": recipe.routing.model_dump(mode="json"),
        "origins": {model: origin for model in _named(recipe) if (origin := _origin(resolve_model(model)))},
        "gates": {"method": "random", "sha256": file_hash(folder / GATES_FILE)},
        "versions": {p: version(p) for p in ("qwen-fusion", "mergekit", "torch", "transformers")},
        "sha256": written.sha256,
        "tokenizer_of": anchor,
        "generation_config_of": {"model": anchor, "left_out": list(LENGTH_LIMITS)},
        "files": {name: file_hash(folder / name) for name in SMALL_FILES if (folder / name).is_file()},
    }
