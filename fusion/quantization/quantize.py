"""Quantise: a fused model's linear weights in 8 or 4 bits, written by llm-compressor and compared with the original.

    qwen-fusion quantize runs/demo/fused --scheme fp8      # weights by channel, activations by token when it is served
    qwen-fusion quantize runs/demo/fused --scheme w4a16    # GPTQ, calibrated on the recipe's routing examples

Gates, norms, embeddings and head keep the checkpoint's own dtype. llm-compressor runs in an environment of its own
(fusion/quantization/environment.py), with as much of the model in memory as there is room for. What was lost, by domain
and of the experts' gain, is in `quantization.json` beside the weights.
"""

import shutil
import time
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from fusion.architecture import MANIFEST
from fusion.checkpoint import Checkpoint, read_json, staged_folder, write_json, write_text
from fusion.errors import UserError
from fusion.merge import gates_are_trained
from fusion.progress import console, quiet_libraries
from fusion.quantization.environment import environment_python, pinned
from fusion.quantization.job import run_job
from fusion.quantization.layout import complete_view, copy_papers, regroup, weight_bytes, write_manifest
from fusion.quantization.loss import lost, markdown
from fusion.quantization.needs import check_room, computed_in, group_size_of, needed
from fusion.quantization.rows import calibration_rows, comparison_rows, tokens_seen
from fusion.recipe import Recipe
from fusion.recipe_file import load_recipe

SCHEMES = ("fp8", "w4a16")
RESULT = "quantization.json"
CARD = "README.md"
KEPT = ("lm_head", "re:.*embed_tokens$", "re:.*norm$", r"re:.*mlp\.gate$", r"re:.*shared_expert_gate$")
EMPTY_EXPERT = r"re:.*mlp\.shared_expert\..*"  # the shared expert of size 0
VERSIONS = ("llmcompressor", "compressed-tensors", "transformers", "torch")


def quantize(checkpoint: Path, scheme: str, recipe: Path | None = None, out: Path | None = None) -> dict[str, Any]:
    """Writes `checkpoint` in `scheme` to `out` (default: CHECKPOINT-SCHEME) and returns what quantization.json says.

    The recipe, by default that in the checkpoint, gives calibration and held-out rows. Raises UserError where the
    checkpoint is no merge or is quantised already, or memory or disk are too small.
    """
    quiet_libraries()
    began = time.monotonic()
    if out is None:
        whole = checkpoint.resolve()
        out = whole.with_name(f"{whole.name}-{scheme}")
    config = check(checkpoint, scheme, out)
    loaded = load_recipe(recipe or checkpoint / "recipe.yaml")
    _check_experts(loaded, checkpoint)
    calibrated = scheme == "w4a16"
    group_size = group_size_of(config) if calibrated else None
    check_room(needed(checkpoint, scheme, 0), out)  # before anything is installed or tokenized
    python = environment_python()
    calibration = calibration_rows(loaded, checkpoint) if calibrated else []
    held_out = comparison_rows(loaded, checkpoint)
    need = needed(checkpoint, scheme, sum(len(row["ids"]) for row in calibration))
    limits = {"cpu_bytes": check_room(need, out), "dtype": computed_in()}
    with staged_folder(out) as aside:
        work = aside / "work"
        job = {"do": scheme, "group_size": group_size, "rows": calibration, **limits}
        report = _write(checkpoint, aside, work, python, job)
        seconds = time.monotonic() - began
        pair = {"original": checkpoint, "quantized": aside}
        views = {name: str(complete_view(folder, work / name)) for name, folder in pair.items()}
        rows = [{key: row[key] for key in ("ids", "answer_start")} for row in held_out]
        compare = {"do": "compare", **views, "rows": rows, **limits}
        figures = run_job(python, compare, work, "compare with the original")
        shutil.rmtree(work)
        made = {
            "scheme": scheme,
            "group_size": group_size,
            "versions": {name: pinned(name) for name in VERSIONS},
            "calibration": tokens_seen(report["seen"], loaded, calibration) if calibrated else None,
        }
        result = {
            **made,
            "bytes": {name: weight_bytes(folder) for name, folder in pair.items()},
            "loss": lost(held_out, figures["rows"], _evaluation(loaded, checkpoint)),
            "read_by_vllm": read_by_vllm(aside),
            "needed_bytes": asdict(need),
            "seconds": {"quantise": round(seconds, 1), "all": round(time.monotonic() - began, 1)},
        }
        write_json(aside / RESULT, result)
        write_manifest(checkpoint, aside, made)
        card = (checkpoint / CARD).read_text(encoding="utf-8") if (checkpoint / CARD).is_file() else ""
        write_text(aside / CARD, f"{card}\n## Quantised\n\n{markdown(result)}")
    return result


