"""The preflight as a whole: what a plan gives, where its errors point, and how fast it is on full-size models."""

import json
import shutil
import time
from pathlib import Path

import pytest
import torch

from fusion import road
from fusion.architecture import dense_shapes, is_mlp
from fusion.checkpoint import INDEX, read_json, write_json
from fusion.errors import UserError
from fusion.headers import encode_header
from fusion.plan.findings import Finding, raise_on_error, worst_first
from fusion.plan.models import describe_anchor, known
from fusion.plan.preflight import check
from fusion.recipe import Recipe
from fusion.recipe_file import load_recipe
from fusion.sources import trained_anchor
from tests.fusion.planning import change_config, change_tensors, errors, findings
from tests.recipes import make_recipe, recipe_data

FIVE = Path(__file__).parents[2] / "configs" / "qwen2.5-7b-five-experts.yaml"


def test_a_plan_is_plain_data_and_reads_no_mlps(tmp_path: Path, anchor: Path, other: Path) -> None:
    change_tensors(other, lambda name, tensor: tensor * float("nan") if is_mlp(name) else tensor)
    result = road.plan(make_recipe(tmp_path, anchor, {"general": anchor, "math": other}))
    assert json.loads(json.dumps(result)) == result
    assert result["findings"] == []
    assert result["budget"]["bytes"] == 4 * result["budget"]["parameters"]


