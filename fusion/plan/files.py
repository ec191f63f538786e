"""A model's files, by their headers alone: is all there, whole, of the shapes that its config says, and safe to read.

tensors, findings = read_files(describe("anchor", "models/Qwen2.5-7B-Instruct"))
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from fusion.architecture import dense_shapes, is_mlp, is_qkv_bias
from fusion.checkpoint import INDEX, read_json
from fusion.errors import UserError
from fusion.headers import TensorPlace, read_header
from fusion.hub import is_hub_id
from fusion.plan.findings import Finding, Severity
from fusion.plan.models import Described

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
SIGNIFICANT = {"float64": 53, "float32": 24, "bfloat16": 8, "float16": 11}  # bits of a number's precision
Tensors = Mapping[str, TensorPlace]


def read_files(model: Described) -> tuple[Tensors, list[Finding]]:
    """The tensors of a model on this machine that its files hold, and everything that is wrong with the files.

    Nothing for a model that is not here.
    """
    if model.folder is None:
        return {}, []
    tensors, found = _tensors(model)
    return tensors, [*_remote_code(model), *found, *_against_config(model, tensors if not found else {})]


def dtype_lost(model: Described, tensors: Tensors, wanted: str) -> list[Finding]:
    """What the cast of a model's tensors to `wanted`, the fused model's dtype, loses."""
    narrow = SIGNIFICANT.get(wanted, 0)
    found = {}
    for place in tensors.values():
        name = str(place.dtype).removeprefix("torch.")
        if SIGNIFICANT.get(name, 0) > narrow:
            bits = f"keeps {narrow} of {SIGNIFICANT[name]} significant bits of every weight"
            found[name] = bits + (", and none beyond 65504" if wanted == "float16" else "")
        elif wanted == "float16" and name == "bfloat16":
            found[name] = "cannot hold weights beyond 65504, nor any below 6e-8"
    return [
        Finding(
            "warning",
            model.name,
            f"its weights are {name}, the fused model's {wanted}",
            f"the cast {lost}",
            f"take an anchor saved in {name} to keep them, or accept it",
        )
        for name, lost in found.items()
    ]


def lacks_biases(tensors: Tensors) -> bool:
    """Whether a model's files hold no q, k and v biases at all."""
    return bool(tensors) and not any(map(is_qkv_bias, tensors))


def save_again(folder: Path, suffix: str, change: str = "", loading: str = "") -> str:
    """A shell command that loads a model with transformers and saves it as safetensors in a folder beside its own.

    The tokenizer's files are copied: saved again they may say something else.
    """
    source, target = (str(folder).rstrip("/") + end for end in ("", f"-{suffix}"))
    return (
        'python -c "import glob, shutil; from transformers import AutoModelForCausalLM as M; '
        f"m = M.from_pretrained('{source}'{loading}); {change}m.save_pretrained('{target}'); "
        f"[shutil.copy(f, '{target}') for p in ('*token*', 'vocab.json', 'merges.txt', '*.jinja') "
        f"for f in glob.glob('{source}/' + p)]\""
    )


def _tensors(model: Described) -> tuple[Tensors, list[Finding]]:
    """The tensors by name, from the index's files or the single one; with any finding they are not all there."""
    assert model.folder is not None
    folder = model.folder
    if (folder / INDEX).is_file():
        return _indexed(model)
    if (folder / "model.safetensors").is_file():
        return _headers(model, ["model.safetensors"])
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if shards:
        what, fix = f"{folder} holds {len(shards)} shards ({shards[0]}, ...) and no {INDEX}", _again(model, [INDEX])
        return {}, [Finding("error", model.name, what, "nothing says which tensor is where", fix)]
    if pickled:
        what = f"{folder} holds pickled weights ({pickled[0]}) and no safetensors"
        why, fix = "unpickling runs whatever code is in them", f"convert them: {_saved(model, 'safetensors')}"
        return {}, [Finding("error", model.name, what, why, fix)]
    what = f"{folder} holds no model.safetensors and no {INDEX}"
    return {}, [Finding("error", model.name, what, "there are no weights to merge", "name a folder with a model")]


