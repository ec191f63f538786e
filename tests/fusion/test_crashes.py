"""A branch that dies at any one of its changes to the disk: the same call, made again, goes on and ends."""

import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
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


def code_of(target: Callable[..., None], *arguments: Any) -> int | None:
    """The exit code of a process of its own that calls `target`."""
    process = worker_context().Process(target=target, args=arguments)  # type: ignore[attr-defined]
    process.start()
    process.join()
    code: int | None = process.exitcode
    return code


@pytest.fixture(scope="module")
def anchor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("anchor") / "model"
    torch.manual_seed(0)
    Qwen2ForCausalLM(config(initializer_range=0.2)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def test_a_branch_goes_on_wherever_it_died(anchor: Path, tmp_path: Path) -> None:
    assert code_of(branch, anchor, tmp_path / "whole") == 0
    whole = Checkpoint(tmp_path / "whole")

    def died(change: int) -> bool:
        out = tmp_path / str(change)
        code = code_of(branch, anchor, out, change)
        assert code in (0, DIED)
        if code == DIED:
            assert code_of(branch, anchor, out) == 0, f"after a death before change {change}"
        assert (out / RESULT).is_file()
        assert [path.name for path in tmp_path.glob(f".{out.name}.*")] == []
        assert all(torch.equal(Checkpoint(out).tensor(name), whole.tensor(name)) for name in whole.weight_map)
        return code == DIED

    change = 1
    with ThreadPoolExecutor(2) as pool:
        while all(pool.map(died, (change, change + 1))):
            change += 2
    assert change > 20


def test_a_trainer_state_cut_short_is_none(tmp_path: Path) -> None:
    for step, text in ((2, "{}"), (4, "{}"), (10, '{"global_st')):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(text)
    (tmp_path / "checkpoint-12").mkdir()
    assert training._last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-2", "checkpoint-4"}
