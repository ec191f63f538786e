"""Asks a moderation model behind an OpenAI-compatible address whether texts may pass.

serving.guard.policy.moderation: {url: "http://127.0.0.1:9002", model: omni-moderation-latest, fail: closed}
"""

import os
from collections.abc import Sequence

import aiohttp

from fusion.sections.serving import Moderation
from serving.guard.bodies import decoded, encoded
from serving.guard.policy import Forbidden


class Unmoderated(Exception):
    """The moderation model does not answer, and without its word nothing may pass."""


async def moderate(session: aiohttp.ClientSession, settings: Moderation, texts: Sequence[str], side: str) -> None:
    """Raises Forbidden where the model flags one of `texts`, Unmoderated where it has no word and fails closed."""
    if settings.side not in (side, "both") or not any(texts):
        return
    key = os.environ.get(settings.api_key_variable, "") if settings.api_key_variable else ""
    headers = {"content-type": "application/json", **({"authorization": f"Bearer {key}"} if key else {})}
    body = {"model": settings.model, "input": [text for text in texts if text]}
    try:
        timeout = aiohttp.ClientTimeout(total=settings.timeout_s)
        url = f"{settings.url.rstrip('/')}/v1/moderations"
        async with session.post(url, data=encoded(body), headers=headers, timeout=timeout) as answer:
            results = decoded(await answer.read())["results"] if answer.status == 200 else []
        flagged = [result.get("categories") for result in results if result["flagged"]]
    except (aiohttp.ClientError, OSError, TimeoutError, ValueError, KeyError, TypeError, AttributeError):
        results = []
    if not results:
        if settings.fail == "closed":
            raise Unmoderated
        return
    if flagged:
        said = [categories for categories in flagged if isinstance(categories, dict)]
        named = sorted({str(name) for categories in said for name, hit in categories.items() if hit})
        raise Forbidden(", ".join(named) or "what the moderation model flags", side)
