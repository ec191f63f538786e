"""What runs in the sandbox: reads code from standard input, gives up all but computing, runs the code.

fusion/sandbox.py starts it by its path, with seconds and bytes of memory; a token and the code come in on standard
input. Modules of the standard library and numpy are imported, by the code's own import statements, before files are out
of reach.
"""

import ast
import importlib
import os
import resource
import sys
import types
from contextlib import suppress

NO_SANDBOX = "no sandbox"  # said before any code is run
# what numpy imports when it is asked for
NUMPY = ("numpy.random", "numpy.fft", "numpy.linalg", "numpy.polynomial", "numpy.testing", "numpy.ma")
OUTPUT_BYTES = 2**20
# what others import late
EARLY = (
    "_strptime",
    "encodings.idna",
    "encodings.latin_1",
    "decimal",
    "linecache",
    "traceback",
)
# fmt: off
ALLOWED = (
    "brk", "clock_getres", "clock_gettime", "clock_nanosleep", "close", "exit", "exit_group", "fstat", "futex",
    "getpid", "getppid", "getrandom", "getrusage", "gettid", "gettimeofday", "lseek", "madvise", "mmap",
    "mprotect", "mremap", "munmap", "nanosleep", "read", "restart_syscall", "rt_sigaction", "rt_sigprocmask",
    "rt_sigreturn", "sched_getaffinity", "sched_yield", "sigaltstack", "sysinfo", "time", "times", "uname",
)
# fmt: on


def main() -> None:
    """Runs the code; says the token that it was given as the last word where the code came to its end."""
    seconds, memory = int(sys.argv[1]), int(sys.argv[2])
    del sys.argv[1:]
    token, _, source = sys.stdin.buffer.read().decode().partition("\n")
    for what, limit in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, OUTPUT_BYTES),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(what, (limit, limit))  # of the compiler and the imports too
    program = compile(source, "<answer>", "exec")
    import_early(source)
    try:
        give_up()
    except (ImportError, OSError, RuntimeError):
        os.write(2, NO_SANDBOX.encode())
        os._exit(1)
    os.write(2, b"\n")  # what the code says begins here
    answer = types.ModuleType(
        "answer"
    )  # its `if __name__ == "__main__"` is left out, as upstream's harnesses leave it out
    sys.modules["answer"] = answer
    exec(program, answer.__dict__)
    sys.stdout.flush()
    os.write(2, token.encode())
    os._exit(0)


def import_early(source: str) -> None:
    """Imports what the code imports, as far as it is of the standard library or numpy."""
    names = set(EARLY)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    if any(name.split(".")[0] == "numpy" for name in names):
        names.update(NUMPY)
    known = (sys.stdlib_module_names | {"numpy"}) - {"antigravity"}  # which opens a browser
    for name in sorted(names):
        if name.split(".")[0] in known:
            with suppress(Exception):
                importlib.import_module(name)


def give_up() -> None:
    """From here on the kernel refuses all but computing, and writing to the standard streams."""
    import errno

    from pyseccomp import ALLOW, ERRNO, LE, Arg, SyscallFilter

    rules = SyscallFilter(ERRNO(errno.EPERM))
    for name in ALLOWED:
        with suppress(RuntimeError):  # a call that this architecture has under another name
            rules.add_rule(ALLOW, name)
    rules.add_rule(ALLOW, "write", Arg(0, LE, 2))
    rules.load()


if __name__ == "__main__":
    main()
