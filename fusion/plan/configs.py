"""A model's config against the anchor's: what cannot be one model, and what costs quality.

compare(expert, anchor)
"""

import math
from collections.abc import Iterator
from typing import Any

from fusion.architecture import head_dim, rope_scaling, rope_theta
from fusion.plan.files import quantised, save_again
from fusion.plan.findings import Finding
from fusion.plan.models import SHAPES, Described, known
from fusion.recipe import Recipe

ARCHITECTURE = "Qwen2ForCausalLM"
ACTIVATION = "silu"  # the only one of vLLM's Qwen2Moe
ORIGINAL, DUAL_CHUNK = "original_max_position_embeddings", "dual_chunk_attention_config"
SECTIONS = ("rope_scaling", "rope_parameters", DUAL_CHUNK)  # mappings within a config
NUMBERS = ("rms_norm_eps", "max_position_embeddings", "rope_theta", "head_dim", "factor", ORIGINAL)  # of all of them
NULLABLE = ("rope_theta", "head_dim", ORIGINAL)  # null is read as left out


def usable(model: Described) -> list[Finding]:
    """Errors of a config by itself: of another architecture, quantised, or without what a Qwen2 model needs."""
    config, name = model.config, model.name
    kind, architectures = config.get("model_type"), config.get("architectures") or [ARCHITECTURE]
    if kind != "qwen2":
        why = "the fused model is a Qwen2MoE, whose attention and MLPs are Qwen2's"
        return [Finding("error", name, f"is a '{kind}' model", why, "only Qwen2-architecture models are fused")]
    found = []
    if ARCHITECTURE not in architectures:
        what = f"is a {architectures[0]}"
        found.append(Finding("error", name, what, "it has no language model's head", f"name a {ARCHITECTURE}"))
    if "quantization_config" in config or "quantization" in config:
        found.append(quantised(name))
    for key in SHAPES:
        value = config.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            what = f"its config.json has no {key}" + (f", but {value!r}" if value is not None else "")
            found.append(Finding("error", name, what, "no shape can be checked", "download it again"))
            return found
    for key, value in _odd_values(config):
        what = f"its config.json says {value!r} for {key}"
        found.append(Finding("error", name, what, "what is needed there is another kind of value", "download it again"))
    if found:
        return found
    heads, keys, hidden = config["num_attention_heads"], config["num_key_value_heads"], config["hidden_size"]
    if heads % keys or hidden % heads:
        what = f"{keys} key-value heads, {heads} heads and hidden size {hidden} do not divide each other"
        found.append(Finding("error", name, what, "no such attention can be built", "download its config.json again"))
    return found


def anchor_alone(anchor: Described) -> list[Finding]:
    """What the anchor's config asks for that vLLM's Qwen2Moe does not do."""
    found, config = [], anchor.config
    if head_dim(config) * config["num_attention_heads"] != config["hidden_size"]:
        what = f"head_dim is {head_dim(config)}, not hidden_size / num_attention_heads"
        why = "vLLM's Qwen2Moe goes by the two others, whatever the config says"
        found.append(Finding("error", anchor.name, what, why, "take an anchor whose heads fill the hidden size"))
    if config.get("hidden_act", ACTIVATION) != ACTIVATION:
        what = f"hidden_act is {config['hidden_act']}"
        why = f"vLLM's Qwen2Moe knows {ACTIVATION} alone"
        found.append(Finding("error", anchor.name, what, why, f"take an anchor with {ACTIVATION}"))
    return found + _other_attention(anchor)


