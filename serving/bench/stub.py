"""An upstream without faults that answers every completion at once: what a guard's own cost is measured against.

    taskset -c 0 python -m serving.bench.stub --port 9000

A request that asks for structure gets a document of 1 KB that satisfies SCHEMA, any other one a sentence. It is a bare
protocol on uvloop, several times as fast as what stands in front of it.
"""

import argparse
import asyncio
import json
import sys
from typing import Any, cast

import uvloop

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "order": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{6}$"},
        "customer": {
            "type": "object",
            "properties": {"name": {"type": "string", "maxLength": 80}, "city": {"type": "string"}},
            "required": ["name", "city"],
            "additionalProperties": False,
        },
        "lines": {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "properties": {
                    "item": {"type": "string"},
                    "amount": {"type": "integer", "minimum": 1},
                    "price": {"type": "number", "exclusiveMinimum": 0},
                    "currency": {"enum": ["CNY", "EUR", "USD"]},
                },
                "required": ["item", "amount", "price", "currency"],
                "additionalProperties": False,
            },
        },
        "note": {"type": ["string", "null"]},
    },
    "required": ["order", "customer", "lines", "note"],
    "additionalProperties": False,
}
LINES = [{"item": f"article {place}", "amount": place, "price": 9.5, "currency": "CNY"} for place in range(1, 15)]
DOCUMENT = {"order": "AB-123456", "customer": {"name": "张三", "city": "上海"}, "lines": LINES, "note": None}
SENTENCE = "Seventeen and twenty-five are forty-two."


def reply(text: str) -> bytes:
    """A whole HTTP answer with one chat completion in it."""
    message = {"role": "assistant", "content": text}
    body: dict[str, Any] = {"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": "m"}
    body["choices"] = [{"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}]
    body["usage"] = {"prompt_tokens": 20, "completion_tokens": 400, "total_tokens": 420}
    content = json.dumps(body).encode()
    head = f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n"
    return head.encode() + content


class _Stub(asyncio.Protocol):
    plain, structured = reply(SENTENCE), reply(json.dumps(DOCUMENT, ensure_ascii=False))

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._given = b""

    def data_received(self, data: bytes) -> None:
        self._given += data
        head, end, rest = self._given.partition(b"\r\n\r\n")
        lowered = head.lower()
        if not end or len(rest) < int(lowered.partition(b"content-length:")[2].partition(b"\r\n")[0] or 0):
            return
        self._transport.write(self.structured if b'"response_format"' in rest else self.plain)
        self._given = b""


async def _serve(host: str, port: int) -> None:
    server = await asyncio.get_running_loop().create_server(_Stub, host, port)
    sys.stdout.write(f"{server.sockets[0].getsockname()[1]}\n")
    sys.stdout.flush()
    await server.serve_forever()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one and prints it")
    given = parser.parse_args()
    uvloop.run(_serve(given.host, given.port))
