"""Takes in what requests leave behind and writes it down aside: a bounded queue, a thread, batches.

    with Recorder(recording) as recorder:
        recorder.put(Ended("id", "/v1/chat/completions", 200, 12.5, admitted=request, body=answer))

`put` never waits and never fails: what finds the queue full, or a database that does not work, is counted as dropped.
"""

import logging
import queue
import random
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

from gate_training.labelling.rules import NO_RULE, label_by_rules
from serving.records.answer import told
from serving.records.record import BY_DEFAULT, RoutingRecord, Shares, storable
from serving.records.settings import Recording
from serving.records.shares import shares_of
from serving.records.store import Store, opened

LOGGER = logging.getLogger(__name__)
AT_ONCE = 256  # records of a transaction
PRUNE_S = 60.0
COMPLAIN_S = 60.0  # between two lines of the log about a database that does not work
LABELLED = 2000  # characters of a question that rules are tried on
STOP_S = 10.0  # for what is in the queue when the guard ends


@dataclass(frozen=True)
class Ended:
    """A completion request that has ended. `admitted` is the request as the policy let it in (None: it did not) and
    `body` what the client was sent; `routes` are vLLM's `routed_experts` and the number of prompt tokens in them."""

    request_id: str
    path: str
    status: int
    ms: float
    asker: str = ""
    streamed: bool = False
    attempts: int = 0
    violations: tuple[str, ...] = ()
    admitted: Mapping[str, Any] | None = None
    body: bytes = b""
    routes: tuple[str, int] | None = None
    at: float = field(default_factory=time.time)


class Recorder:
    """The writing thread of one guard process; `dropped` is called with the number of records that were lost."""

    def __init__(self, recording: Recording, dropped: Callable[[int], None] = lambda count: None) -> None:
        self.recording = recording
        self._dropped = dropped
        self._queue: queue.Queue[Ended | None] = queue.Queue(recording.settings.queue)
        self._thread = threading.Thread(target=self._work, name="records", daemon=True)
        self._stack = ExitStack()
        self._store: Store | None = None
        self._complained = 0.0

    def __enter__(self) -> Self:
        self._store = self._stack.enter_context(opened(self.recording.url))
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            self._queue.put(None, timeout=STOP_S)
        except queue.Full:
            LOGGER.warning("records: %d were still to be written", self._queue.qsize())
        self._thread.join(STOP_S)
        self._stack.close()

    @property
    def store(self) -> Store:
        """The open store. Raises RuntimeError before it is."""
        if self._store is None:
            raise RuntimeError("the recorder has not been entered")
        return self._store

    def put(self, ended: Ended) -> None:
        """Hands a request over, at once."""
        try:
            self._queue.put_nowait(ended)
        except queue.Full:
            self._dropped(1)

    def _work(self) -> None:
        pruned, settings = 0.0, self.recording.settings
        while True:
            batch = self._next()
            if batch is None:
                return
            self._write(batch)
            if time.monotonic() - pruned > PRUNE_S:
                pruned = time.monotonic()
                self._tried(lambda: self.store.prune(settings.keep_days, settings.keep_rows))

    def _next(self) -> list[Ended] | None:
        """What is in the queue, as soon as anything is, nothing after PRUNE_S of quiet; None at the end."""
        batch: list[Ended] = []
        try:
            found = self._queue.get(timeout=PRUNE_S)
        except queue.Empty:
            return batch
        while found is not None:
            batch.append(found)
            if len(batch) == AT_ONCE:
                return batch
            try:
                found = self._queue.get_nowait()
            except queue.Empty:
                return batch
        if batch:
            self._queue.put(None)  # the end comes after what was before it
            return batch
        return None

    def _write(self, batch: list[Ended]) -> None:
        records = [record for ended in batch if (record := self._record(ended)) is not None]
        wanted = [self._wanted(record) for record in records]
        if self._tried(lambda: self.store.add(records, wanted)):
            return
        for record, what in zip(records, wanted, strict=True):  # what one of them spoils is not the others' loss
            if not self._tried(lambda record=record, what=what: self.store.add([record], [what])):  # type: ignore[misc]
                self._dropped(1)

    def _wanted(self, record: RoutingRecord) -> str | None:
        """What the background pass is to find out about an answered request: shares, or the classifier's opinion."""
        unknown = not record.shares or self.recording.classifier
        sampled = random.random() < self.recording.settings.explain_share
        return "shares" if record.asked and record.status == 200 and unknown and sampled else None

    def _record(self, ended: Ended) -> RoutingRecord | None:
        try:
            return record_of(ended, self.recording)
        except Exception:  # a request of a form that nobody thought of must not end the thread
            LOGGER.exception("request %s cannot be recorded", ended.request_id)
            self._dropped(1)
            return None

    def _tried(self, action: Callable[[], Any]) -> bool:
        try:
            action()
        except Exception as error:  # whatever a driver raises: the thread goes on
            if time.monotonic() - self._complained > COMPLAIN_S:
                self._complained = time.monotonic()
                LOGGER.warning("records are lost, the database does not work: %s", str(error).split("\n")[0])
            return False
        return True