def compare(model: Described, anchor: Described) -> list[Finding]:
    """A usable model's config against the anchor's: shapes (but the vocabulary's) as errors, what costs as warnings.

    Not rope_theta: how bad another is depends on the recipe.
    """
    found = _shapes(model, anchor)
    if found and (facts := known(model.model)).instead:
        name = model.model.rstrip("/").split("/")[-1]
        what = f"{name} does not fit the anchor"
        return [Finding("error", model.name, what, str(facts.because), f"use {facts.instead}")]
    ours, theirs = anchor.config, model.config
    if theirs.get("hidden_act", ACTIVATION) != ours.get("hidden_act", ACTIVATION):
        what = f"hidden_act is {theirs.get('hidden_act')}, the anchor's is {ours.get('hidden_act', ACTIVATION)}"
        why = "its MLPs would compute something else with the anchor's"
        found.append(Finding("error", model.name, what, why, "name a model with the anchor's activation"))
    eps, own = theirs.get("rms_norm_eps", 1e-6), ours.get("rms_norm_eps", 1e-6)
    if eps != own:
        what = f"rms_norm_eps is {eps:g}, the anchor's is {own:g}"
        why = "the fused model has the anchor's, so that its MLPs see slightly other inputs"
        found.append(Finding("warning", model.name, what, why, "measure its answers before and after the merge"))
    tied = bool(theirs.get("tie_word_embeddings"))
    if tied != bool(ours.get("tie_word_embeddings")):
        state = {True: "tied to the embeddings", False: "separate"}
        what = f"its head is {state[tied]}, the anchor's {state[not tied]}"
        why = "the fused model's head is the anchor's, and stays as it is there"
        found.append(Finding("warning", model.name, what, why, "give it an 'anchor' section, which learns behind it"))
    scaling, own_scaling = (_plain_scaling(config) for config in (theirs, ours))
    if scaling != own_scaling:
        what = f"its rope scaling is {scaling or 'none'}, the anchor's is {own_scaling or 'none'}"
        why = "the fused model has the anchor's, so that its MLPs see other positions than they learnt"
        found.append(Finding("warning", model.name, what, why, "give it an 'anchor' section"))
    length, own_length = positions(theirs), positions(ours)
    if 0 < length < own_length:
        what = f"was trained on at most {length} positions, the anchor on {own_length}"
        why = "the fused model takes the anchor's lengths, at which this expert's answers are untested"
        found.append(Finding("warning", model.name, what, why, f"keep requests of its domain below {length} tokens"))
    return found + _other_attention(model)


def vocabulary_size(model: Described, anchor: Described, same: bool | None, needed: str = "") -> list[Finding]:
    """Another size of the vocabulary, an error where the tokenizers differ or what is `needed` is all of it.

    `same`: whether both tokenizers hold the same tokens, None where unknown.
    """
    theirs, ours = model.config["vocab_size"], anchor.config["vocab_size"]
    if theirs == ours:
        return []
    what = f"vocab_size is {theirs}, the anchor's is {ours}"
    if same is False:
        why = "another vocabulary, in which the same ids are other tokens"
        return [Finding("error", model.name, what, why, "experts must share the anchor's tokenizer")]
    why = "the same tokenizer, padded to another size" if same else "at best the same tokenizer, padded to another size"
    if needed:
        return [Finding("error", model.name, what, f"{why}, and {needed}", padding(model, ours))]
    why += "; only its MLPs are taken, so that it can be merged, but its embeddings count as drifted"
    return [Finding("warning", model.name, what, why, "make sure that it does without tokens of its own")]


def padding(model: Described, size: int) -> str:
    """How to get a model with a vocabulary of `size`."""
    if model.folder is None:
        return "download it, and plan again for the command that pads it"
    change = f"m.resize_token_embeddings({size}, mean_resizing=False); "
    return f"pad it to the anchor's: {save_again(model.folder, str(size), change)}"


def positions(config: dict[str, Any]) -> int:
    """How many positions a model takes: by YaRN its original ones times the factor, as vLLM counts them.

    By dual-chunk attention its original ones, which are all that it takes without that.
    """
    scaling = rope_scaling(config) or {}
    if scaling.get("rope_type", scaling.get("type")) == "yarn" and scaling.get(ORIGINAL):
        return int(scaling[ORIGINAL] * scaling.get("factor", 1))
    return _unchunked(config)


