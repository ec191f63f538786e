"""The preflight as a whole: what a plan gives, where its errors point, and what it reads of full-size models."""

import json
from pathlib import Path

import pytest

from fusion import road
from fusion.architecture import is_mlp
from fusion.bench.models import sparse
from fusion.errors import UserError
from fusion.plan.findings import Finding, raise_on_error, worst_first
from fusion.plan.models import describe_anchor
from fusion.plan.preflight import check
from fusion.recipe import Recipe
from fusion.recipe_file import load_recipe
from fusion.sources import trained_anchor
from tests.fusion.plan.planning import change_config, change_tensors, errors, findings
from tests.recipes import make_recipe, recipe_data

FIVE = Path(__file__).parents[3] / "configs" / "qwen2.5-7b-five-experts.yaml"


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


def bytes_read() -> int:
    """What this process has read so far, from files or their caches."""
    return int(Path("/proc/self/io").read_text(encoding="ascii").split("rchar: ")[1].split()[0])


def test_five_full_size_models_are_planned_from_kilobytes(tmp_path: Path, anchor: Path) -> None:
    sparse(tmp_path / "models", 5, str(anchor))  # real headers, holes for data
    folders = sorted((tmp_path / "models").iterdir())
    assert sum(path.stat().st_size for path in (tmp_path / "models").rglob("*.safetensors")) > 76e9
    recipe = make_recipe(tmp_path, folders[0], {"general": folders[0], "math": folders[1]})
    first = recipe.experts[1]
    more = [first.model_copy(update={"name": f"e{i}", "model": str(folder)}) for i, folder in enumerate(folders)]
    recipe = recipe.model_copy(update={"experts": tuple(more)})
    check(recipe)  # imports
    before = bytes_read()
    found = check(recipe)
    assert bytes_read() - before < 50e6  # headers, configs, tokenizers, and samples of the weights
    assert not errors(found) and [finding.where for finding in found] == ["experts"]  # five: no GGUF
