"""An upstream at the level of bytes, whose every answer is planned: how it is cut, framed, delayed and broken off."""

import asyncio
import threading
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Self

Framing = Literal["length", "short", "long", "chunked", "open"]


@dataclass(frozen=True)
class Fault:
    """One answer: its status and body, and what happens to its bytes.

    `framing`: by the right content-length, one that is too short or too long, by chunks, or by the connection's end.
    `cut` sends pieces of so many bytes (0: all at once); `drop_after` closes the connection after so many (-1: never);
    `wait_s` passes before the first.
    """

    body: bytes
    status: int = 200
    kind: str = "application/json"
    framing: Framing = "length"
    cut: int = 0
    drop_after: int = -1
    wait_s: float = 0.0

    def written(self) -> bytes:
        """All bytes of the answer."""
        head = f"HTTP/1.1 {self.status} Planned\r\ncontent-type: {self.kind}\r\n"
        length = {"length": len(self.body), "short": len(self.body) // 2, "long": len(self.body) + 10}.get(self.framing)
        if length is not None:
            return f"{head}content-length: {length}\r\n\r\n".encode() + self.body
        if self.framing == "open":
            return f"{head}connection: close\r\n\r\n".encode() + self.body
        chunk = f"{len(self.body):x}\r\n".encode() + self.body + b"\r\n" if self.body else b""
        return f"{head}transfer-encoding: chunked\r\n\r\n".encode() + chunk + b"0\r\n\r\n"


class FaultyUpstream:
    """Runs in a thread; answers every request by the next of `plan`, the last one again and again."""

    def __init__(self) -> None:
        self.plan: list[Fault] = []
        self.asked = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self._server = asyncio.run_coroutine_threadsafe(
            asyncio.start_server(self._serve, "127.0.0.1", 0), self._loop
        ).result(10)
        self.url = "http://{}:{}".format(*self._server.sockets[0].getsockname())
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    async def _end(self) -> None:
        self._server.close()
        serving = asyncio.all_tasks() - {asyncio.current_task()}
        for task in serving:
            task.cancel()
        if serving:
            await asyncio.wait(serving, timeout=1)

    def planned(self, *faults: Fault) -> None:
        """Begins a new plan."""
        self.plan, self.asked = list(faults), 0

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0] or 0)
                await reader.readexactly(length)
                fault = self.plan[min(self.asked, len(self.plan) - 1)]
                self.asked += 1
                await asyncio.sleep(fault.wait_s)
                written = fault.written()
                kept = written if fault.drop_after < 0 else written[: fault.drop_after]
                step = fault.cut or max(1, len(kept))
                for start in range(0, len(kept), step):
                    writer.write(kept[start : start + step])
                    await writer.drain()
                    if fault.cut:
                        await asyncio.sleep(0)
                if fault.drop_after >= 0 or fault.framing in ("short", "long", "open"):
                    return
        except (asyncio.IncompleteReadError, asyncio.CancelledError, ConnectionError):
            return  # a stream's callback does not expect a cancelled task
        finally:
            writer.close()
