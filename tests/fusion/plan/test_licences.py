"""Licences: as the recipe, the model's card or the recorded facts say, and what follows from them."""

from pathlib import Path
from typing import Any

import pytest

from fusion.merge import merge
from fusion.plan.findings import Finding
from fusion.plan.licences import licence, non_commercial
from fusion.plan.preflight import check
from fusion.recipe import Recipe
from tests.recipes import recipe_data


def card(folder: Path, front: str) -> None:
    (folder / "README.md").write_text(f"---\n{front}\n---\n# A model\n", encoding="utf-8")


def recipe(folder: Path, anchor: Path, other: Path, stated: str | None = None, **sections: Any) -> Recipe:
    data = recipe_data(folder, anchor, {"general": anchor, "math": other}, **sections)
    data["experts"][1]["license"] = stated
    return Recipe.model_validate(data)


@pytest.mark.parametrize(
    ("name", "forbids"),
    [
        ("mit", False),
        ("apache-2.0", False),
        ("cc-by-4.0", False),
        ("cc-by-nc-4.0", True),
        ("cc-by-nc-sa-4.0", True),
        ("NonCommercial", True),
        ("qwen-research", True),
        ("tongyi-qianwen-research", True),
        ("ncsa", False),
        (None, False),
    ],
)
def test_which_licences_forbid_commercial_use(name: str | None, forbids: bool) -> None:
    assert non_commercial(name) == forbids


@pytest.mark.parametrize(
    ("front", "found"),
    [
        ("license: apache-2.0", "apache-2.0"),
        ("license: other\nlicense_name: qwen-research", "qwen-research"),
        ("license: [mit, apache-2.0]", "mit"),
        ("language: en", None),
        ("license: [", None),
    ],
)
def test_a_models_card_is_read(tmp_path: Path, front: str, found: str | None) -> None:
    card(tmp_path, front)
    assert licence(None, tmp_path) == found


def test_what_no_card_says_is_recorded() -> None:
    assert licence("Qwen/Qwen2.5-3B-Instruct", None) == "qwen-research"
    assert licence("Qwen/Qwen2.5-72B-Instruct", None) == "qwen"
    assert licence("Qwen/Qwen2.5-7B-Instruct", None) == "apache-2.0"
    assert licence("someone/else", None) is None


@pytest.mark.parametrize(
    ("stated", "front", "severities"),
    [
        ("mit", None, []),
        ("mit", "license: MIT", []),
        ("cc-by-nc-4.0", None, ["warning"]),
        (None, "license: other\nlicense_name: qwen-research", ["warning"]),
        (None, "license: other\nlicense_name: qwen", ["note"]),
        ("apache-2.0", "license: mit", ["warning"]),
        ("apache-2.0", "license: cc-by-nc-4.0", ["warning", "warning"]),
    ],
)
def test_what_follows_from_an_experts_licence(
    tmp_path: Path, anchor: Path, other: Path, stated: str | None, front: str | None, severities: list[str]
) -> None:
    if front:
        card(other, front)
    found: list[Finding] = check(recipe(tmp_path, anchor, other, stated))
    assert [finding.severity for finding in found] == severities
    assert all(finding.where == "expert 'math'" for finding in found)


def test_the_anchors_licence_counts_as_well(tmp_path: Path, anchor: Path, other: Path) -> None:
    card(other, "license: cc-by-nc-4.0")
    (finding, _) = check(recipe(tmp_path, other, anchor))  # the general expert is the anchor: twice
    assert finding.where == "anchor" and "cc-by-nc-4.0 is not for commercial use" in finding.what


def test_the_recipes_own_licence_does_not_change_it(tmp_path: Path, anchor: Path, other: Path) -> None:
    (finding,) = check(recipe(tmp_path, anchor, other, "cc-by-nc-4.0", license="apache-2.0"))
    assert "whatever the recipe's own licence apache-2.0 says" in finding.why


def test_the_card_of_the_fused_model_names_what_is_not_for_commercial_use(
    tmp_path: Path, anchor: Path, other: Path
) -> None:
    words = "Not for commercial use"
    text = (merge(recipe(tmp_path, anchor, other, "mit")) / "README.md").read_text(encoding="utf-8")
    assert words not in text
    card(other, "license: other\nlicense_name: qwen-research")
    text = (merge(recipe(tmp_path, anchor, other)) / "README.md").read_text(encoding="utf-8")
    assert f"{words}: math (qwen-research)." in text
    assert "| qwen-research |" in text
