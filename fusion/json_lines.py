"""Files of JSON lines that grow while a long step runs: what a killed run has left of its last line does not count."""

from pathlib import Path


def whole_lines(store: Path) -> list[bytes]:
    """The lines that were written to their end; none where there is no file."""
    return store.read_bytes().split(b"\n")[:-1] if store.is_file() else []


def cut_off_rest(store: Path) -> None:
    """Makes the file end with its last whole line, and makes an empty one where there is none."""
    with store.open("ab+") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
