"""Processes of one thread each, for models too small to keep several threads of one process busy.

On two cores, two of them train two experts of 3 million parameters in the time of one; one process with two threads is
1.25 times as fast as with one, and two such processes side by side wait for each other (notebooks/LOG.md).
"""

import multiprocessing
import os
import signal
import threading
from multiprocessing import forkserver
from multiprocessing.context import BaseContext


def worker_context() -> BaseContext:
    """Starts processes as forks of one clean server that imports torch and transformers once, from this call on."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fusion.branch", "fusion.demo_family"])
    forkserver.ensure_running()
    return context


def one_thread(bars: bool = False) -> None:
    """Makes the calling process a worker: one thread, no `bars`, and an end when its parent ends."""
    import torch
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.disable_progress_bar()
    if not bars:
        os.environ["QWEN_FUSION_QUIET"] = "1"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()  # however it ended
        os._exit(1)
