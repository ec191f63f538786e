"""A merge that is killed, at any moment, or finds no room: nothing wrong can be loaded, and the next one goes on."""

import multiprocessing
import random
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Event, Thread

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from fusion import merge as merging
from fusion.architecture import MANIFEST
from fusion.checkpoint import file_hash, read_json, write_json
from fusion.cli import main
from fusion.errors import UserError
from fusion.merge import merge
from fusion.recipe import Recipe
from fusion.resumable import JOURNAL
from fusion.road import fused_folder
from fusion.steps import lock
from fusion.verify import verify
from tests.families import write_model
from tests.recipes import make_recipe

KILLS = 20


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    """Four experts of 2.5 million parameters, in some 40 shards."""
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4}
    anchor = write_model(tmp_path / "anchor", seed=1, **shape)
    names = ("general", "math", "coding")
    experts = {name: write_model(tmp_path / name, seed=i, anchor=anchor, **shape) for i, name in enumerate(names)}
    return make_recipe(tmp_path, anchor, experts, merging={"shard_bytes": 2**20})


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: file_hash(path) for path in folder.iterdir()}


def shards(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("[a-z]*.safetensors")}


def test_killed_at_any_moment_it_goes_on_and_ends_as_if_it_never_was(recipe: Recipe, tmp_path: Path) -> None:
    begin = time.monotonic()
    whole = merge(recipe, tmp_path / "whole")
    seconds = time.monotonic() - begin
    random.seed(0)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fusion.merge"])
    kills = resumed = 0
    partial = recipe.fused.with_name(".fused.partial")
    while kills < KILLS:
        process = context.Process(target=merge, args=(recipe,))
        had = len(list(partial.glob("*")))
        process.start()
        while process.is_alive() and len(list(partial.glob("*"))) == had and not recipe.fused.exists():
            time.sleep(0.001)  # it is still importing, or checks what is there
        time.sleep(random.uniform(0, 0.3) * seconds)
        process.kill()
        process.join()
        if recipe.fused.exists():
            assert not verify(recipe.fused).problems
            shutil.rmtree(recipe.fused)  # begin again
        kills += process.exitcode != 0
        resumed += (partial / JOURNAL).is_file() and bool(read_json(partial / JOURNAL)["files"])
    assert resumed  # some were killed between their shards
    merge(recipe)
    assert hashes(recipe.fused) == hashes(whole)
    assert [path.name for path in recipe.folder.iterdir()] == ["fused"]
    assert not verify(recipe.fused).problems


class Stop(BaseException):
    """As Ctrl-C, or a kill: not an error of the merge."""


