"""vLLM's own load generator, as a child: open-loop arrivals at a rate, or so many requests at a time.

figures = drive("http://127.0.0.1:8000", "fused", tokenizer, requests, folder, rate=2.0)
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from fusion.errors import UserError, last_words

PROGRAM = (
    "from vllm.benchmarks.serve import add_cli_args, main\n"
    "from vllm.utils.argparse_utils import FlexibleArgumentParser\n"
    "parser = FlexibleArgumentParser()\n"
    "add_cli_args(parser)\n"
    "main(parser.parse_args())\n"
)
REQUEST_SECONDS = 300  # one request alone takes less; an engine that takes more hangs
KEPT = (
    *("mean_ttft_ms", "p95_ttft_ms", "mean_tpot_ms", "mean_e2el_ms", "p95_e2el_ms"),
    *("request_throughput", "output_throughput", "completed", "duration"),
)


def drive(
    url: str,
    model: str,
    tokenizer: Path,
    requests: Path,
    folder: Path,
    rate: float | None = None,
    at_once: int | None = None,
) -> dict[str, float]:
    """Sends all requests of a file, Poisson arrivals at `rate` a second or `at_once` under way; latencies in ms.

    Raises UserError where the generator fails or an answer does.
    """
    count = sum(1 for line in requests.read_text(encoding="utf-8").split("\n") if line)
    arguments = [
        *("--backend", "openai-chat", "--base-url", url, "--endpoint", "/v1/chat/completions"),
        *("--model", model, "--tokenizer", str(tokenizer)),
        *(
            "--dataset-name",
            "custom",
            "--dataset-path",
            str(requests),
            "--disable-shuffle",
            "--custom-output-len",
            "-1",
        ),
        *("--skip-chat-template", "--ignore-eos", "--temperature", "0", "--num-prompts", str(count), "--seed", "0"),
        *("--request-rate", "inf" if rate is None else str(rate)),
        *("--percentile-metrics", "ttft,tpot,e2el", "--metric-percentiles", "95"),
        *("--save-result", "--result-dir", str(folder), "--result-filename", "load.json", "--disable-tqdm"),
    ]
    if at_once is not None:
        arguments += ["--max-concurrency", str(at_once)]
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM, *arguments]
    limit = REQUEST_SECONDS * count + (0 if rate is None else count / rate)
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=limit)
    except subprocess.TimeoutExpired as error:
        raise UserError(f"{count} requests to {url} took over {limit:.0f} s: see vLLM's log in {folder}") from error
    result = folder / "load.json"
    if done.returncode or not result.is_file():
        raise UserError(f"vLLM's load generator failed: {last_words(done)}")
    told: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    result.unlink()
    if told["completed"] != count:
        raise UserError(f"{count - told['completed']} of {count} requests to {url} failed: see vLLM's log in {folder}")
    return {key: float(told[key]) for key in KEPT}
