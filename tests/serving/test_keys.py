"""API keys: where they come from, and which header has one."""

from pathlib import Path

import pytest

from fusion.errors import UserError
from serving.guard.keys import VARIABLE, Keys, read_keys


def test_keys_come_from_a_file_and_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert read_keys(None) == ()
    file = tmp_path / "keys"
    file.write_text("# of the web page\nfirst\n\n  second  \n", encoding="utf-8")
    monkeypatch.setenv(VARIABLE, "third, ,fourth")
    assert read_keys(str(file)) == ("third", "fourth", "first", "second")
    with pytest.raises(UserError, match="is no file"):
        read_keys(str(tmp_path / "none"))
    file.write_text("# nobody\n", encoding="utf-8")
    with pytest.raises(UserError, match="has none"):
        read_keys(str(file))


@pytest.mark.parametrize(
    ("header", "allowed"),
    [
        (b"Bearer first", True),
        (b"bearer  second ", True),
        (b"Bearer third", False),
        (b"Basic first", False),
        (b"first", False),
        (b"Bearer", False),
        (b"", False),
        (None, False),
    ],
)
def test_a_bearer_token_has_to_be_a_key(header: bytes | None, allowed: bool) -> None:
    number = Keys(["first", "second"]).number(header)
    assert (number is not None) is allowed
    if number is not None:
        assert number == (1 if b"first" in (header or b"") else 2)
    assert Keys().number(header) is None and not Keys()
