"""Merge: the experts' MLPs and the anchor's shared parts become one Qwen2MoE checkpoint.

    qwen-fusion merge configs/demo.yaml

mergekit is the engine: its MoEMergeConfig, model references and lazy loaders, with an output architecture of ours
beside its QwenMoE, which forces in a shared expert of the dense model's size. The writer is ours: one shard group for
the shared parts, one per expert, and one for the gates, so that new gates rewrite megabytes.
"""

import logging
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
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
    expert_tensor,
    fused_config,
    gate_tensor,
    is_mlp,
    layer_of,
    shared_expert_tensor,
    shared_gate_tensor,
    sparse_layers,
)
from fusion.checkpoint import (
    Checkpoint,
    file_hash,
    is_hub_id,
    read_json,
    resolve_model,
    staged_folder,
    write_index,
    write_json,
    write_shards,
    write_text,
)
from fusion.errors import UserError
from fusion.model_card import model_card
from fusion.progress import progress_bar
from fusion.reader import Reader, reference_of
from fusion.recipe import Recipe
from fusion.registry_weights import ORIGIN
from fusion.sources import (
    SHARED_NOTE,
    ModelSource,
    base_source,
    expert_sources,
    shared_expert_source,
    shared_parts,
)

GATES_FILE = "gates.safetensors"
PAPERS = ("README.md", "recipe.yaml")  # about the checkpoint, not part of it
MANIFEST = "fusion.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)


@dataclass
class QwenSparseMoE(MoEOutputArchitecture):
    """mergekit output architecture: every expert routed, a shared one only where the merge names it."""

    moe_layers: tuple[int, ...] | None
    sources: dict[str, ModelSource]  # by str(ModelReference), in which mergekit's config names them
    expert_names: list[str]
    shard_bytes: int = 2 * 2**30
    differing: dict[str, int] = field(default_factory=dict)  # expert -> shared tensors that are not the anchor's

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
        """Writes config, shard groups and index into `out_path`. `router_weights`: one `(experts, hidden)` a layer."""
        out = Path(out_path)
        anchor = Reader(self._source(config.base_model))
        experts = [Reader(self._source(e.source_model)) for e in config.experts]
        shared_expert = Reader(self._source(config.shared_experts[0].source_model)) if config.shared_experts else None

        anchor_config, names = anchor.config, anchor.names()
        dtype = getattr(torch, config.dtype or checkpoint_dtype(anchor.source.folder))
        sparse = sparse_layers(anchor_config["num_hidden_layers"], self.moe_layers)
        mlp = [name for name in names if is_mlp(name) and layer_of(name) in sparse]
        shared = [name for name in names if name not in set(mlp)]
        steps = len(shared) + len(mlp) * (len(experts) + (1 if shared_expert else 0))

        with progress_bar() as bar:
            task = bar.add_task("merge", total=steps, unit="tensors")

            def reading(reader: Reader, tensors: list[str], rename: Any = None) -> Iterator[tuple[str, torch.Tensor]]:
                for name in tensors:
                    yield (rename(name) if rename else name), reader.tensor(name).to(dtype)
                    bar.advance(task)

            def shared_parts() -> Iterator[tuple[str, torch.Tensor]]:
                for name, tensor in reading(anchor, shared):
                    for number, reader in enumerate(experts):
                        other = reader.tensor(name)
                        if other.shape != tensor.shape or not torch.equal(other.to(dtype), tensor):
                            self.differing[self.expert_names[number]] = (
                                self.differing.get(self.expert_names[number], 0) + 1
                            )
                    yield name, tensor

            self.differing.update(dict.fromkeys(self.expert_names, 0))
            weight_map = write_shards(out, "shared", shared_parts(), self.shard_bytes)
            for number, reader in enumerate(experts):
                tensors = reading(reader, mlp, lambda name, number=number: expert_tensor(name, number))
                weight_map |= write_shards(out, f"expert-{self.expert_names[number]}", tensors, self.shard_bytes)
            if shared_expert:
                tensors = reading(shared_expert, mlp, shared_expert_tensor)
                weight_map |= write_shards(out, "shared-expert", tensors, self.shard_bytes)
            gates = {gate_tensor(layer): router_weights[layer] for layer in sparse}
            weight_map |= write_gates(out, gates, dtype)
        write_index(out, weight_map)
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

    def _source(self, reference: ModelReference) -> ModelSource:
        return self.sources[str(reference)]


