"""Preflight: configs, tokenizers and safetensors headers of all models, compared; no weights are read.

qwen-fusion plan configs/demo.yaml
"""

from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import yaml

from fusion.adapter import Adapter
from fusion.architecture import is_mlp, layer_of, rope_theta, sparse_layers
from fusion.checkpoint import Checkpoint, hub_config, is_hub_id, read_json, resolve_model
from fusion.errors import UserError
from fusion.recipe import DEMO_ROPE_THETA, Expert, Recipe
from fusion.sources import trained_anchor, trained_expert
from fusion.vocabulary import other_token, token_ids
from serving.guard.schema import Checker, SchemaError

SHAPES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)
NON_COMMERCIAL = ("-nc", "non-commercial", "noncommercial", "research")


@dataclass(frozen=True)
class Finding:
    """Something about the models: how bad it is, what was found where, and what to do."""

    severity: Literal["error", "warning", "note"]
    where: str
    what: str
    fix: str = ""

    def sentence(self) -> str:
        """The finding in one line."""
        return f"{self.where}: {self.what}" + (f"; {self.fix}" if self.fix else "")


@dataclass(frozen=True)
class Described:
    """What is known of one model before anything is loaded: its config, and its folder where it is on this machine."""

    name: str
    config: dict[str, Any]
    folder: Path | None


@cache
def known_models() -> dict[str, dict[str, Any]]:
    """Recorded configs by hub id (known_models.yaml)."""
    text = files("fusion.plan").joinpath("known_models.yaml").read_text(encoding="utf-8")
    models: dict[str, dict[str, Any]] = yaml.safe_load(text)["models"]
    return models


def describe(name: str, model: str | Path) -> Described:
    """A model by its folder, the hub cache, the recorded facts, or its config on the hub.

    Raises UserError where none of them has it.
    """
    try:
        folder = model if isinstance(model, Path) else resolve_model(model, allow_download=False)
    except UserError:
        if not is_hub_id(str(model)):
            raise
        return Described(name, known_models().get(str(model)) or hub_config(str(model)), None)
    config = read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise UserError(f"{folder / 'config.json'} holds no model config: name a complete model folder")
    return Described(name, config, folder)


def describe_anchor(recipe: Recipe, trained: bool = False) -> Described:
    """The anchor; one that the recipe trains is read once it is `trained`, and until then its `pretrain` section.

    What an older run has left may be another anchor's, and will be trained again.
    """
    if recipe.anchor.model:
        return describe("anchor", recipe.anchor.model)
    folder = trained_anchor(recipe)
    if trained and (folder / "config.json").is_file():
        return describe("anchor", folder)
    assert recipe.anchor.pretrain is not None
    settings = recipe.anchor.pretrain
    config = {name: getattr(settings, name) for name in (*SHAPES, "max_position_embeddings")}
    extras = {"model_type": "qwen2", "rope_theta": DEMO_ROPE_THETA, "rms_norm_eps": 1e-6, "tie_word_embeddings": True}
    return Described("anchor", {**config, **extras, "torch_dtype": "float32"}, None)


def check(recipe: Recipe, trained: bool = False) -> list[Finding]:
    """Every finding on the recipe's models, the worst first; with `trained`, on the experts it has branched as well.

    Before that, an expert left by an older run may belong to an older anchor, and will be trained again. Raises
    UserError where a model is nowhere to be found.
    """
    try:
        anchor = describe_anchor(recipe, trained)
    except UserError as error:
        return [Finding("error", "anchor.model", str(error))]
    found = _architecture(anchor)
    if found:
        return found
    if anchor.folder is not None:
        found += _conversation(anchor.folder)
    elif recipe.anchor.model:
        found.append(Finding("note", "anchor", f"{recipe.anchor.model} is not here: planned from its config"))
    for expert in recipe.experts:
        found += _check_expert(recipe, expert, anchor, trained) + _check_teachers(expert)
    found += _check_shared_expert(recipe, anchor)
    found += _serving(recipe, anchor.config)
    try:
        sparse_layers(anchor.config["num_hidden_layers"], recipe.routing.moe_layers)
    except UserError as error:
        found.append(Finding("error", "routing.moe_layers", str(error).removeprefix("routing.moe_layers ")))
    return sorted(found, key=lambda f: ("error", "warning", "note").index(f.severity))