def _write(checkpoint: Path, out: Path, work: Path, python: Path, job: dict[str, Any]) -> dict[str, Any]:
    """Writes the quantised weights, their config and tokenizer to `out`; returns the child's report."""
    config = Checkpoint(checkpoint).config
    ignore = [*KEPT, *([] if config["shared_expert_intermediate_size"] else [EMPTY_EXPERT])]
    source = checkpoint if job["do"] == "fp8" else complete_view(checkpoint, work / "view")
    job = {**job, "model": str(source), "out": str(work / "raw"), "ignore": ignore}
    report = run_job(python, job, work, f"quantise to {job['do']}")
    regroup(work / "raw", checkpoint, out)
    written = read_json(work / "raw" / "config.json")["quantization_config"]
    write_json(out / "config.json", {**config, "quantization_config": {**written, "ignore": ignore}})
    copy_papers(checkpoint, out)
    shutil.rmtree(work / "raw")
    return report


def check(checkpoint: Path, scheme: str, out: Path) -> dict[str, Any]:
    """The checkpoint's config. Raises UserError unless it is a fused model that can be quantised to `out`."""
    if scheme not in SCHEMES:
        raise UserError(f"--scheme {scheme} is unknown: use {' or '.join(SCHEMES)}")
    config: dict[str, Any] = Checkpoint(checkpoint).config
    if config.get("model_type") != "qwen2_moe" or not (checkpoint / MANIFEST).is_file():
        raise UserError(f"{checkpoint} is no fused model with its {MANIFEST}: name the folder of a merge")
    if "quantization_config" in config:
        raise UserError(f"{checkpoint} is quantised already: name the fused model that it was made from")
    if out.resolve() == checkpoint.resolve() or checkpoint.resolve() in out.resolve().parents:
        raise UserError(f"--out {out} lies in the checkpoint itself: name another folder")
    if out.exists() and not (out / RESULT).is_file():
        raise UserError(f"--out {out} exists and is no quantised model: name another folder")
    if not gates_are_trained(checkpoint):
        console.print(
            f"  the gates of {checkpoint} are not trained yet: what is lost is measured with random routing",
            highlight=False,
            soft_wrap=True,
        )
    return config


def _check_experts(recipe: Recipe, checkpoint: Path) -> None:
    named = [expert.name for expert in recipe.experts]
    merged = [row["name"] for row in read_json(checkpoint / MANIFEST)["experts"]]
    if named != merged:
        raise UserError(
            f"the recipe's experts are {', '.join(named)}, those of {checkpoint} are {', '.join(merged)}: "
            "name the recipe that it was merged by with --recipe"
        )


def _evaluation(recipe: Recipe, checkpoint: Path) -> dict[str, Any] | None:
    """What `evaluate` has found of the checkpoint, beside it or in the recipe's output; None where it has not run."""
    for folder in (checkpoint.resolve().parent, recipe.folder):
        if (folder / "evaluation.json").is_file():
            found: dict[str, Any] = read_json(folder / "evaluation.json")
            return found if found["recipe"] == recipe.name else None
    return None


def read_by_vllm(folder: Path) -> dict[str, Any]:
    """Which compressed-tensors vLLM uses here, and whether that understands the quantisation; None without it."""
    try:
        ours = version("compressed-tensors")
        from compressed_tensors.quantization import QuantizationConfig
    except (PackageNotFoundError, ImportError):
        return {"compressed-tensors": None, "understood": None}
    try:
        QuantizationConfig.model_validate(read_json(folder / "config.json")["quantization_config"])
    except ValueError as error:
        console.print(f"  compressed-tensors {ours}, which vLLM uses here, does not read the result: {error}")
        return {"compressed-tensors": ours, "understood": False}
    return {"compressed-tensors": ours, "understood": True}