def _indexed(model: Described) -> tuple[Tensors, list[Finding]]:
    assert model.folder is not None
    folder, again = model.folder, _again(model, [INDEX])
    try:
        content = read_json(folder / INDEX)
    except UserError as error:
        return {}, [Finding("error", model.name, str(error), "nothing says which tensor is where", again)]
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    named = isinstance(weight_map, dict) and all(isinstance(file, str) for file in weight_map.values())
    if not weight_map or not named:
        what = f"{folder / INDEX} cannot be used (it has no 'weight_map' that names tensors and their files)"
        return {}, [Finding("error", model.name, what, "nothing says which tensor is where", again)]
    files = sorted(set(weight_map.values()))
    missing = [file for file in files if not (folder / file).is_file()]
    tensors, found = _headers(model, [file for file in files if file not in missing])
    if missing:
        what = f"{folder} lacks {len(missing)} of {len(files)} files that its index names: {_listed(missing)}"
        found.append(Finding("error", model.name, what, "their tensors cannot be merged", _again(model, missing)))
    if found:
        return tensors, found
    absent = [name for name, file in weight_map.items() if name not in tensors or tensors[name].file.name != file]
    if absent:
        what = f"the index of {folder} names {counted(absent)} that {weight_map[absent[0]]} does not hold"
        fix = _again(model, [INDEX, weight_map[absent[0]]])
        found.append(Finding("error", model.name, what, "index and files are not of the same model", fix))
    return {name: tensors[name] for name in weight_map if name in tensors}, found


def _headers(model: Described, files: Iterable[str]) -> tuple[Tensors, list[Finding]]:
    """All tensors of the files; one finding a file that is broken."""
    assert model.folder is not None
    tensors: dict[str, TensorPlace] = {}
    found = []
    for file in files:
        try:
            tensors |= read_header(model.folder / file)
        except UserError as error:
            found.append(Finding("error", model.name, str(error), fix=_again(model, [file])))
    return tensors, found


def _remote_code(model: Described) -> list[Finding]:
    if "auto_map" not in model.config:
        return []
    named = model.config["auto_map"]
    entry = min(map(str, named.values()), default="empty") if isinstance(named, dict) else str(named)
    what = f"needs code of its own (auto_map in config.json: {entry.split('--')[-1]})"
    command = _saved(model, "native", "vars(m.config).pop('auto_map', None); ", ", trust_remote_code=False")
    why = "only native architectures are used, and no code of a model's is run"
    return [Finding("error", model.name, what, why, f"save it without that code: {command}")]


def _against_config(model: Described, tensors: Tensors) -> list[Finding]:
    """The tensors against those that the config describes."""
    if not tensors:
        return []
    odd = next((name for name, place in tensors.items() if place.dtype not in FLOATS), None)
    if odd:
        what = f"{odd} is stored as {str(tensors[odd].dtype).removeprefix('torch.')}: the checkpoint is quantised"
        return [quantised(model.name, what)]
    expected = dense_shapes(model.config)
    if lacks_biases(tensors):
        expected = {name: shape for name, shape in expected.items() if not is_qkv_bias(name)}
    found = []
    missing = [name for name in expected if name not in tensors]
    if missing:
        what = f"{model.folder} lacks {counted(missing)}"
        found.append(Finding("error", model.name, what, "its config.json says that it has them", _again(model, [])))
    other = [name for name, shape in expected.items() if name in tensors and tensors[name].shape != shape]
    if other:
        name = other[0]
        what = f"{name} is {tensors[name].shape} in {model.folder}, its config.json makes it {expected[name]}"
        more = f" (so are {len(other) - 1} more)" if len(other) > 1 else ""
        found.append(Finding("error", model.name, what + more, "one of the two is another model's", _again(model, [])))
    extra = [
        n for n in tensors if n not in expected and n != "lm_head.weight" and not n.endswith("rotary_emb.inv_freq")
    ]
    if extra:
        what = f"holds {counted(extra)} that a Qwen2 model does not have"
        severity: Severity = "error" if any(map(is_mlp, extra)) else "warning"
        why = "they are left out of the merge"
        found.append(Finding(severity, model.name, what, why, "make sure that the model works without them"))
    return found


def quantised(name: str, what: str = "the checkpoint is quantised") -> Finding:
    """That a checkpoint's weights are not there in full."""
    why = "its weights cannot be merged with others"
    return Finding("error", name, what, why, "name the full-precision one; serving can quantise the fused model")


def _saved(model: Described, suffix: str, change: str = "", loading: str = "") -> str:
    assert model.folder is not None
    return save_again(model.folder, suffix, change, loading)


def _again(model: Described, files: list[str]) -> str:
    """How to get files of a model once more."""
    if is_hub_id(model.model):
        return f"download again: hf download {' '.join([model.model, *files])} --force-download"
    return f"copy {_listed(files)} again" if files else "copy the model again"


def counted(names: list[str]) -> str:
    """How many tensors these are, and the first of them."""
    return f"tensor {names[0]}" if len(names) == 1 else f"{len(names)} tensors ({names[0]}, ...)"


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
