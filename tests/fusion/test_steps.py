"""A step runs once per content of its inputs, and leaves a record only when it has finished."""

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from fusion.errors import UserError
from fusion.sections.data import DataSource
from fusion.sections.fusing import Routing
from fusion.steps import STATE, Step, forget, run_step, run_steps


class Work:
    """A step that copies its input to its output and counts how often it ran."""

    def __init__(self, folder: Path):
        self.folder, self.runs, self.settings = folder, 0, {"routing": Routing(top_k=1), "seed": 0}
        self.source, self.target = folder / "in.txt", folder / "out.txt"
        self.source.write_text("one")

    def act(self) -> None:
        self.runs += 1
        self.target.write_text(self.source.read_text())

    def step(self, **changes: object) -> Step:
        parts = {"name": "copy", "settings": self.settings, "inputs": [self.source], "outputs": [self.target]}
        return Step(**{**parts, "action": self.act, **changes})  # type: ignore[arg-type]

    def run(self, **changes: object) -> bool:
        return run_step(self.step(**changes), self.folder / "state")


@pytest.fixture
def work(tmp_path: Path) -> Work:
    return Work(tmp_path)


def test_the_second_call_does_nothing_and_says_so(work: Work, capsys: pytest.CaptureFixture[str]) -> None:
    assert [work.run(), work.run(), work.run()] == [True, False, False]
    assert work.runs == 1
    assert capsys.readouterr().err.count("copy: unchanged, skipped") == 2


def test_commands_at_work_on_other_experts_keep_each_others_records(work: Work) -> None:
    def run(number: int) -> bool:
        return run_step(work.step(name=f"expert {number}", action=lambda: None, outputs=[]), work.folder / "state")

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(run, range(40)))
    assert len(json.loads((work.folder / "state" / STATE).read_text())) == 40


def test_changed_content_runs_again(work: Work) -> None:
    work.run()
    stamp = work.source.stat()
    work.source.write_text("two")  # as long as before, and no newer
    os.utime(work.source, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert work.run()
    assert work.target.read_text() == "two"


def test_a_newer_file_with_the_same_content_does_not(work: Work) -> None:
    work.run()
    os.utime(work.source, (1, 1))
    assert not work.run()


@pytest.mark.parametrize("settings", [{"routing": Routing(top_k=2), "seed": 0}, {"routing": Routing(top_k=1)}, None])
def test_changed_settings_run_again(work: Work, settings: object) -> None:
    work.run()
    assert work.run(settings=settings)
    assert not work.run(settings=settings)
    assert work.run()


def test_nested_sections_count(work: Work) -> None:
    def settings(split: str) -> object:
        return [{"domains": {"math": (DataSource(generated="demo.math", split=split),)}}]

    work.run(settings=settings("train"))
    assert not work.run(settings=settings("train"))
    assert work.run(settings=settings("held_out"))


def test_a_missing_output_runs_again(work: Work) -> None:
    work.run()
    work.target.unlink()
    assert work.run()
    assert work.target.exists()


def test_files_in_input_folders_count(work: Work) -> None:
    folder = work.folder / "inputs"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "a").write_text("a")
    work.run(inputs=[folder])
    assert not work.run(inputs=[folder])
    (folder / "deep" / "b").write_text("b")
    assert work.run(inputs=[folder])
    (folder / "deep" / "b").unlink()
    assert work.run(inputs=[folder])


def test_force_runs_again(work: Work) -> None:
    work.run()
    assert run_step(work.step(), work.folder / "state", force=True)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_leaves_no_record(work: Work, error: type[BaseException]) -> None:
    def fail() -> None:
        work.target.write_text("half")
        raise error

    work.run()
    with pytest.raises(error):
        work.run(action=fail, settings="changed")
    assert work.run()  # also not the record of the run before: its output is gone
    assert work.target.read_text() == "one"


def test_steps_have_records_of_their_own(work: Work) -> None:
    work.run()
    assert work.run(name="another")
    assert not work.run()
    forget(work.folder / "state", ["another"])
    assert not work.run()
    assert work.run(name="another")


@pytest.mark.parametrize("text", ["", "{", "[]"])
def test_a_broken_record_file_means_doing_it_again(work: Work, text: str) -> None:
    work.run()
    (work.folder / "state" / STATE).write_text(text)
    assert work.run()
    assert not work.run()


def note_process(path: Path) -> str:
    """A step's work: leaves its process id in `path`, and takes long enough for another to start."""
    import torch

    time.sleep(0.5)
    path.write_text(f"{os.getpid()} {torch.get_num_threads()}")
    return f"wrote {path.name}"


def fail(path: Path) -> str:
    raise UserError(f"{path.name} cannot be made")


def test_steps_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each in a process of one thread; one that fails ends the call with its sentence, the others are kept."""
    files = [tmp_path / name for name in "abce"]
    steps = [Step(file.name, None, [], [file], partial(note_process, file)) for file in files]
    broken = Step("d", None, [], [tmp_path / "d"], partial(fail, tmp_path / "d"))
    with pytest.raises(UserError, match="d cannot be made"):
        run_steps([*steps[:2], broken], tmp_path, at_once=2)
    assert run_steps(steps, tmp_path, at_once=2)  # two at least are left, c and e
    written = [file.read_text().split() for file in files]
    assert {threads for _, threads in written} == {"1"}
    assert str(os.getpid()) not in {process for process, _ in written}
    assert not run_steps(steps, tmp_path, at_once=2)
    assert set(json.loads((tmp_path / STATE).read_text())) == {"a", "b", "c", "e"}
    shown = capsys.readouterr().err
    assert "wrote a" in shown and "c: unchanged, skipped" in shown
