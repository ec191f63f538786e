"""The background pass: computes which experts served a request, where no engine tells, and draws its page.

    python -m serving.records.observer RECIPE

`serve` starts it, with least priority and on one CPU core, where the recipe explains a share of the requests or shows
the page. It takes what waits in the store, runs it through the fused checkpoint layer by layer, several requests at a
time, and puts down shares, the classifier's opinion where the recipe labels by it, and the page where it is wanted.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy.exc import SQLAlchemyError

from fusion.errors import UserError, run_main
from fusion.recipe import Recipe
from fusion.recipe_file import as_file, load_recipe
from serving import supervisor
from serving.records.record import BY_DEFAULT, WHOLE, RoutingRecord, Shares
from serving.records.settings import store_url
from serving.records.store import Store, opened

if TYPE_CHECKING:
    from fusion.checkpoint import Checkpoint
    from gate_training.labelling.classifier import Classify

AT_ONCE = 16
IDLE_S = 1.0
GRACE_S = 5.0
NICE = 10
Waiting = tuple[int, str, RoutingRecord]  # as Store.waiting gives them


@contextmanager
def observing(recipe: Recipe, log: Path) -> Iterator[None]:
    """The background pass, as a process of its own, for the length of a `with` block, where the recipe wants one."""
    guard = recipe.serving.guard
    if guard.records is None or not (guard.records.explain_share or guard.ui):
        yield
        return
    log.parent.mkdir(parents=True, exist_ok=True)
    with as_file(recipe) as path, log.open("wb") as said:
        command = [sys.executable, "-m", __spec__.name, str(path)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "QWEN_FUSION_QUIET": "1"}
        process = supervisor.start(command, GRACE_S, stdout=said, stderr=said, env=environment)
        try:
            yield
        finally:
            assert process.stdin is not None
            process.stdin.close()  # which ends it, as the end of this process would
            process.wait()


def observe(recipe: Recipe, store: Store, opinions: "Opinions") -> int:
    """Does what waits, at most AT_ONCE requests; how many there were.

    A request that cannot be explained, such as one that the chat template refuses, costs no other: its page says why.
    Raises UserError where there is no checkpoint to explain it by, and SQLAlchemyError; the requests wait.
    """
    waiting = store.waiting(AT_ONCE)
    if not waiting:
        return 0
    explain = partial(_explain, recipe, store, opinions, _explained_by(recipe))
    try:
        explain(waiting)
    except SQLAlchemyError:
        raise
    except Exception:  # one of them cannot be explained: each alone
        for row in waiting:
            _explain_or_say_why(explain, store, row)
    return len(waiting)


def _explain_or_say_why(explain: Callable[[list[Waiting]], None], store: Store, row: Waiting) -> None:
    try:
        explain([row])
    except SQLAlchemyError:
        raise
    except Exception as error:
        said = f"request {row[2].request_id} cannot be explained: {error}"
        print(said, file=sys.stderr, flush=True)
        store.fill(row[0], page=f"<!doctype html><title>explain</title><p>{escape(said)}</p>")


def _explained_by(recipe: Recipe) -> tuple["Checkpoint", Any]:
    """The checkpoint that is served, as it is served, with its tokenizer; the fused one where that is quantised."""
    from fusion.explain.asked import opened_checkpoint
    from serving.ask import served_folder

    for folder in dict.fromkeys((served_folder(recipe), recipe.fused)):
        if (folder / "config.json").is_file():
            checkpoint, tokenizer = opened_checkpoint(recipe, folder)
            if "quantization_config" not in checkpoint.config:
                return checkpoint, tokenizer
    raise UserError(f"there is no fused model in {recipe.fused} to explain requests by")


def _explain(
    recipe: Recipe, store: Store, opinions: "Opinions", by: tuple["Checkpoint", Any], waiting: Sequence[Waiting]
) -> None:
    from fusion.explain.asked import refuse_too_long
    from fusion.explain.conversation import Conversation
    from fusion.explain.explain import explain_all
    from fusion.explain.page import page

    checkpoint, tokenizer = by
    conversations = [Conversation(tuple(record.asked), record.answered or None) for _, _, record in waiting]
    for conversation in conversations:
        refuse_too_long(recipe, tokenizer, conversation)
    explained = explain_all(checkpoint, tokenizer, conversations)
    labels = opinions([record for _, _, record in waiting])
    for (number, wanted, record), found, label in zip(waiting, explained, labels, strict=True):
        shares: Shares = {WHOLE: found.shares.judged, **{group.name: group.shares.judged for group in found.groups}}
        rounded = {name: {e: round(share, 4) for e, share in part.items()} for name, part in shares.items()}
        known = record.shares_source == "engine"
        store.fill(number, label, None if known else rounded, page(found) if wanted == "page" else None)


class Opinions:
    """The label classifier's opinions, where the recipe labels by it: learnt once, from the training rows."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._classify: Classify | None = None
        self._heard = recipe.gate_training.labels in ("classifier", "combined")

    def __call__(self, records: Sequence[RoutingRecord]) -> list[dict[str, Any]]:
        """What each record is labelled with, once the classifier is heard: it decides where no rule has."""
        from serving.records.recorder import question_of

        if not self._heard:
            return [{} for _ in records]
        if self._classify is None:
            from fusion.data import train_rows
            from gate_training.labelling.classifier import recipe_classifier

            settings = self._recipe.gate_training
            learnt = [] if settings.classifier else train_rows(self._recipe, settings.rows, settings.seed)
            self._classify = recipe_classifier(self._recipe, learnt)
        found = self._classify([question_of({"messages": record.asked}) for record in records])
        labels: list[dict[str, Any]] = []
        for record, label in zip(records, found, strict=True):
            evidence = f"classifier: {label.confidence:.0%}"
            said = {"domain": label.domain, "evidence": evidence, "confidence": label.confidence}
            labels.append({"channels": {**record.channels, "classifier": said}})
            if record.channel == BY_DEFAULT:
                labels[-1] |= {"domain": label.domain, "channel": "classifier", "evidence": evidence}
        return labels


def main(path: str) -> None:
    """Observes until it is ended."""
    os.nice(NICE)
    recipe = load_recipe(Path(path), [])
    opinions, said = Opinions(recipe), ""
    with opened(store_url(recipe)) as store:
        while True:
            try:
                done = observe(recipe, store, opinions)
            except (UserError, SQLAlchemyError) as error:  # a checkpoint that is being replaced: the requests wait
                if str(error) != said:
                    print(error, file=sys.stderr, flush=True)
                done, said = 0, str(error)
            if not done:
                time.sleep(IDLE_S)


if __name__ == "__main__":
    run_main(main)
