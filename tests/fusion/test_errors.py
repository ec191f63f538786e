"""Modules that are commands: a user's mistake is one sentence and exit code 2."""

import sys
from pathlib import Path

import pytest

from fusion.errors import UserError, run_main


def refused(path: str, count: str = "3") -> None:
    raise UserError(f"{path} has no {count} rows: write them")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["a.jsonl"], "error: a.jsonl has no 3 rows: write them\n"),
        (["a.jsonl", "4"], "error: a.jsonl has no 4 rows: write them\n"),
        ([], "error: missing a required argument: 'path': the first lines of command.py show the command\n"),
        (["a", "b", "c"], "error: too many positional arguments: the first lines of command.py show the command\n"),
    ],
)
def test_a_mistake_is_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["command.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        run_main(refused)
    assert ended.value.code == 2
    assert capsys.readouterr().err == sentence


def test_what_the_system_says_of_a_file_is_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "argv", ["command.py"])
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as ended:
        run_main((tmp_path / "file").mkdir)
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'file'}: file exists; name another place, or mend this one\n"