def record_of(ended: Ended, recording: Recording) -> RoutingRecord:
    """What is kept of a request: labelled by the rules, its text only where the recipe keeps it."""
    said = told(ended.body, ended.streamed)
    prompts = recording.settings.prompts and ended.admitted is not None
    return RoutingRecord(
        request_id=ended.request_id,
        path=ended.path,
        status=ended.status,
        ms=round(ended.ms, 2),
        time=ended.at,
        asker=ended.asker or None,
        streamed=ended.streamed,
        attempts=ended.attempts,
        violations=list(ended.violations),
        prompt_tokens=said.prompt_tokens,
        completion_tokens=said.completion_tokens,
        shares=(shares := engine_shares(ended.routes, recording)),
        shares_source="engine" if shares else None,
        asked=asked_of(ended.admitted) if prompts and ended.admitted is not None else None,
        answered=storable(said.text) if prompts and ended.status == 200 else None,
        **labelled(ended.admitted, recording),
    )


def labelled(request: Mapping[str, Any] | None, recording: Recording) -> dict[str, Any]:
    """The domain that the rules give a request's question, with the channel and its evidence; nothing without rules.

    Where no rule matches, the general domain is no channel's opinion. The evidence quotes the question only where its
    text is kept.
    """
    question = storable(_ends(question_of(request))) if request else ""
    if not recording.domains or not question:
        return {}
    label = label_by_rules(question, recording.domains)
    if label.evidence == NO_RULE:
        return {"domain": label.domain, "channel": BY_DEFAULT, "evidence": NO_RULE}
    evidence = label.evidence if recording.settings.prompts else label.evidence.partition(":")[0]  # it quotes the text
    said = {"domain": label.domain, "evidence": evidence, "confidence": 1.0}
    return {"domain": label.domain, "channel": "rules", "evidence": evidence, "channels": {"rules": said}}


def _ends(question: str) -> str:
    """What the rules look at of a question: their patterns may take long on what a client makes up."""
    half = LABELLED // 2
    return question if len(question) <= LABELLED else f"{question[:half]}\n{question[-half:]}"


def engine_shares(routes: tuple[str, int] | None, recording: Recording) -> Shares:
    """The experts' shares by the engine's own account, {} where it gave none that can be read."""
    if not routes:
        return {}
    try:
        return shares_of(routes[0], recording.experts, recording.sparse_layers, routes[1])
    except ValueError as error:
        LOGGER.warning("the engine's account of its experts cannot be read: %s", error)
        return {}


def question_of(request: Mapping[str, Any]) -> str:
    """The last user message of a request, or its prompt: what rules and classifiers look at."""
    if isinstance(messages := request.get("messages"), list):
        users = [message for message in messages if isinstance(message, dict) and message.get("role") == "user"]
        return _text(users[-1].get("content")) if users else ""
    return _text(request.get("prompt"))


def asked_of(request: Mapping[str, Any]) -> list[dict[str, str]]:
    """A request's messages, text alone; a prompt as one message of the user's."""
    if isinstance(messages := request.get("messages"), list):
        found = [message for message in messages if isinstance(message, dict)]
        said = [(str(message.get("role")), _text(message.get("content"))) for message in found]
    else:
        said = [("user", _text(request.get("prompt")))]
    return [{"role": storable(role), "content": storable(text)} for role, text in said]


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    parts: Iterable[Any] = content if isinstance(content, list) else ()
    texts = (part.get("text") if isinstance(part, dict) else part for part in parts)
    return "".join(text for text in texts if isinstance(text, str))
