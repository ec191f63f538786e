"""The experts as LoRA adapters of one anchor: their own, or what mergekit-extract-lora makes of their weights.

    extracted(load_recipe("configs/demo.yaml"), Path("adapters"))   # {"math": Path("adapters/math-1b2c..."), ...}

What an engine with several adapters serves, and what is measured beside the fused model.
"""

import subprocess
import sys
from pathlib import Path

from safetensors.torch import load_file, save_file

from fusion.checkpoint import staged_folder
from fusion.drift import moved_by_group, outside
from fusion.errors import UserError, last_words
from fusion.merge import source_stamp
from fusion.recipe import Recipe
from fusion.sources import ModelSource, anchor_source, expert_sources

LORA_RANK = 32


def extracted(recipe: Recipe, folder: Path) -> dict[str, Path]:
    """The adapters by expert, those of rank LORA_RANK made in `folder` where they are not there; none of the anchor.

    They are on the MLPs, and on the attention of an expert whose attention has moved too, whose biases stay the
    anchor's: vLLM knows no adapter of a bias. Raises UserError where mergekit can make none.
    """
    anchor, found = anchor_source(recipe), {}
    for expert, source in zip(recipe.experts, expert_sources(recipe), strict=True):
        if source.paths == anchor.paths:
            continue
        if source.adapter:
            found[expert.name] = source.adapter
            continue
        out = folder / f"{expert.name}-{source_stamp(source)[:12]}"
        if not out.is_dir():
            with staged_folder(out) as aside:
                _extract(source, anchor, aside)
                _drop_biases(aside / "adapter_model.safetensors")
        found[expert.name] = out
    return found


def _extract(source: ModelSource, anchor: ModelSource, out: Path) -> None:
    program = str(Path(sys.executable).with_name("mergekit-extract-lora"))
    command = [program, "--model", str(source.folder), "--base-model", str(anchor.folder), "--out-path", str(out)]
    wanted, others = r"mlp\.(gate|up|down)_proj", "embed|lm_head|norm"
    if outside(moved_by_group(anchor, source)):
        wanted += r"|self_attn\.[qkvo]_proj"
    else:
        others += "|self_attn"
    command += ["--max-rank", str(LORA_RANK), "-i", wanted, "-e", others]
    try:
        done = subprocess.run([*command, "--quiet"], capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise UserError(f"{program} is missing, which mergekit installs: install mergekit again") from error
    if done.returncode:
        raise UserError(f"no adapter can be extracted from {source.folder}: {last_words(done)}")


def _drop_biases(file: Path) -> None:
    """Takes what mergekit adds for biases out of an adapter: peft and vLLM both read it as no LoRA."""
    tensors = load_file(file)
    kept = {name: tensor for name, tensor in tensors.items() if not name.endswith(".bias")}
    if len(kept) < len(tensors):
        save_file(kept, file, metadata={"format": "pt"})
