"""A finished completion as the server-sent events of a streamed one.

as_events({"choices": [{"index": 0, "message": {"content": "{}"}, "finish_reason": "stop"}]})
"""

import time
from typing import Any

from serving.guard.bodies import decoded, encoded
from serving.guard.wanted import FIELD

DONE = b"data: [DONE]\n\n"


def as_events(answer: dict[str, Any], include_usage: bool = False) -> bytes:
    """The events of a chat completion or a completion, and [DONE]; usage where asked for, the guard's report in
    the last one."""
    head: dict[str, Any] = {"id": "chatcmpl-guard", "created": int(time.time()), "model": ""}
    head |= {key: answer[key] for key in ("id", "created", "model", "system_fingerprint") if key in answer}
    chunks: list[dict[str, Any]] = []
    for choice in answer["choices"]:
        head["object"] = "text_completion" if "text" in choice else "chat.completion.chunk"
        chunks += [{**head, "choices": [part]} for part in (_texts(choice) if "text" in choice else _deltas(choice))]
    if include_usage:
        chunks.append({**head, "choices": [], "usage": answer.get("usage")})
    if chunks and FIELD in answer:
        chunks[-1][FIELD] = answer[FIELD]
    return b"".join([*map(event, chunks), DONE])


def error_events(body: bytes) -> bytes:
    """An error in OpenAI's form as the last events of a stream that has begun."""
    try:
        error = decoded(body)
    except ValueError:
        error = {"error": {"message": "the engine answered with an error", "type": "upstream_error"}}
    return event(error) + DONE


def event(value: Any) -> bytes:
    """One server-sent event with a JSON value."""
    return b"data: " + encoded(value) + b"\n\n"


def _texts(choice: dict[str, Any]) -> list[dict[str, Any]]:
    keys = {"index": choice["index"], "logprobs": choice.get("logprobs")}
    return [{**keys, "text": choice["text"], "finish_reason": choice.get("finish_reason")}]


def _deltas(choice: dict[str, Any]) -> list[dict[str, Any]]:
    message = choice.get("message") or {}
    said = {key: message[key] for key in ("content", "reasoning_content", "reasoning", "refusal") if message.get(key)}
    if message.get("tool_calls"):
        said["tool_calls"] = [{"index": place, **call} for place, call in enumerate(message["tool_calls"])]
    deltas: tuple[dict[str, Any], ...] = ({"role": message.get("role", "assistant"), "content": ""}, said, {})
    ends, logprobs = (None, None, choice.get("finish_reason")), (None, choice.get("logprobs"), None)
    return [
        {"index": choice["index"], "delta": delta, "logprobs": probabilities, "finish_reason": end}
        for delta, probabilities, end in zip(deltas, logprobs, ends, strict=True)
    ]
