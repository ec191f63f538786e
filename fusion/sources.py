"""Where a recipe's models lie: named ones on the hub or on disk, trained ones under the recipe's output folder."""

import shutil
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fusion.adapter import Adapter
from fusion.errors import UserError
from fusion.hardware import attention_implementation, compute_dtype
from fusion.hub import resolve_model
from fusion.recipe import Recipe
from fusion.sections.fusing import Expert, Loading

SHARED_NOTE, ANCHORING_NOTE = "shared.json", "anchoring.json"


@dataclass(frozen=True)
class ModelSource:
    """A dense checkpoint, with the LoRA adapter to apply while reading it, if any."""

    name: str
    folder: Path
    adapter: Path | None = None

    @property
    def paths(self) -> list[Path]:
        """All that the source is read from."""
        return [self.folder, self.adapter] if self.adapter else [self.folder]


def trained_anchor(recipe: Recipe) -> Path:
    """The folder of an anchor that the recipe trains itself."""
    return recipe.folder / "anchor"


def trained_expert(recipe: Recipe, expert: Expert) -> Path:
    """The folder of an expert that the recipe branches itself: a model, or an adapter for `lora_rank`."""
    return recipe.folder / "experts" / expert.name


def anchor_source(recipe: Recipe) -> ModelSource:
    """The anchor. Raises UserError where it has yet to be trained or cannot be had."""
    if recipe.anchor.model:
        return ModelSource("anchor", resolve_model(recipe.anchor.model))
    folder = trained_anchor(recipe)
    if not (folder / "config.json").is_file():
        raise UserError(f"the anchor {folder} has not been trained yet: run `qwen-fusion branch` on the recipe first")
    return ModelSource("anchor", folder)


def anchored_expert(recipe: Recipe, expert: Expert) -> Path:
    """The folder of an expert that the recipe leads back to the anchor."""
    return recipe.folder / "anchored" / expert.name


def original_source(recipe: Recipe, expert: Expert) -> ModelSource:
    """One expert as it is before anchoring. Raises UserError where it has yet to be branched or cannot be had."""
    if expert.model:
        adapter = resolve_model(expert.adapter) if expert.adapter else None
        return ModelSource(expert.name, resolve_model(expert.model), adapter)
    folder = trained_expert(recipe, expert)
    if not folder.is_dir():
        raise UserError(
            f"expert '{expert.name}' has not been trained yet: run `qwen-fusion branch` on the recipe first"
        )
    if expert.branch and expert.branch.lora_rank:
        return ModelSource(expert.name, anchor_source(recipe).folder, folder)
    return ModelSource(expert.name, folder)


def expert_source(recipe: Recipe, expert: Expert) -> ModelSource:
    """One expert as it is merged. Raises UserError where it has yet to be made or cannot be had."""
    if expert.anchor is None:
        return original_source(recipe, expert)
    folder = anchored_expert(recipe, expert)
    if not folder.is_dir():
        raise UserError(
            f"expert '{expert.name}' has not been anchored yet: run `qwen-fusion anchor` on the recipe first"
        )
    return ModelSource(expert.name, folder)


def own_source(recipe: Recipe, expert: Expert) -> ModelSource:
    """The model that one expert is measured against and healed by: itself before any anchoring, or who has taught it.

    What a teacher of text has taught stands for it, whose tokens may be others.
    """
    settings = expert.anchor
    if settings is None or settings.teacher is None:
        return original_source(recipe, expert)
    if settings.method == "text":
        return expert_source(recipe, expert)
    return ModelSource(f"{expert.name}'s teacher", resolve_model(settings.teacher))


def expert_sources(recipe: Recipe) -> list[ModelSource]:
    """All experts in the recipe's order, which is the order of the gate's rows."""
    return [expert_source(recipe, expert) for expert in recipe.experts]


def shared_parts(recipe: Recipe) -> Path:
    """The folder of the shared parts that the recipe makes itself: a model, or a note alone where the anchor's won."""
    return recipe.folder / "shared"


def base_source(recipe: Recipe) -> ModelSource:
    """The model whose shared parts the fused model has. Raises UserError where it has yet to be made."""
    if recipe.shared.is_anchor:
        return anchor_source(recipe)
    folder = shared_parts(recipe)
    if not (folder / SHARED_NOTE).is_file():
        raise UserError(f"the shared parts {folder} do not exist yet: run `qwen-fusion merge` on the recipe first")
    return ModelSource("shared parts", folder) if (folder / "config.json").is_file() else anchor_source(recipe)


def shared_expert_source(recipe: Recipe) -> ModelSource | None:
    """The shared expert: the anchor, one of the experts, or another model; None where the recipe names none."""
    name = recipe.routing.shared_expert
    if name is None:
        return None
    if name == "anchor":
        return anchor_source(recipe)
    for expert in recipe.experts:
        if expert.name == name:
            return expert_source(recipe, expert)
    return ModelSource("shared", resolve_model(name))


def load_model(
    source: ModelSource,
    attention: str = "auto",
    loading: Loading | None = None,
    dtype: torch.dtype | None = None,
    yarn_factor: float | None = None,
) -> Any:
    """The whole model for inference, its adapter merged in, spread by accelerate as `loading` says.

    `yarn_factor` stretches its positions as `serving.yarn_factor` does.

    `dtype` is the one that is fast here where none is named. What is offloaded to disk lies in `loading`'s folder, or
    in a temporary one that goes with the model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(source.folder)
    if yarn_factor is not None:
        from serving.engine import yarn_overrides

        for key, value in yarn_overrides(config.to_dict(), yarn_factor).items():
            setattr(config, key, value)
    if source.adapter:
        Adapter(source.adapter)  # refuses a pickled one, which PEFT would read
    loading = loading or Loading()
    limits = {int(device) if str(device).isdecimal() else device: size for device, size in loading.max_memory.items()}
    spread = loading.device_map or ("auto" if torch.cuda.is_available() else None)
    offload = loading.offload_folder or (tempfile.mkdtemp(prefix="qwen-fusion-offload-") if spread else None)
    model = AutoModelForCausalLM.from_pretrained(
        source.folder,
        config=config,
        dtype=dtype or compute_dtype(),
        attn_implementation=attention_implementation(attention),
        device_map=spread,
        max_memory=limits or None,
        offload_folder=offload,
        use_safetensors=True,
    ).eval()
    _keep_empty(model)
    if source.adapter:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, source.adapter).merge_and_unload()
    if offload and not loading.offload_folder:
        weakref.finalize(model, shutil.rmtree, offload, ignore_errors=True)
    return model


@contextmanager
def whole_model(source: ModelSource) -> Iterator[Path]:
    """A folder that vLLM can load: the model's own, or a temporary one with its adapter merged in."""
    if source.adapter is None:
        yield source.folder
        return
    from fusion.encoding import load_tokenizer

    with tempfile.TemporaryDirectory() as aside:
        load_model(source).save_pretrained(aside)
        torch.cuda.empty_cache()  # vLLM wants the memory
        load_tokenizer(source.folder).save_pretrained(aside)
        yield Path(aside)


def _keep_empty(model: Any) -> None:
    """Takes weights without elements (a fused model's missing shared expert) out of accelerate's offloading.

    They are in no file, where its hooks would look for them.
    """
    from accelerate.hooks import remove_hook_from_module

    for module in model.modules():
        weight, hook = getattr(module, "weight", None), getattr(module, "_hf_hook", None)
        if hook is not None and weight is not None and weight.numel() == 0:
            module.weight = torch.nn.Parameter(torch.empty_like(weight, device=hook.execution_device))
            remove_hook_from_module(module)
