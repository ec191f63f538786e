"""Progress bars with rate and time left; `QWEN_FUSION_QUIET=1` silences them."""

import os
import warnings
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.progress import Task as RichTask
from rich.text import Text

T = TypeVar("T")
console = Console(stderr=True)


def quiet() -> bool:
    """True where progress is switched off by the environment."""
    return os.environ.get("QWEN_FUSION_QUIET", "") not in ("", "0")


def size(count: float) -> str:
    """Bytes in words: GB, below that MB."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def quiet_libraries() -> None:
    """Silences transformers' bars, and what it and torch say of an empty shared expert, which is meant."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", message="Initializing zero-element tensors")


class _Rate(ProgressColumn):
    def render(self, task: RichTask) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.1f} {task.fields.get('unit', 'it')}/s" if speed else "", style="dim")


def progress_bar() -> Progress:
    """A rich progress display on standard error: bar, count, rate, time left."""
    return _bar(MofNCompleteColumn(), _Rate())


def bytes_bar() -> Progress:
    """The same of bytes, for what moves files: totals and advances are bytes, the rate is bytes a second."""
    return _bar(DownloadColumn(), TransferSpeedColumn())


def _bar(*count_and_rate: ProgressColumn) -> Progress:
    what = (TextColumn("{task.description}"), BarColumn())
    return Progress(*what, *count_and_rate, TimeRemainingColumn(), console=console, disable=quiet())


def track(items: Iterable[T], description: str, total: int | None = None, unit: str = "it") -> Iterator[T]:
    """Yields `items` while a bar shows how many went by, at which rate, and how long the rest will take."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    with progress_bar() as bar:
        task = bar.add_task(description, total=total, unit=unit)
        for item in items:
            yield item
            bar.advance(task)
