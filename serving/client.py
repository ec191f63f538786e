"""One chat request to an OpenAI-compatible server, with the standard library alone.

python -c "from serving.client import chat; print(chat('http://127.0.0.1:8000', 'demo', [...]).text)"
"""

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fusion.errors import UserError


@dataclass(frozen=True)
class Answer:
    """A chat answer: text, why it ended, attempts of the guard, tokens used, seconds it took, the whole object."""

    text: str
    finish_reason: str
    attempts: int
    usage: dict[str, Any]
    seconds: float
    raw: dict[str, Any]


def chat(
    url: str,
    model: str,
    messages: Sequence[dict[str, Any]],
    *,
    timeout_s: float = 900.0,
    api_key: str | None = None,
    **options: Any,
) -> Answer:
    """Asks the server at `url` (without /v1); `options` are request fields, such as response_format.

    Raises UserError when the server cannot be reached or refuses the request.
    """
    body = {"model": model, "messages": list(messages), **options}
    headers = {"content-type": "application/json", **({"authorization": f"Bearer {api_key}"} if api_key else {})}
    request = urllib.request.Request(f"{url.rstrip('/')}/v1/chat/completions", json.dumps(body).encode(), headers)
    begin = time.monotonic()
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as response:
            answer = json.load(response)
            attempts = int(response.headers.get("x-qwen-fusion-attempts", 1))
    except urllib.error.HTTPError as error:
        raise UserError(f"the server at {url} answered {error.code}: {reason(error)}") from None
    except (OSError, ValueError, http.client.HTTPException) as error:
        cause = getattr(error, "reason", None) or error
        raise UserError(f"no answer from {url} ({cause}): start the server with `qwen-fusion serve`") from None
    choice = answer["choices"][0]
    return Answer(
        text=choice["message"].get("content") or "",
        finish_reason=choice.get("finish_reason") or "",
        attempts=attempts,
        usage=answer.get("usage") or {},
        seconds=time.monotonic() - begin,
        raw=answer,
    )


def served_models(url: str, api_key: str | None = None, timeout_s: float = 30.0) -> list[dict[str, Any]]:
    """The models that the server at `url` (without /v1) lists, as it describes them.

    Raises UserError when the server cannot be reached or refuses to tell.
    """
    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    request = urllib.request.Request(f"{url.rstrip('/')}/v1/models", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as response:
            return [model for model in json.load(response)["data"] if isinstance(model, dict)]
    except urllib.error.HTTPError as error:
        raise UserError(f"the server at {url} answered {error.code}: {reason(error)}") from None
    except (OSError, ValueError, KeyError, TypeError, http.client.HTTPException) as error:
        cause = getattr(error, "reason", None) or error
        raise UserError(f"no OpenAI server answers at {url} ({cause}): start one with `qwen-fusion serve`") from None


def reason(error: urllib.error.HTTPError) -> str:
    """Why an OpenAI-compatible server refused, in one line of its own words."""
    text = error.read().decode(errors="replace")
    try:
        return str(json.loads(text)["error"]["message"]).split("\n")[0]
    except (ValueError, KeyError, TypeError):
        return text.split("\n")[0][:200] or error.reason
