"""A stream that is checked as it passes: what is wrong ends it with an error event instead of [DONE].

    check = LiveCheck(wanted)
    for chunk in upstream: send(check.feed(chunk))   # until check.over
    send(check.end())

Whole events go out as they came, however their bytes were cut. JSON is read along by ijson, so that broken syntax, a
key that occurs twice or too deep nesting ends the stream where it happens; the schema is judged at the end.
"""

import math
from collections.abc import Generator
from typing import Any

import ijson

from serving.guard.bodies import decoded, encoded
from serving.guard.schema import Violation
from serving.guard.stream import DONE, error_events
from serving.guard.strict_json import MAX_DEPTH
from serving.guard.upstream import MAX_ANSWER_BYTES
from serving.guard.wanted import Wanted

MAX_EVENT_BYTES = 2**20  # of one event of a stream


class LiveCheck:
    """Reads one choice of a streamed completion along. `over` once nothing more is to be fed."""

    def __init__(self, wanted: Wanted) -> None:
        self._wanted = wanted
        self._pending = b""
        self._given = 0
        self._text: list[str] = []
        self._calls: dict[int, dict[str, Any]] = {}
        self._finish: str | None = None
        self.failed: str | None = None  # the engine's own error
        self._parsed = JsonAlong() if wanted.schema is not None and wanted.form == "json" else None
        self._parsed_calls: dict[int, JsonAlong] = {}
        self.violations: list[Violation] = []
        self.over = False

    def feed(self, data: bytes) -> bytes:
        """Takes bytes of the upstream's stream, returns what may be passed on now."""
        self._pending += data
        self._given += len(data)
        passed = b""
        while not self.over:
            lines = self._pending.replace(b"\r\n", b"\n") if b"\r" in self._pending else self._pending
            event, end, rest = lines.partition(b"\n\n")
            if not end:
                if len(lines) > MAX_EVENT_BYTES or self._given > MAX_ANSWER_BYTES:
                    self.violations, self.over = [Violation("", "stream", "the stream has no end in sight")], True
                break
            self._pending = rest
            if self._takes(event):
                passed += event + end
        return passed

    def end(self) -> bytes:
        """The last events: [DONE] where all is as asked, otherwise an error before it."""
        if not self.violations and self.failed is None:
            self._judge()
        if self.failed is not None:
            return error_events(self.failed.encode())
        if not self.violations:
            return DONE
        return error_events(encoded(self._error()))

    def _takes(self, event: bytes) -> bool:
        """Whether an event goes out; one that shows what is wrong does not."""
        data = b"\n".join(line[5:].strip() for line in event.split(b"\n") if line.startswith(b"data:"))
        if not data:
            return True
        if data == b"[DONE]":
            self.over = True
            return False
        try:
            chunk = decoded(data)
            if "error" in chunk:
                self.failed, self.over = data.decode(), True
                return False
            for choice in chunk.get("choices") or []:
                self._choice(choice)
        except BrokenJson as error:
            self.violations, self.over = [error.violation], True
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            self.violations, self.over = [Violation("", "stream", "an event of the stream is no chunk")], True
        return not self.over

    def _choice(self, choice: dict[str, Any]) -> None:
        self._finish = choice.get("finish_reason") or self._finish
        delta = choice.get("delta") or {}
        text = choice.get("text") or delta.get("content") or ""
        self._text.append(text)
        if self._parsed is not None and text:
            self._parsed.feed(text)
        for call in delta.get("tool_calls") or []:
            index = call["index"]
            known = self._calls.setdefault(index, {"function": {"name": "", "arguments": ""}})["function"]
            function = call.get("function") or {}
            known["name"] += function.get("name") or ""
            known["arguments"] += (piece := function.get("arguments") or "")
            if piece:
                self._parsed_calls.setdefault(index, JsonAlong(f"/tool_calls/{index}/function/arguments")).feed(piece)

    def _judge(self) -> None:
        if self._finish is None:
            self.violations = [Violation("", "stream", "the stream ended without a finish_reason")]
            return
        message: dict[str, Any] = {"content": "".join(self._text) or None}
        if self._calls:
            message["tool_calls"] = [self._calls[index] for index in sorted(self._calls)]
        self.violations = self._wanted.violations({"message": message, "finish_reason": self._finish})

    def _error(self) -> dict[str, Any]:
        truncated = self.violations[0].keyword == "output_truncated"
        return {
            "error": {
                "message": f"The streamed output is not as asked: {self.violations[0].message}",
                "type": "invalid_structured_output",
                "param": None,
                "code": "output_truncated" if truncated else "json_guard_live",
                "attempts": [{"attempt": 1, "errors": [found.told(0) for found in self.violations]}],
            }
        }


class BrokenJson(Exception):
    """A text that can no longer become strict JSON."""

    def __init__(self, violation: Violation) -> None:
        super().__init__(violation.message)
        self.violation = violation


class JsonAlong:
    """Reads a JSON text along as it grows, cut anywhere. `feed` raises BrokenJson at once where it breaks."""

    def __init__(self, path: str = "") -> None:
        self._path = path
        self._keys: list[set[str]] = []
        events = self._events()
        next(events)
        self._parser = ijson.basic_parse_coro(events)

    def feed(self, text: str) -> None:
        """Takes the next characters."""
        try:
            self._parser.send(text.encode())
        except UnicodeEncodeError:
            self._break("lone_surrogate", "a string holds a lone surrogate")
        except (ijson.JSONError, StopIteration) as error:  # incomplete JSON is said at the end alone
            self._break("syntax", str(error).split("\n")[0] or "text after the JSON value")

    def _events(self) -> Generator[None, tuple[str, Any], None]:
        while True:
            name, value = yield
            if name in ("start_map", "start_array"):
                self._keys.append(set())
                if len(self._keys) > MAX_DEPTH:
                    self._break("too_deep", f"more than {MAX_DEPTH} levels of nesting")
            elif name in ("end_map", "end_array"):
                self._keys.pop()
            elif name == "map_key":
                if value in self._keys[-1]:
                    self._break("duplicate_key", "a key occurs twice in one object")
                self._keys[-1].add(value)
            elif name in ("number", "double") and not isinstance(value, int) and math.isinf(float(value)):
                self._break("number_overflow", "a number is too large for a double")

    def _break(self, keyword: str, message: str) -> None:
        raise BrokenJson(Violation(self._path, keyword, message))
