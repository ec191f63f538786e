"""What a user did wrong, in one sentence; the command line prints it and exits with 2."""

import inspect
import subprocess
import sys
from collections.abc import Callable


class UserError(Exception):
    """A mistake the user can mend: what was found, where, and what to do. Never shown with a traceback."""


def last_words(done: subprocess.CompletedProcess[str]) -> str:
    """The last line that a child printed before it failed, or by what it ended."""
    said = (done.stderr or done.stdout).strip().splitlines()
    return said[-1] if said else f"it ended with {done.returncode} and said nothing"


def counted(given: str) -> int:
    """A command's argument that counts something. Raises UserError where it is no number greater than 0."""
    if not given.isdecimal() or not int(given):
        raise UserError(f"{given!r} is no number greater than 0")
    return int(given)


def of_the_disk(error: OSError) -> str:
    """What the system says of a file, as a sentence."""
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{(error.strerror or str(error)).lower()}; name another place, or mend this one"


def run_main(main: Callable[..., object]) -> None:
    """Calls `main` of a module that is a command with its arguments; exits with 2 after a UserError or an OSError."""
    arguments = sys.argv[1:]
    try:
        try:
            inspect.signature(main).bind(*arguments)
        except TypeError as error:
            raise UserError(f"{error}: the first lines of {sys.argv[0]} show the command") from None
        main(*arguments)
    except (UserError, OSError) as error:
        said = of_the_disk(error) if isinstance(error, OSError) else error
        print(f"error: {said}", file=sys.stderr)
        sys.exit(2)
