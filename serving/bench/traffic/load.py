"""vLLM's own load generator, as a child: open-loop arrivals at a rate, or so many requests at a time.

loads = [Load(requests, rate=2.0), Load(requests, at_once=8)]
slow, busy = drive("http://127.0.0.1:8000", "fused", tokenizer, loads, folder)
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusion.errors import UserError, last_words

PROGRAM = (
    "import json, sys\n"
    "from vllm.benchmarks.serve import add_cli_args, main\n"
    "from vllm.utils.argparse_utils import FlexibleArgumentParser\n"
    "parser = FlexibleArgumentParser()\n"
    "add_cli_args(parser)\n"
    "for arguments in json.load(sys.stdin):\n"  # its imports take longer than many a load
    "    main(parser.parse_args(arguments))\n"
)
REQUEST_SECONDS = 300  # one request alone takes less; an engine that takes more hangs
KEPT = (
    *("mean_ttft_ms", "p95_ttft_ms", "median_tpot_ms", "mean_e2el_ms", "p95_e2el_ms"),
    *("request_throughput", "output_throughput", "completed", "duration"),
)


@dataclass(frozen=True)
class Load:
    """A file's requests, Poisson arrivals at `rate` a second, or `at_once` under way."""

    requests: Path
    rate: float | None = None
    at_once: int | None = None

    @property
    def count(self) -> int:
        """How many requests they are."""
        return sum(1 for line in self.requests.read_text(encoding="utf-8").split("\n") if line)

    @property
    def limit_s(self) -> float:
        """The seconds after which the engine must hang."""
        return REQUEST_SECONDS * self.count + (self.count / self.rate if self.rate else 0)


def drive(url: str, model: str, tokenizer: Path, loads: Sequence[Load], folder: Path) -> list[dict[str, float]]:
    """Sends all requests of each load, one load after the other; their figures, latencies in ms.

    Raises UserError where the generator fails or an answer does.
    """
    results = [folder / f"load-{number}.json" for number in range(len(loads))]
    given = [_arguments(url, model, tokenizer, load, result) for load, result in zip(loads, results, strict=True)]
    limit = sum(load.limit_s for load in loads)
    try:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", PROGRAM],
            input=json.dumps(given),
            capture_output=True,
            text=True,
            check=False,
            timeout=limit,
        )
    except subprocess.TimeoutExpired as error:
        raise UserError(f"the requests to {url} took over {limit:.0f} s: see vLLM's log in {folder}") from error
    if done.returncode or not all(result.is_file() for result in results):
        raise UserError(f"vLLM's load generator failed: {last_words(done)}")
    return [_figures(url, load, result) for load, result in zip(loads, results, strict=True)]


def _arguments(url: str, model: str, tokenizer: Path, load: Load, result: Path) -> list[str]:
    arguments = [
        *("--backend", "openai-chat", "--base-url", url, "--endpoint", "/v1/chat/completions"),
        *("--model", model, "--tokenizer", str(tokenizer)),
        *("--dataset-name", "custom", "--dataset-path", str(load.requests), "--disable-shuffle"),
        *("--custom-output-len", "-1"),
        *(
            "--skip-chat-template",
            "--ignore-eos",
            "--temperature",
            "0",
            "--num-prompts",
            str(load.count),
            "--seed",
            "0",
        ),
        *("--request-rate", "inf" if load.rate is None else str(load.rate)),
        *("--percentile-metrics", "ttft,tpot,e2el", "--metric-percentiles", "95"),
        *("--save-result", "--result-dir", str(result.parent), "--result-filename", result.name, "--disable-tqdm"),
    ]
    return arguments if load.at_once is None else [*arguments, "--max-concurrency", str(load.at_once)]


def _figures(url: str, load: Load, result: Path) -> dict[str, float]:
    told: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    result.unlink()
    if told["completed"] != load.count:
        failed = load.count - told["completed"]
        raise UserError(f"{failed} of {load.count} requests to {url} failed: see vLLM's log in {result.parent}")
    return {key: float(told[key]) for key in KEPT}