def lengths(recipe: Recipe, anchor: Described) -> list[Finding]:
    """serving.max_model_len and yarn_factor against the anchor's positions."""
    wanted, factor = recipe.serving.max_model_len, recipe.serving.yarn_factor
    scaling = rope_scaling(anchor.config) or {}
    original = int(scaling.get(ORIGINAL) or _unchunked(anchor.config))
    longest = int(original * factor) if factor else positions(anchor.config)
    if wanted > longest:
        works = math.ceil(wanted / original) if original else 0
        what = f"{wanted} is beyond the anchor's {longest} positions"
        by_yarn = f" ({original} by serving.yarn_factor {factor:g})" if factor else ""
        fix = f"lower it, or set serving.yarn_factor to {works}"
        why = "it has not learnt to read further"
        return [Finding("error", "serving.max_model_len", what + by_yarn, why, fix)]
    if factor and wanted <= original:
        what = f"{factor:g} is not needed for serving.max_model_len {wanted}: the anchor has {original} positions"
        why = "vLLM's YaRN is static, and costs quality on short texts"
        return [Finding("warning", "serving.yarn_factor", what, why, "leave it out")]
    return []


def _shapes(model: Described, anchor: Described) -> list[Finding]:
    found = []
    why = "the fused model has the anchor's attention, and MLPs of one shape"
    fix = "name a model of the anchor's size, or branch this skill from the anchor"
    for key in SHAPES:
        ours, theirs = anchor.config[key], model.config[key]
        if ours != theirs and key != "vocab_size":
            found.append(Finding("error", model.name, f"{key} is {theirs}, the anchor's is {ours}", why, fix))
    ours, theirs = head_dim(anchor.config), head_dim(model.config)
    if ours != theirs and not found:
        found.append(Finding("error", model.name, f"head_dim is {theirs}, the anchor's is {ours}", why, fix))
    return found


def _unchunked(config: dict[str, Any]) -> int:
    """The positions of a config without its dual-chunk attention."""
    chunks = config.get(DUAL_CHUNK) or {}
    return int(chunks.get(ORIGINAL) or config.get("max_position_embeddings") or 0)


def _other_attention(model: Described) -> list[Finding]:
    """Attention that the fused model does not have. vLLM's dual-chunk backend went with its V0 engine (vllm#25351)."""
    found, config = [], model.config
    if config.get("use_sliding_window"):
        what = f"looks back {config.get('sliding_window')} tokens only in some layers (use_sliding_window)"
        why = "the fused model's attention sees everything, as vLLM's Qwen2Moe does"
        fix = "measure its answers to long requests after the merge"
        found.append(Finding("warning", model.name, what, why, fix))
    if config.get(DUAL_CHUNK):
        what = f"reads beyond {_unchunked(config)} tokens by dual-chunk attention alone ({DUAL_CHUNK})"
        why = "the fused model's attention is plain: vLLM has had no such kernel since 0.11"
        fix = f"keep requests below {_unchunked(config)} tokens"
        found.append(Finding("warning", model.name, what, why, fix))
    return found


def _odd_values(config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The keys that do not hold the number or the mapping that they should, with their values."""
    sections: dict[str, Any] = {"": config} | {key: config[key] for key in SECTIONS if config.get(key)}
    for section, values in sections.items():
        if not isinstance(values, dict):
            yield section, values
            continue
        for key in (key for key in NUMBERS if key in values):
            value = values[key]
            number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            if not number and not (value is None and key in NULLABLE):
                yield f"{section}.{key}" if section else key, value


def _plain_scaling(config: dict[str, Any]) -> dict[str, Any]:
    """The rope scaling in one spelling, without the base."""
    scaling = dict(rope_scaling(config) or {})
    kind = scaling.pop("type", None)
    if scaling or kind:
        scaling.setdefault("rope_type", kind)
    scaling.pop("rope_theta", None)
    return scaling


def same_rope(model: Described, anchor: Described) -> bool:
    """Whether both rotate by the same base."""
    return rope_theta(model.config) == rope_theta(anchor.config)
