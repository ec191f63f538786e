"""The background pass: computes which experts served a request, where no engine tells, and draws its page.

    python -m serving.records.observer RECIPE

`serve` starts it, with least priority and on one CPU core, where the recipe explains a share of the requests or shows
the page. It takes what waits in the store, runs it through the fused checkpoint layer by layer, several requests at a
time, and puts down shares, the classifier's opinion where the recipe labels by it, and the page where it is wanted.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from sqlalchemy.exc import SQLAlchemyError

from fusion.errors import UserError, run_main
from fusion.recipe import Recipe
from fusion.recipe_file import load_recipe
from serving.records.record import WHOLE, RoutingRecord, Shares
from serving.records.settings import store_url
from serving.records.store import Store, opened

if TYPE_CHECKING:
    from gate_training.labelling.classifier import Classify

AT_ONCE = 16
IDLE_S = 1.0
GRACE_S = 5.0
NICE = 10


@contextmanager
def observing(recipe: Recipe, log: Path) -> Iterator[None]:
    """The background pass, as a process of its own, for the length of a `with` block, where the recipe wants one."""
    guard = recipe.serving.guard
    if guard.records is None or not (guard.records.explain_share or guard.ui):
        yield
        return
    log.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", suffix=".yaml", encoding="utf-8") as as_it_is, log.open("wb") as said:
        yaml.safe_dump(recipe.model_dump(mode="json"), as_it_is)  # with every override
        as_it_is.flush()
        supervisor = Path(__file__).parents[1] / "supervisor.py"
        command = [sys.executable, str(supervisor), str(GRACE_S), sys.executable, "-m", __spec__.name, as_it_is.name]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "QWEN_FUSION_QUIET": "1"}
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=said, stderr=said, env=environment, start_new_session=True
        )
        try:
            yield
        finally:
            assert process.stdin is not None
            process.stdin.close()  # which ends it, as the end of this process would
            process.wait()


def observe(recipe: Recipe, store: Store, opinions: "Opinions") -> int:
    """Does what waits, at most AT_ONCE requests; how many there were.

    A request that cannot be explained, such as one that the chat template refuses, waits no longer and costs no other.
    """
    waiting = store.waiting(AT_ONCE)
    try:
        _observe(recipe, store, opinions, waiting)
    except (UserError, SQLAlchemyError):
        raise
    except Exception:
        for row in waiting:
            try:
                _observe(recipe, store, opinions, [row])
            except (UserError, SQLAlchemyError):
                raise
            except Exception as error:
                print(f"request {row[2].request_id} cannot be explained: {error}", file=sys.stderr, flush=True)
                store.fill(row[0])
    return len(waiting)


def _observe(
    recipe: Recipe, store: Store, opinions: "Opinions", waiting: Sequence[tuple[int, str, RoutingRecord]]
) -> None:
    from fusion.checkpoint import Checkpoint
    from fusion.encoding import load_tokenizer
    from fusion.explain.conversation import Conversation
    from fusion.explain.explain import explain_all
    from fusion.explain.page import page

    if not waiting:
        return
    conversations = [Conversation(tuple(record.asked), record.answered or None) for _, _, record in waiting]
    explained = explain_all(Checkpoint(recipe.fused), load_tokenizer(recipe.fused), conversations)
    said = opinions([record for _, _, record in waiting])
    for (number, wanted, record), found, channels in zip(waiting, explained, said, strict=True):
        shares: Shares = {WHOLE: found.shares.judged, **{group.name: group.shares.judged for group in found.groups}}
        rounded = {name: {e: round(share, 4) for e, share in part.items()} for name, part in shares.items()}
        known = record.shares_source == "engine"
        store.fill(number, channels, None if known else rounded, page(found) if wanted == "page" else None)


class Opinions:
    """The label classifier's opinions, where the recipe labels by it: learnt once, from the training rows."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._classify: Classify | None = None
        self._heard = recipe.gate_training.labels in ("classifier", "combined")

    def __call__(self, records: Sequence[RoutingRecord]) -> list[dict[str, dict[str, Any]]]:
        """The channels of each record, with the classifier's."""
        from serving.records.recorder import question_of

        if not self._heard:
            return [record.channels for record in records]
        if self._classify is None:
            from fusion.data import train_rows
            from gate_training.labelling.classifier import recipe_classifier

            settings = self._recipe.gate_training
            learnt = [] if settings.classifier else train_rows(self._recipe, settings.rows, settings.seed)
            self._classify = recipe_classifier(self._recipe, learnt)
        found = self._classify([question_of({"messages": record.asked}) for record in records])
        return [
            {**record.channels, "classifier": {"domain": label.domain, "evidence": "", "confidence": label.confidence}}
            for record, label in zip(records, found, strict=True)
        ]


def main(path: str) -> None:
    """Observes until it is ended."""
    os.nice(NICE)
    recipe = load_recipe(Path(path), [])
    opinions = Opinions(recipe)
    with opened(store_url(recipe)) as store:
        while True:
            try:
                done = observe(recipe, store, opinions)
            except (UserError, SQLAlchemyError) as error:  # a checkpoint that is being replaced: the requests wait
                print(error, file=sys.stderr, flush=True)
                done = 0
            if not done:
                time.sleep(IDLE_S)


if __name__ == "__main__":
    run_main(main)
