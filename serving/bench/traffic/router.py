"""A router in front of whole experts: reads each request's question, sends it to that expert's engine or adapter.

    python -m serving.bench.traffic.router RECIPE PORT '{"math": ["http://127.0.0.1:9001", "math"], ...}' [PICKED.json]

PICKED.json says for each question which expert rules, or else the recipe's classifier, pick (gate_training/labelling/),
so that looking at a question costs these sides nothing; of others the rules decide. The targets are addresses and model
names by expert; streams pass through as they come.
"""

import asyncio
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aiohttp import ClientSession, ClientTimeout, TCPConnector, web

from fusion.checkpoint import read_json
from fusion.errors import run_main
from fusion.recipe import Recipe
from fusion.recipe_file import load_recipe
from gate_training.labelling.rules import label_by_rules

Targets = dict[str, tuple[str, str]]  # expert -> address, model


def question_of(body: dict[str, Any]) -> str:
    """The last user message, or the prompt of a completion."""
    messages = body.get("messages") or [{"role": "user", "content": str(body.get("prompt", ""))}]
    content = next((m["content"] for m in reversed(messages) if m["role"] == "user"), "")
    if isinstance(content, list):  # parts, as vLLM's load generator sends them
        content = "\n".join(part.get("text", "") for part in content)
    return str(content)


def expert_of(recipe: Recipe, question: str, picked: Mapping[str, str]) -> str:
    """The name of the expert that was `picked` for a question, or whose domain the rules say it is of."""
    if question in picked:
        return picked[question]
    return recipe.experts[recipe.expert_of(label_by_rules(question, recipe.domains).domain)].name


def build_app(recipe: Recipe, targets: Targets, picked: Mapping[str, str]) -> web.Application:
    """The router's application."""
    app = web.Application(client_max_size=2**26)

    async def session(_: web.Application) -> Any:
        timeout = ClientTimeout(total=None)
        async with ClientSession(timeout=timeout, connector=TCPConnector(limit=0)) as client:
            app["client"] = client
            yield

    async def health(_: web.Request) -> web.Response:
        return web.Response()

    async def passed_on(request: web.Request) -> web.StreamResponse:
        body = await request.json()
        url, model = targets[expert_of(recipe, question_of(body), picked)]
        async with app["client"].post(f"{url}{request.path}", json={**body, "model": model}) as upstream:
            answer = web.StreamResponse(status=upstream.status, headers={"content-type": upstream.content_type})
            await answer.prepare(request)
            async for chunk in upstream.content.iter_any():
                await answer.write(chunk)
            await answer.write_eof()
            return answer

    app.cleanup_ctx.append(session)
    app.router.add_get("/health", health)
    app.router.add_post("/v1/chat/completions", passed_on)
    app.router.add_post("/v1/completions", passed_on)
    return app


async def _serve(app: web.Application, port: int) -> None:
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    await asyncio.Event().wait()


def main(path: str, port: str, targets: str, picked: str | None = None) -> None:
    """Serves until it is told to end."""
    recipe = load_recipe(Path(path))
    found = {name: (url, model) for name, (url, model) in json.loads(targets).items()}
    asyncio.run(_serve(build_app(recipe, found, read_json(Path(picked)) if picked else {}), int(port)))


if __name__ == "__main__":
    run_main(main)
