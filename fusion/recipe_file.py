"""A recipe's YAML, read and checked, with the command line's overrides.

    recipe = load_recipe(Path("configs/demo.yaml"), overrides=["routing.top_k=2"])

Whatever is wrong with a recipe is one sentence that names the file and the line, or the override. `load_section` reads
a file that holds one section alone, as `qwen-fusion guard --config` does.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from fusion.errors import UserError
from fusion.recipe import Recipe
from fusion.sections.section import Location, Misfit, Section, place_of

Kind = TypeVar("Kind", bound=Section)


def load_recipe(path: Path, overrides: list[str] | None = None) -> Recipe:
    """Reads and checks a recipe; each override is `section.key=value`, the value in YAML.

    Raises UserError in one sentence with the YAML line of the first thing that is wrong.
    """
    recipe, places = _load(Recipe, path, overrides or [], "recipe", "configs/demo.yaml")
    recipe._places.update(places)
    return recipe


@contextmanager
def as_file(recipe: Recipe) -> Iterator[Path]:
    """A file of the recipe as it is, with every override, for a process that is to work on it."""
    with tempfile.NamedTemporaryFile("w", suffix=".yaml", encoding="utf-8") as file:
        yaml.safe_dump(recipe.model_dump(mode="json"), file, sort_keys=False)  # rules are tried in order
        file.flush()
        yield Path(file.name)


def load_section(kind: type[Kind], path: Path | None, overrides: list[str] | None, example: str) -> Kind:
    """One section of a recipe from a file of its own (None: its defaults), with overrides `key=value`.

    `example` is a file to name where this one is missing. Raises UserError as `load_recipe` does.
    """
    return _load(kind, path, overrides or [], "file", example)[0]


def _load(
    kind: type[Kind], path: Path | None, overrides: list[str], what: str, example: str
) -> tuple[Kind, dict[Location, str]]:
    data, root = ({}, None) if path is None else _read(path, what, example)
    touched = [_override(data, override) for override in overrides]
    places = _places(path, root, touched)
    try:
        return kind.model_validate(data), places
    except ValidationError as error:
        first = error.errors()[0]
        cause = first.get("ctx", {}).get("error")
        location = (*first["loc"], *(cause.location if isinstance(cause, Misfit) else ()))
        key = ".".join(str(part) for part in location) or what
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            message = "unknown key"
        elif first["type"] == "missing":
            message = "this key is missing"
        raise UserError(f"{place_of(places, location)}: {key}: {message}") from error


def _read(path: Path, kind: str, example: str) -> tuple[dict[str, Any], yaml.Node | None]:
    """The YAML of a file, as data and as nodes that know their lines."""
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise UserError(f"{kind} {path} {what}: name a YAML file, for example {example}")
    try:
        text = path.read_text(encoding="utf-8")
        data = yaml.load(text, Loader=_UniqueKeyLoader)
        root = yaml.compose(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}" if mark else "somewhere"
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "it cannot be parsed"
        raise UserError(f"{path}, {where}: not YAML ({problem})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}): save it as UTF-8") from error
    except ValueError as error:  # a value that YAML takes for a date and that is none
        raise UserError(f"{path}: not YAML ({error}): quote the value") from error
    if not isinstance(data, dict):
        raise UserError(f"{path}, line 1: a {kind} is a mapping of keys, see {example}")
    return _unshared(data), root


def _unshared(value: Any) -> Any:
    """The tree with every YAML alias written out, so that an override changes one place alone."""
    if isinstance(value, dict):
        return {key: _unshared(item) for key, item in value.items()}
    return [_unshared(item) for item in value] if isinstance(value, list) else value


class _UniqueKeyLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a key must be a word", problem_mark=key.start_mark)
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"key '{key.value}' is given twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _override(data: dict[str, Any], override: str) -> tuple[str, Location]:
    """Applies one `section.key=value` to the raw recipe; list items are named by index or by their `name`."""
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise UserError(f"--set {override}: write section.key=value, for example routing.top_k=2")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(f"--set {override}: the value is not YAML") from None
    keys = path.split(".")
    location: list[str | int] = []
    created: Location = ()  # the first section that the override brought into being
    here: Any = data
    for depth, key in enumerate(keys):
        last = depth == len(keys) - 1
        if isinstance(here, list):
            index = next((i for i, item in enumerate(here) if isinstance(item, dict) and item.get("name") == key), None)
            if index is None and key.isdigit() and int(key) < len(here):
                index = int(key)
            if index is None:
                known = ", ".join(str(item["name"]) for item in here if isinstance(item, dict) and "name" in item)
                said = f"has no item '{key}'" + (f", it has {known}" if known else f": give a number below {len(here)}")
                raise UserError(f"--set {override}: '{'.'.join(keys[:depth])}' {said}")
            location.append(index)
            if last:
                here[index] = value
            here = here[index]
        elif isinstance(here, dict):
            location.append(key)
            if last:
                here[key] = value
            else:
                if here.get(key) is None:
                    here[key] = {}
                    created = created or tuple(location)
                here = here[key]
        else:
            raise UserError(f"--set {override}: '{'.'.join(keys[:depth])}' is a value, not a section")
    return override, created or tuple(location)


def _places(path: Path | None, node: yaml.Node | None, touched: list[tuple[str, Location]]) -> dict[Location, str]:
    """Where each key of the recipe was said: `FILE, line N`, or the `--set` that brought it."""
    places: dict[Location, str] = {(): f"{path}, line {node.start_mark.line + 1 if node else 1}" if path else "--set"}

    def walk(node: yaml.Node | None, here: Location) -> None:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                places[(*here, key.value)] = f"{path}, line {key.start_mark.line + 1}"
                walk(value, (*here, key.value))
        elif isinstance(node, yaml.SequenceNode):
            for i, value in enumerate(node.value):
                places[(*here, i)] = f"{path}, line {value.start_mark.line + 1}"
                walk(value, (*here, i))

    walk(node, ())
    for override, place in touched:
        for deeper in [known for known in places if known[: len(place)] == place]:
            del places[deeper]
        places[place] = f"--set {override}"
    return places
