"""Checkpoint folders: what is refused, what is written, and that nothing half-written is ever in place."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fusion.checkpoint import INDEX, Checkpoint, staged_folder, write_json
from fusion.errors import UserError
from fusion.headers import write_index
from fusion.hub import resolve_model
from fusion.shards import write_shards


@pytest.fixture
def model(tmp_path: Path, anchor: Path) -> Path:
    """A copy of the tiny anchor that a test may break."""
    return Path(shutil.copytree(anchor, tmp_path / "model"))


def test_killed_between_the_two_renames_the_next_call_finishes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "model"
    target.mkdir()
    (target / "old").touch()
    rename, calls = Path.rename, []

    def killed(self: Path, to: Path) -> Path:
        calls.append(to)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(KeyboardInterrupt), staged_folder(target) as aside:
        (aside / "new").touch()
    assert len(calls) == 2
    assert not target.exists()  # not there, rather than half there
    monkeypatch.undo()
    with staged_folder(target) as aside:
        (aside / "new").touch()
    assert [path.name for path in target.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A folder of two shards with their index."""
    folder = tmp_path / "sharded"
    folder.mkdir()
    write_json(folder / "config.json", {"model_type": "qwen2"})
    weight_map = write_shards(folder, "part", [("a", torch.ones(8)), ("b", torch.ones(8))], shard_bytes=32)
    write_index(folder, weight_map)
    return folder


def refused(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        Checkpoint(folder)
    return str(caught.value)


def test_pickled_weights_are_refused(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    torch.save(tensors, model / "pytorch_model.bin")
    assert "pickled weights" in refused(model)


def test_remote_code_is_refused(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    write_json(model / "config.json", {**config, "auto_map": {"AutoModel": "modeling_evil.Model"}})
    assert "auto_map" in refused(model)


def test_a_shard_that_the_index_names_must_exist(sharded: Path) -> None:
    (sharded / "part.00002.safetensors").unlink()
    assert "part.00002.safetensors" in refused(sharded)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    assert "config.json does not exist" in refused(tmp_path)
    write_json(tmp_path / "config.json", {})
    assert "holds no model.safetensors" in refused(tmp_path)


@pytest.mark.parametrize("kept", [0, 5, 200, -1])
def test_a_truncated_file_is_a_user_error(model: Path, kept: int) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    assert f"{path} cannot be read" in refused(model)


def test_a_truncated_shard_is_a_user_error(sharded: Path) -> None:
    path = sharded / "part.00002.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    checkpoint = Checkpoint(sharded)
    assert torch.equal(checkpoint.tensor("a"), torch.ones(8))
    with pytest.raises(UserError, match=r"part.00002\.safetensors cannot be read"):
        checkpoint.tensor("b")


@pytest.mark.parametrize("text", ["{", "{}"])
def test_a_broken_index_is_a_user_error(sharded: Path, text: str) -> None:
    (sharded / INDEX).write_text(text)
    assert INDEX in refused(sharded)


def test_a_broken_config_is_a_user_error(model: Path) -> None:
    (model / "config.json").write_text("{")
    assert "config.json cannot be read" in refused(model)


def test_a_tensor_that_is_not_there_is_a_user_error(model: Path) -> None:
    with pytest.raises(UserError, match=r"no tensor 'model\.layers\.9\.mlp\.gate\.weight'"):
        Checkpoint(model).tensor("model.layers.9.mlp.gate.weight")


def test_an_exception_leaves_no_staged_folder(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), staged_folder(tmp_path / "out") as aside:
        (aside / "half").write_text("x")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_an_exception_leaves_the_old_folder(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")
    with pytest.raises(RuntimeError), staged_folder(tmp_path / "out") as aside:
        (aside / "half").write_text("x")
        raise RuntimeError
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "old"]


def test_a_staged_folder_replaces_the_old_one_and_what_a_killed_run_left(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    for leftover in (out, out.with_name(".out.partial"), out.with_name(".out.old")):
        leftover.mkdir(parents=True)
        (leftover / "old").write_text("old")
    with staged_folder(out) as aside:
        assert list(aside.iterdir()) == []
        assert (out / "old").exists()
        (aside / "new").write_text("new")
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert [path.name for path in out.iterdir()] == ["new"]


def test_shards_are_split_by_bytes_and_the_index_counts_them(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(10),  # 40 bytes
        "b": torch.randn(10, dtype=torch.float64),  # 80 bytes
        "c": torch.randn(5, 2).to(torch.bfloat16),  # 20 bytes
        "d": torch.randn(50).to(torch.float16).view(5, 10).T,  # 100 bytes, not contiguous
        "e": torch.zeros(0, 4),
    }
    weight_map = write_shards(tmp_path, "part", tensors.items(), shard_bytes=100)
    files = ["part.00001", "part.00002", "part.00003"]
    assert weight_map == dict(zip("abcde", [f"{files[i]}.safetensors" for i in (0, 1, 1, 2, 2)], strict=True))
    write_index(tmp_path, weight_map)
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == 240
    assert index["weight_map"] == weight_map
    for name, file in weight_map.items():
        assert torch.equal(load_file(tmp_path / file)[name], tensors[name])


def test_one_shard_carries_no_number(tmp_path: Path) -> None:
    assert write_shards(tmp_path, "part", [("a", torch.ones(2))]) == {"a": "part.safetensors"}
    assert [path.name for path in tmp_path.iterdir()] == ["part.safetensors"]


def test_a_tensor_larger_than_a_shard_gets_its_own(tmp_path: Path) -> None:
    tensors = [(name, torch.ones(100)) for name in "ab"]
    assert len(set(write_shards(tmp_path, "part", tensors, shard_bytes=8).values())) == 2


def test_shapes_come_from_the_header_and_prefixes_select(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", {})
    save_file({"x.a": torch.ones(2, 3), "y.a": torch.ones(1)}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.shape("x.a") == (2, 3)
    assert list(checkpoint.tensors("x.")) == ["a"]
    assert "y.a" in checkpoint
    assert "z.a" not in checkpoint


@pytest.mark.parametrize("model", ["/nowhere/model", "./nowhere", "~/nowhere-at-all", "a/b/c", "nowhere"])
def test_a_missing_local_model_is_named(model: str) -> None:
    with pytest.raises(UserError, match="is neither a folder nor a hub id") as caught:
        resolve_model(model)
    assert f"'{model}'" in str(caught.value)


def test_a_hub_id_that_is_not_here_is_not_downloaded_unless_allowed() -> None:
    with pytest.raises(UserError, match="'nobody/nothing' is not on this machine"):
        resolve_model("nobody/nothing", allow_download=False)


def test_a_folder_is_taken_as_it_is(anchor: Path) -> None:
    assert resolve_model(str(anchor)) == anchor


def test_a_snapshot_without_weights_is_not_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `plan` leaves in the hub's cache is a config alone."""
    snapshot = tmp_path / "models--nobody--nothing" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    refs = tmp_path / "models--nobody--nothing" / "refs"
    refs.mkdir()
    (refs / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="is not on this machine"):
        resolve_model("nobody/nothing", allow_download=False)
    (snapshot / "model.safetensors").write_bytes(b"")
    assert resolve_model("nobody/nothing", allow_download=False) == snapshot
