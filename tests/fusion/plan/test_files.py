"""A model's files: each finding from a model that is broken in that alone, and the commands that mend it, run."""

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fusion.checkpoint import INDEX, Checkpoint, read_json, write_json
from fusion.headers import write_index
from fusion.shards import write_shards
from tests.families import write_model
from tests.fusion.plan.planning import change_config, change_tensors, errors, findings


@pytest.fixture
def sharded(other: Path) -> Path:
    """The other model in shards with an index."""
    tensors = load_file(other / "model.safetensors")
    (other / "model.safetensors").unlink()
    write_index(other, write_shards(other, "model", tensors.items(), shard_bytes=100_000))
    return other


def run_fix(finding: str) -> Path:
    """Runs the command that a finding ends with; returns the folder that it saved to."""
    command = shlex.split(finding[finding.index("python -c") :])
    subprocess.run([sys.executable, *command[1:]], check=True, capture_output=True)
    return Path(command[2].split("m.save_pretrained('")[1].split("'")[0])


def test_shards_with_their_index_are_fine(tmp_path: Path, anchor: Path, sharded: Path) -> None:
    assert len(list(sharded.glob("*.safetensors"))) > 2
    assert findings(tmp_path, anchor, sharded) == []


def test_every_shard_that_is_missing_is_told_at_once(tmp_path: Path, anchor: Path, sharded: Path) -> None:
    shards = sorted(path.name for path in sharded.glob("*.safetensors"))
    for name in shards[:2]:
        (sharded / name).unlink()
    (error,) = errors(findings(tmp_path, anchor, sharded))
    assert f"lacks 2 of {len(shards)} files that its index names: {shards[0]}, {shards[1]}" in error


def test_shards_without_their_index(tmp_path: Path, anchor: Path, sharded: Path) -> None:
    (sharded / INDEX).unlink()
    (error,) = errors(findings(tmp_path, anchor, sharded))
    assert f"and no {INDEX}" in error


def test_an_index_that_names_what_its_file_does_not_hold(tmp_path: Path, anchor: Path, sharded: Path) -> None:
    index = read_json(sharded / INDEX)
    first, last = sorted(set(index["weight_map"].values()))[:: len(set(index["weight_map"].values())) - 1]
    name = next(name for name, file in index["weight_map"].items() if file == first)
    index["weight_map"][name] = last
    write_json(sharded / INDEX, index)
    (error,) = errors(findings(tmp_path, anchor, sharded))
    assert f"names tensor {name} that {last} does not hold" in error


@pytest.mark.parametrize(
    ("content", "words"),
    [
        *((text, "cannot be used (it has no 'weight_map' that") for text in ("{}", "[]", '{"weight_map": {}}')),
        *((text, "cannot be used (it has no 'weight_map' that") for text in ('{"weight_map": ["a"]}', "[1]")),
        ('{"weight_map": {"a": 1}}', "cannot be used (it has no 'weight_map' that"),
        ('{"weight_map": {', "cannot be read"),
    ],
)
def test_an_index_that_says_nothing(tmp_path: Path, anchor: Path, sharded: Path, content: str, words: str) -> None:
    (sharded / INDEX).write_text(content)
    (error,) = errors(findings(tmp_path, anchor, sharded))
    assert f"{INDEX} {words}" in error


def test_truncated_files_are_all_told(tmp_path: Path, anchor: Path, sharded: Path) -> None:
    shards = sorted(sharded.glob("*.safetensors"))
    for path, kept in zip(shards[:3], (-1, 100, 4), strict=True):  # in its tensors, in its header, before that
        path.write_bytes(path.read_bytes()[:kept])
    found = errors(findings(tmp_path, anchor, sharded))
    assert len(found) == 3
    assert all("cannot be read" in error and "truncated" in error for error in found)


def test_a_missing_tensor(tmp_path: Path, anchor: Path, other: Path) -> None:
    gone = "model.layers.1.self_attn.k_proj.bias"
    change_tensors(other, lambda name, tensor: None if name == gone else tensor)
    (error,) = errors(findings(tmp_path, anchor, other))
    assert f"lacks tensor {gone}" in error


def test_a_config_that_lies_about_its_tensors(tmp_path: Path, anchor: Path) -> None:
    other = write_model(tmp_path / "other", intermediate_size=128)
    change_config(other, intermediate_size=96)
    (error,) = errors(findings(tmp_path, anchor, other))
    assert "is (64, 128) in" in error and "its config.json makes it (64, 96)" in error


def test_the_anchors_files_are_checked_as_well(tmp_path: Path, anchor: Path, other: Path) -> None:
    change_tensors(other, lambda name, tensor: None if "layers.2.mlp" in name else tensor)
    (error,) = errors(findings(tmp_path, other, anchor))
    assert error.startswith("anchor: ") and "lacks 3 tensors" in error


