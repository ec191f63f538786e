"""What the guard costs and what it gives, as ratios measured in one run.

    make bench-guard                                 # python -m serving.bench configs/qwen2.5-0.5b-two-experts.yaml
    make bench-guard BENCH="--bfcl FOLDER"           # function calls of BFCL, from a folder of its files
    python -m serving.bench RECIPE --part overhead   # without a model; --part validity without the stub

Cost (serving/bench/overhead.py): the guard on one core in front of a stub that answers at once, beside LiteLLM's
proxy. Gain (serving/bench/validity.py): a real model on a real vLLM, with the guard, with the engine's constraint
alone, with a retry loop, with nothing. The last line is one JSON object; a part that did not run is null in it.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from fusion.errors import UserError, run_main
from fusion.recipe_file import load_recipe
from serving.bench import overhead, validity

KEYS = (
    *("added_p50_ms", "requests_per_s_per_core", "vs_litellm"),
    *("valid_or_explicit", "valid_after_ladder", "first_attempt_valid", "engine_alone_valid", "retry_loop_valid"),
)


def main(*arguments: str) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("recipe", type=Path, help="whose fused model answers, or its anchor where nothing is fused yet")
    parser.add_argument("--part", choices=("overhead", "validity"), help="one of the two alone")
    parser.add_argument("--seconds", type=float, default=8.0, help="of each load")
    parser.add_argument("--soak-requests", type=int, default=200_000, help="over which memory is to stay flat")
    parser.add_argument("--bfcl", type=Path, help="folder with BFCL_v4_live_*.json and possible_answer/")
    parser.add_argument("--requests", type=int, default=300, help="from that folder, or generated ones without it")
    given = parser.parse_args(arguments)
    found: dict[str, Any] = dict.fromkeys(KEYS)
    recipe = load_recipe(given.recipe)
    if given.requests < 1 or not 0 < given.seconds < float("inf") or given.soak_requests < 1:
        raise UserError("--requests, --seconds and --soak-requests are greater than 0")
    if given.part != "validity":
        found |= overhead.run(given.seconds, given.soak_requests)
    if given.part != "overhead":
        found |= validity.run(recipe, given.bfcl, given.requests)
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    run_main(main)