def test_errors_come_first_are_all_printed_and_the_first_stops_the_plan(
    tmp_path: Path, anchor: Path, other: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    change_config(other, rms_norm_eps=1e-5, rope_parameters={"rope_type": "default", "rope_theta": 1e4})
    recipe = make_recipe(tmp_path, anchor, {"general": anchor, "math": other, "coding": other})
    assert [finding.severity for finding in check(recipe)][:4] == ["error", "error", "warning", "warning"]
    with pytest.raises(UserError) as caught:
        road.plan(recipe)
    assert str(caught.value).startswith("expert 'math': rope_theta")
    assert len(str(caught.value).splitlines()) == 1
    printed = capfd.readouterr().err
    assert "error: expert 'math': rope_theta" in printed and "error: expert 'coding': rope_theta" in printed


def test_findings_are_sorted_and_told_once() -> None:
    note, error = Finding("note", "a", "b"), Finding("error", "c", "d", "e", "f")
    assert worst_first([note, error, note]) == [error, note]
    assert (note.sentence(), error.sentence()) == ("a: b", "c: d: e; f")


def test_every_finding_on_the_target_says_why_or_how_to_mend_it() -> None:
    overrides = ["experts.math.anchor=null", "experts.coding.license=mit", "serving.max_model_len=131072"]
    found = check(load_recipe(FIVE, overrides))
    assert {finding.severity for finding in found} == {"error", "warning", "note"}
    assert all(finding.why and finding.fix for finding in found if finding.severity != "note")


@pytest.mark.parametrize(
    ("said", "override"),
    [
        ("serving.max_model_len: 131072 is beyond", "serving.max_model_len=131072"),
        ("routing.moe_layers: names layer [99]", "routing.moe_layers=[99]"),
        ("expert 'math': model 'nowhere' is neither", "experts.math={name: math, domain: math, model: nowhere}"),
    ],
)
def test_an_error_names_the_override_that_it_is_about(said: str, override: str) -> None:
    recipe = load_recipe(FIVE, [override])
    with pytest.raises(UserError) as caught:
        raise_on_error(recipe, check(recipe))
    assert str(caught.value).startswith(f"--set {override}: {said}")


def test_an_error_names_its_line(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    lines = FIVE.read_text(encoding="utf-8").splitlines()
    number = next(n for n, line in enumerate(lines) if "max_model_len:" in line)
    lines[number] = "  max_model_len: 131072"
    path.write_text("\n".join(lines), encoding="utf-8")
    recipe = load_recipe(path)
    with pytest.raises(UserError, match=rf"recipe.yaml, line {number + 1}: serving.max_model_len: 131072 is beyond"):
        raise_on_error(recipe, check(recipe))


def test_an_anchor_to_be_trained_is_planned_from_its_section(tmp_path: Path, anchor: Path) -> None:
    data = recipe_data(tmp_path, anchor, {"general": anchor, "math": anchor})
    branch = {"data": {"generated": "demo.math"}}
    data["anchor"] = {"pretrain": {"data": {"generated": "demo.anchor"}, "hidden_size": 64}}
    data["experts"] = [{"name": e["name"], "domain": e["domain"], "branch": branch} for e in data["experts"]]
    planned = Recipe.model_validate(data)
    assert describe_anchor(planned).config["hidden_size"] == 64
    older = trained_anchor(planned)
    older.mkdir(parents=True)
    (older / "config.json").write_text(json.dumps({"model_type": "qwen2", "hidden_size": 32}))
    assert describe_anchor(planned).config["hidden_size"] == 64  # an older run's anchor will be trained again
    assert describe_anchor(planned, trained=True).config["hidden_size"] == 32
    assert [finding.severity for finding in check(planned)] == ["note", "note"]


def test_a_broken_anchor_is_told_of_the_anchor_alone(tmp_path: Path, anchor: Path, other: Path) -> None:
    (other / "config.json").write_text("{")
    (finding,) = findings(tmp_path, other, anchor)
    assert finding.where == "anchor.model" and "config.json cannot be read" in finding.what


def test_data_that_are_not_there_are_told_by_the_plan(tmp_path: Path, anchor: Path, other: Path) -> None:
    extra = {"extra": {"more": {"path": str(tmp_path / "nowhere.jsonl")}}}
    recipe = make_recipe(tmp_path, anchor, {"general": anchor, "math": other}, evaluation=extra)
    with pytest.raises(UserError, match=r"nowhere.jsonl does not exist"):
        road.plan(recipe)


def write_sparse(folder: Path, model: str, tokenizer: Path) -> Path:
    """A full-size model in four shards whose data are holes: real headers, no bytes on disk."""
    folder.mkdir()
    config = known(model).config
    assert config is not None
    shapes = list(dense_shapes(config).items())
    weight_map = {}
    for number in range(4):
        file = f"model-{number + 1:05d}-of-00004.safetensors"
        held = shapes[number::4]
        header = encode_header({name: (torch.bfloat16, shape) for name, shape in held})
        size = sum(2 * torch.Size(shape).numel() for _, shape in held)
        with (folder / file).open("wb") as out:
            out.write(header)
            out.truncate(len(header) + size)
        weight_map |= {name: file for name, _ in held}
    write_json(folder / INDEX, {"metadata": {}, "weight_map": weight_map})
    write_json(folder / "config.json", config)
    for path in tokenizer.iterdir():
        if "token" in path.name or path.suffix == ".jinja":
            shutil.copyfile(path, folder / path.name)
    return folder


def test_five_full_size_models_take_less_than_two_seconds(tmp_path: Path, anchor: Path) -> None:
    base = write_sparse(tmp_path / "base", "Qwen/Qwen2.5-7B-Instruct", anchor)
    data = read_json(base / "tokenizer.json")  # of the size of Qwen's
    data["model"]["vocab"] |= {f"token{number}": number for number in range(300, 151_643)}
    write_json(base / "tokenizer.json", data)
    experts = []
    for number in range(5):
        expert = write_sparse(tmp_path / str(number), "Qwen/Qwen2.5-Coder-7B-Instruct", base)
        if number:  # to be read and compared, each of them
            write_json(expert / "tokenizer.json", {**data, "version": str(number)})
        experts.append(expert)
    recipe = make_recipe(tmp_path, base, {"general": base, "math": experts[0]})
    first = recipe.experts[1]
    more = [first.model_copy(update={"name": f"e{i}", "model": str(folder)}) for i, folder in enumerate(experts)]
    recipe = recipe.model_copy(update={"experts": tuple(more)})
    check(recipe)  # imports
    started = time.perf_counter()
    found = check(recipe)
    seconds = time.perf_counter() - started
    assert not errors(found) and [finding.where for finding in found] == ["experts"]  # five: no GGUF
    print(f"{seconds:.2f} s")
    assert seconds < 2