@pytest.mark.parametrize(("name", "severity"), [("model.layers.0.mlp.extra.weight", "error"), ("extra", "warning")])
def test_tensors_that_a_qwen2_model_has_not(
    tmp_path: Path, anchor: Path, other: Path, name: str, severity: str
) -> None:
    tensors = load_file(other / "model.safetensors")
    save_file({**tensors, name: torch.zeros(2), "rotary_emb.inv_freq": torch.zeros(2)}, other / "model.safetensors")
    (finding,) = findings(tmp_path, anchor, other)
    assert finding.severity == severity and f"holds tensor {name} that a Qwen2 model does not have" in finding.what


def test_weights_that_are_quantised(tmp_path: Path, anchor: Path, other: Path) -> None:
    change_config(other, quantization_config={"bits": 4})
    assert "the checkpoint is quantised" in errors(findings(tmp_path, anchor, other))[0]
    change_config(other, quantization_config=None)
    change_tensors(other, lambda name, tensor: tensor.char() if "up_proj" in name else tensor)
    (error,) = errors(findings(tmp_path, anchor, other))
    assert "up_proj.weight is stored as int8: the checkpoint is quantised" in error


@pytest.mark.parametrize(
    ("theirs", "ours", "lost"),
    [
        (torch.float32, "bfloat16", "keeps 8 of 24 significant bits"),
        (torch.float16, "bfloat16", "keeps 8 of 11 significant bits"),
        (torch.float32, "float16", "and none beyond 65504"),
        (torch.bfloat16, "float16", "cannot hold weights beyond 65504"),
        (torch.bfloat16, "float32", ""),
        (torch.bfloat16, "bfloat16", ""),
    ],
    ids=str,
)
def test_what_the_cast_to_the_fused_models_dtype_loses(
    tmp_path: Path, anchor: Path, other: Path, theirs: torch.dtype, ours: str, lost: str
) -> None:
    base = Path(shutil.copytree(anchor, tmp_path / "base"))
    change_config(base, dtype=ours)
    change_tensors(base, lambda name, tensor: tensor.to(getattr(torch, ours)))
    change_tensors(other, lambda name, tensor: tensor.to(theirs if ".mlp." in name else getattr(torch, ours)))
    found = findings(tmp_path, base, other)
    assert [finding.severity for finding in found] == (["warning"] if lost else [])
    assert not lost or lost in found[0].why


def test_an_anchor_whose_config_names_a_narrower_dtype(tmp_path: Path, anchor: Path, other: Path) -> None:
    change_config(other, dtype="bfloat16")
    (finding, *_) = findings(tmp_path, other, other)
    assert finding.where == "anchor" and "its weights are float32, the fused model's bfloat16" in finding.what


def test_pickled_weights_are_refused_and_the_command_converts_them(tmp_path: Path, anchor: Path, other: Path) -> None:
    tensors = load_file(other / "model.safetensors")
    (other / "model.safetensors").unlink()
    torch.save(tensors, other / "pytorch_model.bin")
    (error,) = errors(findings(tmp_path, anchor, other))
    assert "pickled weights (pytorch_model.bin)" in error
    assert findings(tmp_path, anchor, run_fix(error)) == []


def test_remote_code_is_refused_and_the_command_saves_the_model_without(
    tmp_path: Path, anchor: Path, other: Path
) -> None:
    change_config(other, auto_map={"AutoModelForCausalLM": "modeling_evil.Model"})
    (other / "modeling_evil.py").write_text("raise RuntimeError('run')")
    (error,) = errors(findings(tmp_path, anchor, other))
    assert "auto_map in config.json: modeling_evil.Model" in error
    saved = run_fix(error)
    assert findings(tmp_path, anchor, saved) == []
    assert "auto_map" not in Checkpoint(saved).config


def test_remote_code_that_is_listed_is_refused_as_well(tmp_path: Path, anchor: Path, other: Path) -> None:
    change_config(other, auto_map=["modeling_evil.Model"])
    assert "needs code of its own" in errors(findings(tmp_path, anchor, other))[0]


def test_a_folder_without_weights(tmp_path: Path, anchor: Path, other: Path) -> None:
    (other / "model.safetensors").unlink()
    assert "holds no model.safetensors" in errors(findings(tmp_path, anchor, other))[0]


def test_all_that_is_wrong_with_a_model_is_told_at_once(tmp_path: Path, anchor: Path, other: Path) -> None:
    path = other / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    change_config(other, rope_parameters={"rope_type": "default", "rope_theta": 1e4}, num_attention_heads=4)
    data = json.loads((other / "tokenizer.json").read_text())
    data["model"]["vocab"]["a"], data["model"]["vocab"]["b"] = 1, 0
    (other / "tokenizer.json").write_text(json.dumps(data))
    found = "\n".join(errors(findings(tmp_path, anchor, other)))
    for words in ("truncated", "num_attention_heads is 4", "its tokenizer gives", "rope_theta is 10000"):
        assert words in found