def interrupted(recipe: Recipe, monkeypatch: pytest.MonkeyPatch, after: int) -> Path:
    """The folder that a merge leaves which is stopped after so many shards."""
    write, left = merging.write_shard, [after]

    def write_some(*arguments: object) -> str:
        if not left[0]:
            raise Stop
        left[0] -= 1
        return write(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(merging, "write_shard", write_some)
        merge(recipe)
    return recipe.fused.with_name(".fused.partial")


def test_finished_shards_are_not_written_again(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = hashes(merge(recipe, tmp_path / "whole"))
    partial = interrupted(recipe, monkeypatch, after=5)
    written = shards(partial)
    damaged = sorted(written)[0]
    data = bytearray((partial / damaged).read_bytes())
    data[-1] ^= 1  # a disk that lost power, say: what is recorded is not what is there
    (partial / damaged).write_bytes(data)
    merge(recipe)
    again = shards(recipe.fused)
    assert len(written) == 5 < len(again)
    assert {name for name, stamp in written.items() if again[name] == stamp} == written.keys() - {damaged}
    assert hashes(recipe.fused) == whole


def test_an_adapter_that_has_changed_is_not_mixed_with_what_it_was(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "anchor", dtype=torch.float32)
    config = LoraConfig(r=2, target_modules=["gate_proj", "up_proj", "down_proj"], init_lora_weights=False)
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    experts = tuple(e.model_copy(update={"adapter": str(tmp_path / "adapter")}) for e in recipe.experts)
    recipe = recipe.model_copy(update={"experts": experts})
    interrupted(recipe, monkeypatch, after=8)
    path = tmp_path / "adapter" / "adapter_config.json"
    write_json(path, {**read_json(path), "lora_alpha": 64})
    merge(recipe)
    found = verify(recipe.fused)
    assert not found.problems and len(found.equal) == 4


@pytest.mark.parametrize("change", ["source", "order", "shard_bytes"])
def test_an_interrupted_merge_of_something_else_is_begun_again(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    partial = interrupted(recipe, monkeypatch, after=5)
    stamps = shards(partial)
    if change == "source":
        shape = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4}
        shutil.rmtree(tmp_path / "general")
        write_model(tmp_path / "general", seed=9, anchor=tmp_path / "anchor", **shape)
    elif change == "order":
        recipe = recipe.model_copy(update={"experts": recipe.experts[::-1]})
    else:
        recipe = recipe.model_copy(update={"merging": recipe.merging.model_copy(update={"shard_bytes": 2**20 + 1})})
    merge(recipe)
    assert not set(stamps.items()) & set(shards(recipe.fused).items())
    assert not verify(recipe.fused).problems


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 8 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_noticed_before_anything_is_written(recipe: Recipe, small_disk: Path) -> None:
    with pytest.raises(UserError, match=r"has 8\.4 MB free and \d+\.\d MB are to be written there"):
        merge(recipe, small_disk / "fused")
    assert not list(small_disk.iterdir())


def test_a_disk_that_fills_up_on_the_way_leaves_nothing(
    recipe: Recipe, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merging.Journal, "check_room", lambda self, wanted: None)  # somebody else fills it later
    with pytest.raises(UserError, match="fused: no space left on device; what is written so far is kept"):
        merge(recipe, small_disk / "fused")
    assert [path.name for path in small_disk.iterdir()] == [".fused.partial"]
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    kept = shards(small_disk / ".fused.partial")
    again = shards(merge(recipe, small_disk / "fused"))
    assert sum(again[name] == stamp for name, stamp in kept.items()) >= len(kept) - 1 > 0  # but the one it broke off in
    assert not verify(small_disk / "fused").problems


def test_a_folder_that_cannot_be_written_is_one_sentence(
    recipe: Recipe,
    small_disk: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = recipe.model_copy(update={"output": str(small_disk / "run")})
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe.model_dump(mode="json", exclude_none=True)), encoding="utf-8")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    monkeypatch.setattr("sys.argv", ["qwen-fusion", "merge", str(file), "-q"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("error: ") and f"output: {small_disk / 'run'} cannot be created" in said


def test_a_checkpoint_that_is_replaced_is_whole_whenever_it_is_killed(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge(recipe)
    before = hashes(recipe.fused)
    rename = Path.rename

    def stop(path: Path, target: Path) -> Path:
        if path.name == ".fused.partial":
            raise Stop
        return rename(path, target)

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(Path, "rename", stop)
        merge(recipe)
    assert not recipe.fused.exists()  # moved away, the new one not yet in its place
    assert hashes(fused_folder(recipe)) == before
    stamps = shards(recipe.fused.with_name(".fused.partial"))
    merge(recipe)
    assert hashes(recipe.fused) == before
    del stamps["gates.safetensors"]
    assert stamps.items() <= shards(recipe.fused).items()  # what was complete was not written again
    assert [path.name for path in recipe.folder.iterdir()] == ["fused"]


def test_a_second_merge_waits_and_says_so(recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "link").symlink_to(recipe.folder)
    recipe.folder.mkdir()
    held = Event()

    def hold() -> None:
        with lock(tmp_path / "link" / "fused", "merge"):  # another name of the same place
            held.set()
            time.sleep(0.5)

    Thread(target=hold).start()
    held.wait()
    merge(recipe)
    assert "another merge is at work" in capsys.readouterr().err


def test_the_manifest_is_of_all_shards_after_a_resumed_merge(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4}
    drifted = write_model(tmp_path / "drifted", seed=9, anchor=tmp_path / "anchor", drift=True, **shape)
    experts = tuple(
        expert.model_copy(update={"model": str(drifted)}) if expert.name == "math" else expert
        for expert in recipe.experts
    )
    recipe = recipe.model_copy(update={"experts": experts})
    interrupted(recipe, monkeypatch, after=8)
    manifest = read_json(merge(recipe) / MANIFEST)
    assert [row["anchored"] for row in manifest["experts"]] == [True, False, True]
    assert manifest["sha256"].keys() == shards(recipe.fused).keys() - {"gates.safetensors"}
