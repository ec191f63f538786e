"""Verify: is a fused checkpoint what its manifest, its index, its config and its sources say it is.

    qwen-fusion verify runs/demo/fused

One pass over the files: each is hashed, its tensors are looked at for NaN and infinity and compared, bit for bit, with
the models that they were merged from, where these are on this machine. transformers then loads the model on the meta
device, which reads no weights and still tells what is missing or unexpected.
"""

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import chdir
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fusion.architecture import GATES_FILE, MANIFEST, expert_of_tensor, is_mlp, lacking_biases
from fusion.checkpoint import INDEX, Checkpoint, file_hash, read_json
from fusion.errors import UserError
from fusion.headers import PIECE, TensorPlace, all_finite, parts, read_header, same_bits
from fusion.hub import resolve_model
from fusion.progress import bytes_bar, quiet_libraries
from fusion.reader import Reader
from fusion.recipe import Recipe
from fusion.recipe_file import load_recipe
from fusion.sources import base_source, expert_source, shared_expert_source

Sources = dict[str, Reader]  # an expert's name, `shared` or `shared-expert`


@dataclass
class Verified:
    """What was found: every problem in a sentence, what equals its source, and why the rest was not compared."""

    files: int = 0
    bytes: int = 0
    problems: list[str] = field(default_factory=list)
    equal: list[str] = field(default_factory=list)
    not_compared: dict[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """The findings as plain data."""
        return asdict(self)

    def sentence(self) -> str:
        """What holds, in a line or two."""
        said = (
            f"{self.files} files, {self.bytes / 1e9:.2f} GB: hashes, index, transformers' keys and shapes are right, "
            f"every number is finite; equal to their sources bit for bit: {', '.join(self.equal) or 'none'}"
        )
        by_reason: dict[str, list[str]] = {}
        for name, why in self.not_compared.items():
            by_reason.setdefault(why, []).append(name)
        return said + "".join(f"; NOT compared: {', '.join(names)} ({why})" for why, names in by_reason.items())


def verify(folder: Path) -> Verified:
    """Checks a fused checkpoint; what is wrong with it is in the result. Raises UserError where the folder is none."""
    folder = folder.resolve()
    if not (folder / MANIFEST).is_file():
        what = f"has no {MANIFEST}" if folder.is_dir() else "is no folder"
        raise UserError(f"{folder} {what}: name the folder of a fused checkpoint, as `merge` leaves it")
    with chdir(_merged_from(folder)):
        return _verified(folder)


def _merged_from(folder: Path) -> Path:
    """Where the paths of the checkpoint's recipe count from: what its output lies in, or where we are."""
    output = load_recipe(folder / "recipe.yaml").fused
    if output.is_absolute() or folder.parts[-len(output.parts) :] != output.parts:
        return Path.cwd()
    return folder.parents[len(output.parts) - 1]


def _verified(folder: Path) -> Verified:
    manifest, found = read_json(folder / MANIFEST), Verified()
    if not isinstance(manifest, dict) or not manifest.keys() >= {"sha256", "gates", "experts", "routing"}:
        raise UserError(f"{folder / MANIFEST} is not what `merge` writes: merge again, or copy the folder again")
    for name, wanted in manifest.get("files", {}).items():
        if not (folder / name).is_file():
            found.problems.append(f"{name}: is not there, though the manifest knows it")
        elif file_hash(folder / name) != wanted:
            found.problems.append(f"{name}: is not what the merge has written")
    headers = _headers(folder, found)
    hashes = {**manifest["sha256"], GATES_FILE: manifest["gates"]["sha256"]}
    found.problems += [
        f"{name}: the manifest does not know this file" for name in sorted(headers.keys() - hashes.keys())
    ]
    sources = _sources(folder, manifest, found)
    differing: dict[str, str] = {}
    found.files, found.bytes = len(headers), sum((folder / name).stat().st_size for name in headers)
    checks = _Checks(manifest, sources, differing, found)
    with bytes_bar() as bar:
        advance = partial(bar.advance, bar.add_task("verify", total=found.bytes))
        for name, places in headers.items():
            if _read(folder / name, places, checks, advance) != hashes.get(name, "") and name in hashes:
                found.problems.append(f"{name}: its SHA-256 is not the manifest's: it has changed since")
    for name, tensor in differing.items():
        found.problems.append(
            f"{tensor}: is not what {sources[name].source.folder} holds, from which '{name}' was merged"
        )
    for name, tensor in checks.not_anchored.items():
        found.problems.append(f"{tensor}: is not '{name}'s own, though the manifest calls that anchored")
    found.equal = [name for name in sources if name not in differing]
    if "quantization_config" in read_json(folder / "config.json"):
        found.not_compared["transformers' keys"] = "quantised, which it unpacks as it loads"
    else:
        found.problems += _loads(folder)
    return found


def _headers(folder: Path, found: Verified) -> dict[str, dict[str, TensorPlace]]:
    """The headers of all files, with what is wrong between them and the index."""
    index = read_json(folder / INDEX)
    weight_map: dict[str, str] = index.get("weight_map", {})
    headers: dict[str, dict[str, TensorPlace]] = {}
    for name in sorted(set(weight_map.values()) | {path.name for path in folder.glob("[!.]*.safetensors")}):
        try:
            headers[name] = read_header(folder / name)
        except UserError as error:
            found.problems.append(str(error))
    held = {(tensor, name) for name, places in headers.items() for tensor in places}
    named = {pair for pair in weight_map.items() if pair[1] in headers}
    found.problems += [
        f"{file}: lacks {tensor}, which the index says it holds" for tensor, file in sorted(named - held)
    ]
    found.problems += [f"{file}: holds {tensor}, which the index does not say" for tensor, file in sorted(held - named)]
    total = sum(place.nbytes for places in headers.values() for place in places.values())
    said = index.get("metadata", {}).get("total_size")
    if headers.keys() == set(weight_map.values()) and said != total:
        found.problems.append(f"{INDEX}: says {said} bytes in all, the files hold {total}")
    return headers


def _sources(folder: Path, manifest: dict[str, Any], found: Verified) -> Sources:
    """The models that can be compared, open; what cannot is noted with the reason."""
    names = ["shared", *(row["name"] for row in manifest["experts"])]
    if manifest["routing"]["shared_expert"]:
        names.append("shared-expert")
    if "quantized" in manifest:
        found.not_compared = dict.fromkeys(names, "quantised")
        return {}
    recipe = load_recipe(folder / "recipe.yaml")
    experts = {expert.name: expert for expert in recipe.experts}
    makers: dict[str, Callable[[], Any]] = {
        "shared": lambda: base_source(recipe),
        "shared-expert": lambda: shared_expert_source(recipe),
        **{name: partial(expert_source, recipe, expert) for name, expert in experts.items()},
    }
    sources = {}
    for name in names:
        if name == "shared" and "healed" in manifest:
            found.not_compared[name] = "healed"
            continue
        try:
            if name not in makers:
                raise UserError("recipe.yaml beside it has no such expert")
            _refuse_downloads(recipe, name)
            reader = Reader(makers[name]())
            reader.names()  # refuses files that are missing or broken
            sources[name] = reader
        except UserError as error:
            found.not_compared[name] = str(error)
    return sources


def _refuse_downloads(recipe: Recipe, name: str) -> None:
    """Raises UserError where a model that `name` is read from would have to be downloaded."""
    expert = next((expert for expert in recipe.experts if expert.name == name), None)
    shared = recipe.routing.shared_expert
    needed = [recipe.anchor.model, shared if shared and "/" in shared else None]
    for model in [expert.model, expert.adapter] if expert else needed:
        if model:
            resolve_model(model, allow_download=False)


@dataclass(frozen=True)
class _Checks:
    """What is looked at in every tensor on its way."""

    manifest: dict[str, Any]
    sources: Sources
    differing: dict[str, str]  # source -> the first tensor that is not its own
    found: Verified
    # expert -> the first shared tensor that is not the anchor's
    not_anchored: dict[str, str] = field(default_factory=dict)

    def of(self, name: str, place: TensorPlace) -> Callable[[torch.Tensor], None]:
        """What is to be called with every piece of the tensor, in their order."""
        owner, dense = self._owner(name)
        theirs: Iterator[torch.Tensor] | None = None
        if owner in self.sources and owner not in self.differing:
            reader = self.sources[owner]
            if dense in reader and reader.place(dense).shape == place.shape:
                theirs = reader.pieces(dense, place.dtype)
            elif lacking_biases(reader.config, reader.names()).get(dense) == place.shape:
                theirs = iter(torch.zeros(place.shape, dtype=place.dtype).split(PIECE))  # as merge has put them there
            else:
                self.differing[owner] = name
        anchored = self._anchored(dense, place) if owner == "shared" else {}
        finite = True

        def check(piece: torch.Tensor) -> None:
            nonlocal finite, theirs
            if finite and not all_finite(piece):
                finite = False
                self.found.problems.append(f"{name}: holds NaN or infinity")
            if theirs is not None and not same_bits(next(theirs), piece):
                self.differing[owner], theirs = name, None
            for expert, pieces in list(anchored.items()):
                if not same_bits(next(pieces), piece):
                    self.not_anchored[expert] = name
                    del anchored[expert]

        return check

    def _anchored(self, name: str, place: TensorPlace) -> dict[str, Iterator[torch.Tensor]]:
        """The experts that the manifest calls anchored, as far as they still seem so, with their tensor `name`."""
        found: dict[str, Iterator[torch.Tensor]] = {}
        if "healed" in self.manifest:  # the shared parts are nobody's any more
            return found
        for row in self.manifest["experts"]:
            reader = self.sources.get(row["name"])
            if reader is None or not row.get("anchored") or row["name"] in self.not_anchored:
                continue
            if name in reader and reader.place(name).shape == place.shape:
                found[row["name"]] = reader.pieces(name, place.dtype)
        return found

    def _owner(self, name: str) -> tuple[str, str]:
        """The source that a fused tensor comes from, and its name there; gates have none."""
        number, dense = expert_of_tensor(name)
        if number is not None:
            rows = self.manifest["experts"]
            return (rows[number]["name"] if number < len(rows) else ""), dense
        if ".mlp.shared_expert." in name:
            return "shared-expert", name.replace(".mlp.shared_expert.", ".mlp.")
        return ("" if is_mlp(name) and name.endswith("gate.weight") else "shared"), name


def _read(path: Path, places: dict[str, TensorPlace], checks: _Checks, advance: Callable[[int], Any]) -> str:
    """Reads a file from beginning to end, `checks` looking on; its SHA-256."""
    digest = hashlib.sha256()
    in_order = sorted(places.items(), key=lambda item: item[1].begin)
    first = in_order[0][1].begin if in_order else path.stat().st_size
    with path.open("rb") as file:
        digest.update(file.read(first))
    advance(first)
    with ThreadPoolExecutor(1) as hashing:
        for name, place in in_order:
            check = checks.of(name, place)
            for piece in parts(place):
                hashed = hashing.submit(digest.update, piece.view(torch.uint8).numpy().data)
                check(piece)
                hashed.result()
                advance(piece.nbytes)
    return digest.hexdigest()


def _loads(folder: Path) -> list[str]:
    """What transformers has to say against the checkpoint; no remote code, no weights in memory."""
    from transformers import AutoModelForCausalLM

    quiet_libraries()
    try:
        Checkpoint(folder)  # refuses remote code
        model, said = AutoModelForCausalLM.from_pretrained(
            folder, device_map={"": "meta"}, output_loading_info=True, use_safetensors=True
        )
    except Exception as error:  # whatever transformers raises is about the checkpoint
        return [f"transformers cannot load it: {str(error).splitlines()[0]}"]
    empty = {name for name, parameter in model.named_parameters() if parameter.numel() == 0}  # no shared expert
    problems = [f"{name}: transformers misses it" for name in sorted(set(said["missing_keys"]) - empty)]
    problems += [f"{name}: transformers does not expect it" for name in sorted(said["unexpected_keys"])]
    problems += [f"{row}: has another shape than config.json says" for row in sorted(map(str, said["mismatched_keys"]))]
    return problems + list(said["error_msgs"])
