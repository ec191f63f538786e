"""Configs against the anchor's: each finding from a pair that differs in that alone, and the pair that does not."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from fusion.checkpoint import Checkpoint, read_json, write_json
from fusion.merge import merge
from fusion.plan.configs import DUAL_CHUNK, ORIGINAL
from fusion.plan.findings import Finding
from fusion.plan.preflight import check
from fusion.recipe import Recipe
from fusion.recipe_file import load_recipe
from tests.families import write_model
from tests.fusion.plan.planning import change_config, change_tensors, change_tokenizer, errors, findings
from tests.fusion.plan.test_files import run_fix
from tests.recipes import make_recipe, recipe_data

FIVE = Path(__file__).parents[3] / "configs" / "qwen2.5-7b-five-experts.yaml"


def test_a_fitting_pair_has_no_findings(tmp_path: Path, anchor: Path, anchored_experts: dict[str, Path]) -> None:
    assert findings(tmp_path, anchor, anchored_experts["math"]) == []


@pytest.mark.parametrize("key", ["hidden_size", "intermediate_size", "num_hidden_layers", "num_key_value_heads"])
def test_another_shape_is_an_error(tmp_path: Path, anchor: Path, key: str) -> None:
    shape = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "num_key_value_heads": 1}[key]
    (error,) = errors(findings(tmp_path, anchor, write_model(tmp_path / "other", **{key: shape})))
    assert error.startswith(f"expert 'math': {key} is {shape}, the anchor's is ")


def test_another_head_size_is_an_error(tmp_path: Path, anchor: Path) -> None:
    other = write_model(tmp_path / "other", head_dim=16)
    assert any("head_dim is 16, the anchor's is 32" in error for error in errors(findings(tmp_path, anchor, other)))
    assert any("vLLM's Qwen2Moe goes by the two others" in error for error in errors(findings(tmp_path, other, anchor)))


@pytest.fixture
def padded(tmp_path: Path, anchor: Path, other: Path) -> Path:
    """The anchor with a longer vocabulary."""
    change_config(other, vocab_size=300)
    change_tensors(other, lambda name, t: torch.cat([t, torch.zeros(41, 64)]) if "embed_tokens" in name else t)
    return other


def anchored(folder: Path, anchor: Path, other: Path, **settings: Any) -> list[Finding]:
    data = recipe_data(folder, anchor, {"general": anchor, "math": other})
    data["experts"][1]["anchor"] = {"method": "logits", "data": data["domains"]["math"]["train"], **settings}
    return check(Recipe.model_validate(data))


def test_the_same_tokenizer_padded_to_another_size_is_a_warning_and_merges(
    tmp_path: Path, anchor: Path, padded: Path
) -> None:
    (finding,) = findings(tmp_path, anchor, padded)
    assert finding.severity == "warning" and "vocab_size is 300, the anchor's is 259" in finding.what
    assert "only its MLPs are taken" in finding.why and "its embeddings count as drifted" in finding.why
    change_tensors(padded, lambda name, tensor: -tensor if ".mlp." in name else tensor)
    fused = merge(make_recipe(tmp_path, anchor, {"general": anchor, "math": padded}))
    assert read_json(fused / "config.json")["vocab_size"] == 259
    ours, theirs, merged = Checkpoint(anchor), Checkpoint(padded), Checkpoint(fused)
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(merged.tensor(name.replace("mlp", "mlp.experts.1")), theirs.tensor(name))
    assert torch.equal(merged.tensor("model.embed_tokens.weight"), ours.tensor("model.embed_tokens.weight"))


def test_where_all_of_the_vocabulary_is_needed_it_is_an_error_with_the_command_that_pads(
    tmp_path: Path, anchor: Path, padded: Path
) -> None:
    experts = "all experts' embeddings"
    for sections, words in (({"shared": "mean"}, experts), ({"shared": "auto"}, experts), ({"heal": {}}, "in healing")):
        assert words in errors(findings(tmp_path, anchor, padded, **sections))[0]
    for shared in ({"attention": "mean"}, {"method": "auto", "embeddings": "anchor", "head": "anchor"}):
        assert errors(findings(tmp_path, anchor, padded, shared=shared)) == []
    assert errors(anchored(tmp_path, anchor, padded, method="text", teacher=str(anchor))) == []
    assert (
        "start: transported"
        in errors(anchored(tmp_path, anchor, padded, method="text", teacher=str(anchor), start="transported"))[0]
    )
    (error,) = errors(anchored(tmp_path, anchor, padded))
    assert "its logits are learnt" in error
    assert errors(anchored(tmp_path, anchor, run_fix(error))) == []


def test_a_teacher_of_logits_with_fewer_tokens_than_the_anchor_is_an_error(
    tmp_path: Path, anchor: Path, padded: Path
) -> None:
    (error,) = errors(anchored(tmp_path, padded, padded, teacher=str(anchor)))
    assert "vocab_size of its teacher is 259, the anchor's is 300" in error
    assert errors(anchored(tmp_path, padded, padded, method="text", teacher=str(anchor))) == []
    assert errors(anchored(tmp_path, anchor, anchor, teacher=str(padded))) == []  # padding is cut off


def test_another_tokenizer_of_another_size_is_an_error(tmp_path: Path, anchor: Path, padded: Path) -> None:
    def swap(data: dict[str, Any]) -> None:
        vocabulary = data["model"]["vocab"]
        vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]

    change_tokenizer(padded, swap)
    assert any("another vocabulary" in error for error in errors(findings(tmp_path, anchor, padded)))


@pytest.mark.parametrize("spelling", ["old", "new"])
def test_another_rope_theta_is_an_error_in_either_spelling(
    tmp_path: Path, anchor: Path, other: Path, spelling: str
) -> None:
    def respell(theta: float) -> None:
        config = read_json(other / "config.json")
        config.pop("rope_parameters", None)
        rope = {"rope_parameters": {"rope_type": "default", "rope_theta": theta}}
        write_json(other / "config.json", {**config, **({"rope_theta": theta} if spelling == "old" else rope)})

    respell(1e6)
    assert findings(tmp_path, anchor, other) == []
    respell(1e4)
    (error,) = errors(findings(tmp_path, anchor, other))
    assert error.startswith("expert 'math': rope_theta is 10000")
    (warning,) = findings(tmp_path, anchor, other, shared="mean")
    assert warning.severity == "warning" and "are made without it" in warning.why


YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 512, "rope_theta": 1e6}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rms_norm_eps": 1e-5}, "rms_norm_eps is 1e-05, the anchor's is 1e-06"),
        ({"max_position_embeddings": 128}, "at most 128 positions, the anchor on 512"),
        ({"rope_parameters": YARN}, "its rope scaling is {'rope_type': 'yarn', 'factor': 2.0"),
        ({"use_sliding_window": True, "sliding_window": 64}, "looks back 64 tokens only"),
        ({DUAL_CHUNK: {ORIGINAL: 512}}, "reads beyond 512 tokens by dual-chunk attention alone"),
        ({"tie_word_embeddings": False}, "its head is separate, the anchor's tied to the embeddings"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_what_costs_quality_is_a_warning(
    tmp_path: Path, anchor: Path, other: Path, changes: dict[str, Any], words: str
) -> None:
    change_config(other, **changes)
    if "tie_word_embeddings" in changes:
        other = write_model(tmp_path / "untied", seed=1, tie_word_embeddings=False)
    found = [finding for finding in findings(tmp_path, anchor, other) if "moved outside" not in finding.what]
    assert [finding.severity for finding in found] == ["warning"]
    assert words in found[0].what and found[0].why and found[0].fix


def test_an_anchor_with_dual_chunks_has_the_positions_that_it_takes_without_them() -> None:
    million = ["anchor.model=Qwen/Qwen2.5-14B-Instruct-1M"]
    for length, wrong in ((262144, False), (262145, True)):
        found = check(load_recipe(FIVE, [*million, f"serving.max_model_len={length}"]))
        assert any("beyond the anchor's 262144 positions" in error for error in errors(found)) == wrong
    assert any(f.where == "anchor" and "dual-chunk attention" in f.what and f.severity == "warning" for f in found)


def test_an_anchor_with_a_sliding_window_is_a_warning(tmp_path: Path, anchor: Path, other: Path) -> None:
    change_config(other, use_sliding_window=True, sliding_window=64)
    assert [finding.where for finding in findings(tmp_path, other, anchor)] == ["anchor"]


def test_another_activation_is_an_error(tmp_path: Path, anchor: Path, other: Path) -> None:
    change_config(other, hidden_act="gelu")
    assert "hidden_act is gelu, the anchor's is silu" in errors(findings(tmp_path, anchor, other))[0]
    assert "vLLM's Qwen2Moe knows silu alone" in errors(findings(tmp_path, other, anchor))[0]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "llama"}, "is a 'llama' model"),
        ({"architectures": ["Qwen2ForSequenceClassification"]}, "is a Qwen2ForSequenceClassification"),
        ({"hidden_size": None}, "its config.json has no hidden_size"),
        ({"hidden_size": "64"}, "has no hidden_size, but '64'"),
        ({"num_attention_heads": 3}, "do not divide each other"),
        ({"rms_norm_eps": "1e-6"}, "its config.json says '1e-6' for rms_norm_eps"),
        ({"max_position_embeddings": "x"}, "its config.json says 'x' for max_position_embeddings"),
        ({"rope_scaling": "yarn"}, "its config.json says 'yarn' for rope_scaling"),
        ({"rope_scaling": {"type": "yarn", "factor": True}}, "its config.json says True for rope_scaling.factor"),
    ],
    ids=str,
)
def test_a_config_that_is_none_of_ours(
    tmp_path: Path, anchor: Path, other: Path, changes: dict[str, Any], words: str
) -> None:
    change_config(other, **changes)
    assert words in errors(findings(tmp_path, anchor, other))[0]
    (error,) = errors(findings(tmp_path, other, anchor))  # nothing can be compared with such an anchor
    assert error.startswith("anchor: ") and words in error


@pytest.mark.parametrize("key", ["rms_norm_eps", "max_position_embeddings"])
def test_a_null_where_a_number_is_needed(tmp_path: Path, anchor: Path, other: Path, key: str) -> None:
    write_json(other / "config.json", {**read_json(other / "config.json"), key: None, "head_dim": None})
    (error,) = errors(findings(tmp_path, anchor, other))
    assert f"its config.json says None for {key}" in error


def test_a_config_that_is_no_mapping(tmp_path: Path, anchor: Path, other: Path) -> None:
    (other / "config.json").write_text("[]")
    assert "holds no model config" in errors(findings(tmp_path, anchor, other))[0]


def without_biases(name: str, tensor: torch.Tensor) -> torch.Tensor | None:
    return None if name.endswith("_proj.bias") else tensor


def test_an_expert_without_biases_is_drifted_and_merges(tmp_path: Path, anchor: Path, other: Path) -> None:
    change_tensors(other, without_biases)
    (finding,) = findings(tmp_path, anchor, other)
    assert finding.severity == "warning" and "no biases for q, k and v, which the anchor has" in finding.what
    assert any("which the anchor does without" in f.what for f in findings(tmp_path, other, anchor))
    merge(make_recipe(tmp_path, anchor, {"general": anchor, "math": other}))


def test_an_anchor_without_biases_becomes_a_fused_model_that_computes_the_same(
    tmp_path: Path, anchor: Path, other: Path
) -> None:
    change_tensors(other, without_biases)
    expert = Path(shutil.copytree(other, tmp_path / "expert"))
    (note,) = findings(tmp_path, other, expert)
    assert note.severity == "note" and "gets zeros there" in note.why
    fused, report = AutoModelForCausalLM.from_pretrained(
        merge(make_recipe(tmp_path, other, {"general": other, "math": expert})), output_loading_info=True
    )
    assert all("shared_expert" in name for name in report["missing_keys"])  # there is none
    assert fused.config.qkv_bias
    ids = torch.arange(20)[None]
    dense = AutoModelForCausalLM.from_pretrained(other)
    assert torch.allclose(fused(ids).logits, dense(ids).logits, atol=1e-5)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["serving.max_model_len=131072"], "or set serving.yarn_factor to 4"),
        (["serving.max_model_len=131073"], "or set serving.yarn_factor to 5"),
        (["serving.max_model_len=131072", "serving.yarn_factor=2"], "beyond the anchor's 65536 positions (32768 by"),
        (["serving.max_model_len=131072", "serving.yarn_factor=4"], ""),
        (["serving.max_model_len=32768"], ""),
    ],
)
def test_long_contexts_need_yarn_with_a_factor_that_works(overrides: list[str], words: str) -> None:
    found = errors(check(load_recipe(FIVE, overrides)))
    assert len(found) == bool(words)
    assert not words or words in found[0]


def test_yarn_that_is_not_needed_is_a_warning() -> None:
    (finding,) = [f for f in check(load_recipe(FIVE, ["serving.yarn_factor=4"])) if f.where == "serving.yarn_factor"]
    assert finding.severity == "warning" and "costs quality on short texts" in finding.why


def test_an_anchor_that_is_stretched_already_has_its_length(tmp_path: Path, anchor: Path, other: Path) -> None:
    change_config(other, rope_parameters=YARN)
    serving = {"max_model_len": 1024, "sampling": {"max_tokens": 32}}
    assert not errors(findings(tmp_path, other, other, serving=serving))
    assert errors(findings(tmp_path, anchor, anchor, serving=serving))


@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_gguf_needs_a_power_of_two(tmp_path: Path, anchor: Path, count: int) -> None:
    recipe = make_recipe(tmp_path, anchor, {"general": anchor, "math": anchor})
    experts = [recipe.experts[0].model_copy(update={"name": f"e{i}"}) for i in range(count)]
    found = check(recipe.model_copy(update={"experts": tuple(experts)}))
    assert found == [] if count in (2, 4) else ["llama.cpp" in note.why for note in found] == [True]


@pytest.mark.parametrize(
    ("schema", "said"), [({"type": "object"}, False), ({"type": "nonsense"}, True)], ids=["fine", "broken"]
)
def test_a_question_whose_schema_is_none(tmp_path: Path, anchor: Path, schema: dict[str, Any], said: bool) -> None:
    questions = [{"question": "?", "json_schema": schema}]
    serving = {"max_model_len": 256, "sampling": {"max_tokens": 32}, "questions": questions}
    found = findings(tmp_path, anchor, anchor, serving=serving)
    assert [finding.where for finding in found] == (["serving.questions.0.json_schema"] if said else [])


def test_a_shared_expert_of_another_shape_is_an_error(tmp_path: Path, anchor: Path, other: Path) -> None:
    wide = write_model(tmp_path / "wide", intermediate_size=128)
    for model, wrong in ((other, False), (wide, True)):
        routing = {"shared_expert": str(model)}
        found = errors(findings(tmp_path, anchor, anchor, routing=routing))
        assert len(found) == wrong
        assert not wrong or found[0].startswith("routing.shared_expert: intermediate_size is 128")
