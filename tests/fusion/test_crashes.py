"""A branch that dies at any one of its changes to the disk: the same call, made again, goes on and ends."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen2ForCausalLM

from fusion import training
from fusion.branch import RESULT, train_expert
from fusion.checkpoint import Checkpoint
from fusion.workers import one_thread, worker_context
from tests.families import byte_tokenizer, config
from tests.fusion.test_branch import rows, settings

CHANGES = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir")  # Python's audit events
DIED = 9


def dies_at(change: int, folder: Path) -> None:
    """Ends this process right before its `change`-th change to `folder`, from 1 on, as a kill would."""
    seen = 0

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event not in CHANGES or (event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        path = str(arguments[0])  # of what rmtree removes the name alone
        if path.startswith(str(folder)) or event in ("os.remove", "os.rmdir"):
            seen += 1
            if seen == change:
                os._exit(DIED)

    sys.addaudithook(watch)


def branch(anchor: Path, out: Path, change: int | None = None) -> None:
    one_thread()
    if change is not None:
        dies_at(change, out.parent)
    train_expert(anchor, out, rows(16, 0), rows(4, 1), settings(steps=2, evaluate_every=1, allow_no_gain=True))


def codes_of(target: Callable[..., None], *calls: tuple[Any, ...]) -> list[int | None]:
    """The exit codes of processes side by side, one for each of `calls` of `target`.

    One thread starts and joins them all: `Process.start` polls every child there is, and of two threads that poll
    a forkserver's child at once the second finds its exit code read already and takes 255 for it.
    """
    processes = [worker_context().Process(target=target, args=call) for call in calls]  # type: ignore[attr-defined]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


@pytest.fixture(scope="module")
def anchor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("anchor") / "model"
    torch.manual_seed(0)
    Qwen2ForCausalLM(config(initializer_range=0.2)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def test_a_branch_goes_on_wherever_it_died(anchor: Path, tmp_path: Path) -> None:
    assert codes_of(branch, (anchor, tmp_path / "whole")) == [0]
    whole = Checkpoint(tmp_path / "whole")
    change, codes = 1, [DIED, DIED]
    while codes == [DIED, DIED]:
        outs = {tmp_path / str(number): number for number in (change, change + 1)}
        codes = codes_of(branch, *((anchor, out, number) for out, number in outs.items()))
        assert set(codes) <= {0, DIED}
        died = [out for out, code in zip(outs, codes, strict=True) if code == DIED]
        assert codes_of(branch, *((anchor, out) for out in died)) == [0] * len(died), (
            f"after deaths before changes {died}"
        )
        for out in outs:
            assert (out / RESULT).is_file()
            assert [path.name for path in tmp_path.glob(f".{out.name}.*")] == []
            assert all(torch.equal(Checkpoint(out).tensor(name), whole.tensor(name)) for name in whole.weight_map)
        change += 2
    assert change > 22


def test_a_trainer_state_cut_short_is_none(tmp_path: Path) -> None:
    for step, text in ((2, "{}"), (4, "{}"), (10, '{"global_st')):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(text)
    (tmp_path / "checkpoint-12").mkdir()
    assert training._last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-2", "checkpoint-4"}