def raise_on_error(recipe: Recipe, findings: list[Finding]) -> None:
    """Raises UserError with the first error among the findings, and the recipe's line that it is about."""
    locations = {f"expert '{expert.name}'": ("experts", i) for i, expert in enumerate(recipe.experts)}
    for finding in findings:
        if finding.severity == "error":
            keys = (int(key) if key.isdigit() else key for key in finding.where.split("."))
            raise UserError(f"{recipe.at(*locations.get(finding.where, keys))}{finding.sentence()}")


def _check_expert(recipe: Recipe, expert: Expert, anchor: Described, trained: bool) -> list[Finding]:
    where = f"expert '{expert.name}'"
    if expert.branch and (not trained or expert.branch.lora_rank):
        return [Finding("note", where, f"is branched from the anchor ({expert.branch.trainable}), so it will fit")]
    try:
        described = describe(where, trained_expert(recipe, expert) if expert.branch else str(expert.model))
    except UserError as error:
        return [Finding("error", where, str(error))]
    found = _architecture(described)
    if any(finding.severity == "error" for finding in found):
        return found
    found += _shapes(described, anchor)
    ours_theta, theirs_theta = rope_theta(anchor.config), rope_theta(described.config)
    if ours_theta != theirs_theta and expert.anchor is None:
        what = (
            f"rope_theta is {theirs_theta:g}, the anchor's is {ours_theta:g}: its MLPs learnt behind another attention"
        )
        if recipe.shared.is_anchor:
            found.append(Finding("error", where, what, "give it an 'anchor' section, or leave it out"))
        else:
            found.append(Finding("warning", where, what, "the shared q_proj and k_proj are made without it"))
    for key, why in (("rms_norm_eps", "norms differ"), ("hidden_act", "its MLPs compute something else")):
        if anchor.config.get(key) != described.config.get(key):
            what = f"{key} is {described.config.get(key)}, the anchor's is {anchor.config.get(key)}"
            found.append(Finding("warning", where, what, why))
    length, own = described.config.get("max_position_embeddings", 0), anchor.config.get("max_position_embeddings", 0)
    if length < own:
        found.append(Finding("warning", where, f"was trained on at most {length} positions, the anchor on {own}"))
    if expert.license and any(word in expert.license.lower() for word in NON_COMMERCIAL):
        found.append(
            Finding("warning", where, f"licence {expert.license} is not for commercial use", "so is the result")
        )
    if expert.adapter and not is_hub_id(expert.adapter):
        folder = Path(expert.adapter).expanduser()
        if not (folder / "adapter_config.json").is_file():
            found.append(Finding("error", where, f"adapter {folder} has no adapter_config.json", "correct its path"))
        else:
            try:
                Adapter(folder)
            except UserError as error:
                found.append(Finding("error", where, str(error)))
    if expert.anchor:
        found.append(Finding("note", where, f"is led back to the anchor before the merge ({expert.anchor.method})"))
    if described.folder is None:
        found.append(Finding("note", where, f"{expert.model} is not here: planned from its config"))
    elif anchor.folder is not None:
        found += _headers(where, described.folder, anchor.folder) + _tokenizer(where, described.folder, anchor.folder)
    return found


def _check_teachers(expert: Expert) -> list[Finding]:
    """Whether the models that an expert learns from can be had; what they are is their own affair."""
    where, found = f"expert '{expert.name}'", []
    for teacher in (section.teacher for section in (expert.branch, expert.anchor) if section):
        if teacher:
            try:
                describe(where, teacher)
            except UserError as error:
                found.append(Finding("error", where, f"its teacher: {error}"))
    return found