def checkpoint_dtype(folder: Path) -> str:
    """The dtype of a checkpoint by its config, otherwise by its final norm."""
    config = read_json(folder / "config.json")
    named = config.get("dtype") or config.get("torch_dtype")
    return str(named or Checkpoint(folder).tensor("model.norm.weight").dtype).removeprefix("torch.")


def write_gates(folder: Path, gates: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, str]:
    """Writes the gate shard (aside, then renamed) and returns its part of the index.

    `gates`: {gate_tensor(layer): `(experts, hidden)`}. The shared-expert gates that Qwen2MoE also wants are zeros: a
    shared expert then counts half, sigmoid(0), until it is trained.
    """
    tensors = {name: weight.to(dtype) for name, weight in gates.items()}
    for name, weight in gates.items():
        layer = layer_of(name)
        assert layer is not None
        tensors[shared_gate_tensor(layer)] = torch.zeros(1, weight.shape[1], dtype=dtype)
    write_shards(folder, ".gates.partial", tensors.items())
    (folder / ".gates.partial.safetensors").replace(folder / GATES_FILE)
    return dict.fromkeys(tensors, GATES_FILE)


def merge(recipe: Recipe, out: Path | None = None, shard_bytes: int = 2 * 2**30) -> Path:
    """Merges the recipe's experts into `out` (default: the recipe's fused folder) and returns the folder.

    The gates are mergekit's random ones, seeded, until `train-gates` replaces them. Raises UserError where a model is
    missing or does not fit.
    """
    out = out or recipe.fused
    anchor, experts, shared_expert = base_source(recipe), expert_sources(recipe), shared_expert_source(recipe)
    config, sources, references = mergekit_config(recipe, anchor, experts, shared_expert)
    architecture = QwenSparseMoE(recipe.routing.moe_layers, sources, [e.name for e in experts], shard_bytes)
    if not architecture.supports_config(config, explain=True):
        raise UserError("the models do not fit together: `qwen-fusion plan` on the recipe says where")
    torch.manual_seed(recipe.gate_training.seed)
    gates = get_gate_params(config.base_model, None, config.experts, mode="random")  # (layers, experts, hidden)
    with staged_folder(out) as aside:
        architecture.write_model(str(aside), config, MergeOptions(), router_weights=list(gates))
        copy_tokenizer(anchor.folder, aside)
        write_generation_config(anchor.folder, aside)
        manifest = _manifest(recipe, experts, architecture.differing, aside)
        write_json(aside / MANIFEST, manifest)
        write_papers(recipe, aside)
        dump = yaml.safe_dump(_with_folders(config, references), sort_keys=False, allow_unicode=True)
        (aside / "mergekit_moe_config.yml").write_text(dump, encoding="utf-8")
    return out


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
    for key in ("max_new_tokens", "max_length"):
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


def _manifest(recipe: Recipe, experts: list[ModelSource], differing: dict[str, int], folder: Path) -> dict[str, Any]:
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
                "anchored": differing[expert.name] == 0,
                "shared_tensors_differing": differing[expert.name],
            }
        )
    return {
        "recipe": recipe.name,
        "anchor": recipe.anchor.model or "trained by the recipe",
        "shared": "anchor" if recipe.shared.is_anchor else read_json(shared_parts(recipe) / SHARED_NOTE)["method"],
        "experts": rows,
        "routing": recipe.routing.model_dump(mode="json"),
        "origins": {model: origin for model in _named(recipe) if (origin := _origin(resolve_model(model)))},
        "gates": {"method": "random", "sha256": file_hash(folder / GATES_FILE)},
        "versions": {p: version(p) for p in ("qwen-fusion", "mergekit", "torch", "transformers")},
        "sha256": {p.name: file_hash(p) for p in sorted(folder.glob("*.safetensors")) if p.name != GATES_FILE},
    }
