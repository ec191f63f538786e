"""Plays vLLM's API server for the process tests: a worker of its own, /health and fixed chat answers.

What it does is chosen by the environment: FAKE_ENGINE=crash fails on start like vLLM, FAKE_ENGINE=stubborn ignores
SIGTERM.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

MODULE = "vllm/entrypoints/openai/api_server.py"


def install(folder: Path) -> Path:
    """Puts this file where `python -m vllm.entrypoints.openai.api_server` finds it when `folder` is on PYTHONPATH."""
    target = folder / MODULE
    target.parent.mkdir(parents=True)
    for package in (target.parent, target.parent.parent, folder / "vllm"):
        (package / "__init__.py").touch()
    target.write_text(Path(__file__).read_text())
    return folder


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self._answer({"status": "ok"})

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        text = '{"name": "Mia", "ok": true}' if "response_format" in asked else "42"
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        if not asked.get("stream"):
            self._answer({"choices": [choice], "usage": {"total_tokens": 1}})
            return
        ends = ({"delta": {"content": text}, "finish_reason": None}, {"delta": {}, "finish_reason": "stop"})
        events = [json.dumps({"choices": [{"index": 0, **end}]}) for end in ends]
        self._send("".join(f"data: {event}\n\n" for event in (*events, "[DONE]")).encode(), "text/event-stream")

    def _answer(self, value: object) -> None:
        self._send(json.dumps(value).encode(), "application/json")

    def _send(self, body: bytes, kind: str) -> None:
        self.send_response(200)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def main() -> None:
    """Serves until it is terminated."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    port = parser.parse_known_args()[0].port
    sleep = [sys.executable, "-c", "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(300)"]
    worker = subprocess.Popen(sleep)
    Path(os.environ["FAKE_ENGINE_PIDS"]).write_text(f"{os.getpid()} {worker.pid}")
    behaviour = os.environ.get("FAKE_ENGINE")
    if behaviour == "crash":
        print("(Worker) ERROR ValueError: the KV cache does not fit\nRuntimeError: it failed. See root cause above.")
        sys.exit(1)
    if behaviour == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()


if __name__ == "__main__":
    main()