def _check_shared_expert(recipe: Recipe, anchor: Described) -> list[Finding]:
    """The shared expert where it is a model of its own; anchor and experts are checked as such."""
    name = recipe.routing.shared_expert
    if name is None or name == "anchor" or name in (expert.name for expert in recipe.experts):
        return []
    try:
        described = describe("routing.shared_expert", name)
    except UserError as error:
        return [Finding("error", "routing.shared_expert", str(error))]
    found = _architecture(described) or _shapes(described, anchor)
    if not found and described.folder is not None and anchor.folder is not None:
        found = _headers(described.name, described.folder, anchor.folder)
    return found


def _shapes(model: Described, anchor: Described) -> list[Finding]:
    found = []
    for key in SHAPES:
        ours, theirs = anchor.config.get(key), model.config.get(key)
        if ours != theirs:
            what = f"{key} is {theirs}, the anchor's is {ours}"
            found.append(Finding("error", model.name, what, "experts share the anchor's shape"))
    return found


def _architecture(model: Described) -> list[Finding]:
    kind = model.config.get("model_type")
    if "quantization_config" in model.config:
        return [Finding("error", model.name, "the checkpoint is quantised", "name the full-precision one")]
    if kind != "qwen2":
        return [Finding("error", model.name, f"is a '{kind}' model", "only Qwen2-architecture models are fused")]
    missing = [key for key in SHAPES if key not in model.config]
    if missing:
        return [Finding("error", model.name, f"its config.json has no {missing[0]}", "download it again")]
    return []


def _conversation(folder: Path) -> list[Finding]:
    """What the anchor needs to read a chat: a tokenizer and a chat template."""
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        return [Finding("error", "anchor", f"{folder} has no tokenizer.json", "add the model's tokenizer files")]
    settings = folder / "tokenizer_config.json"
    template = settings.is_file() and read_json(settings).get("chat_template")
    if not template and not (folder / "chat_template.jinja").is_file():
        what = f"{folder} has no chat template, neither chat_template.jinja nor one in tokenizer_config.json"
        return [Finding("error", "anchor", what, "add the one that its experts were trained with")]
    return []


def _headers(where: str, folder: Path, anchor: Path) -> list[Finding]:
    model, reference = Checkpoint(folder), Checkpoint(anchor)
    for name in reference.weight_map:
        if name not in model:
            if is_mlp(name) or layer_of(name) is not None:
                return [Finding("error", where, f"{folder} lacks tensor {name}", "download it again")]
        elif model.shape(name) != reference.shape(name):
            what = f"{name} is {model.shape(name)} in {folder}, {reference.shape(name)} in the anchor"
            return [Finding("error", where, what, "its config.json does not tell the truth")]
    return []


def _tokenizer(where: str, folder: Path, anchor: Path) -> list[Finding]:
    ours, theirs = token_ids(anchor), token_ids(folder)
    if ours is None or theirs is None:
        return [Finding("warning", where, "no tokenizer.json to compare with the anchor's")]
    token = other_token(ours, theirs)
    if token is not None:
        what = f"its tokenizer gives {token!r} id {theirs[token]}, the anchor's {ours[token]}"
        return [Finding("error", where, what, "experts must share the anchor's tokenizer")]
    extra = len(theirs.keys() - ours.keys())
    if extra:
        return [Finding("warning", where, f"its tokenizer has {extra} tokens that the anchor's lacks", "they are lost")]
    return []


def _serving(recipe: Recipe, config: dict[str, Any]) -> list[Finding]:
    found, ways = [], recipe.serving.tensor_parallel_size
    where = "serving.tensor_parallel_size"
    for key in ("num_attention_heads", "intermediate_size"):
        if config[key] % ways:
            found.append(Finding("error", where, f"{ways} does not divide the anchor's {key} {config[key]}"))
    for number, question in enumerate(recipe.serving.questions):
        try:
            Checker(question.json_schema or {})
        except SchemaError as error:
            found.append(Finding("error", f"serving.questions.{number}.json_schema", str(error), "mend the schema"))
    longest = config.get("max_position_embeddings", 0) * (recipe.serving.yarn_factor or 1)
    if recipe.serving.max_model_len > longest:
        what = f"{recipe.serving.max_model_len} is beyond the anchor's {longest:.0f} positions"
        found.append(Finding("error", "serving.max_model_len", what, "lower it, or set serving.yarn_factor"))
    return found
