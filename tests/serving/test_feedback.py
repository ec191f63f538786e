"""Feedback as rows: the newest word on a question, answers of the right expert alone, out of one store into another."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fusion.cli import app
from fusion.recipe import Recipe
from serving.records.feedback import export, listed, markdown, misrouted_rows, newest, remove, rows_of, take_in
from serving.records.record import Feedback, RoutingRecord
from serving.records.settings import store_url
from serving.records.store import opened
from tests.recipes import make_recipe

ASKED = [{"role": "user", "content": "How many are 1 and 1?"}]
OF = {"math": "math", "general": "general"}
ROUTED = {"domain": "general", "channel": "rules", "expert": "general"}
UP = Feedback("a", "up", messages=ASKED, answer="2", routed=ROUTED, time=1.0)
RIGHT = Feedback("b", "down", "math", "a sum", messages=ASKED, answer="hello", routed=ROUTED, time=2.0)
MISROUTED = RoutingRecord(
    "c", "/v1/chat/completions", 200, 1.0, domain="math", channel="rules", channels={"rules": {"domain": "math"}},
    shares={"all": {"general": 0.9, "math": 0.1}},
    asked=[{"role": "user", "content": "2+2"}], answered="hello",
)  # fmt: skip


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return make_recipe(tmp_path, tmp_path, {"general": tmp_path, "math": tmp_path})


def test_a_row_has_the_right_domain_and_no_answer_of_the_wrong_expert() -> None:
    confirmed, corrected = rows_of([UP, RIGHT], OF)
    assert confirmed["domain"] == "general" and confirmed["messages"][-1] == {"role": "assistant", "content": "2"}
    assert corrected["domain"] == "math" and corrected["messages"] == [*ASKED, {"role": "assistant", "content": ""}]
    assert corrected["provenance"]["routed"] == ROUTED and corrected["provenance"]["comment"] == "a sum"
    served = replace(RIGHT, routed={"domain": "math", "channel": "rules", "expert": "general"})
    assert rows_of([served], OF)[0]["messages"][-1]["content"] == ""  # labelled right, served by another
    known = replace(RIGHT, routed={"domain": "general", "channel": "default", "expert": "math"})
    assert rows_of([known], OF)[0]["messages"][-1]["content"] == "hello"  # the right one has answered
    silent = [replace(UP, rating="down"), replace(UP, rating=None, comment="x"), replace(RIGHT, messages=None)]
    assert rows_of(silent, OF) == []


def test_the_newest_word_on_a_question_counts() -> None:
    assert newest(rows_of([RIGHT, UP], OF)) == newest(rows_of([UP, RIGHT], OF)) == rows_of([RIGHT], OF)


def test_a_thumb_up_confirms_who_has_served() -> None:
    by_math = {"domain": "general", "channel": "default", "expert": "math"}
    assert rows_of([replace(UP, routed=by_math)], OF)[0]["domain"] == "math"
    nobody_knows = {"domain": "general", "channel": "default", "expert": None}
    assert rows_of([replace(UP, routed=nobody_knows)], OF) == []
    ruled = {"domain": "math", "channel": "rules", "expert": None}
    assert rows_of([replace(UP, routed=ruled)], OF)[0]["domain"] == "math"


def test_misroutes_are_rows_by_their_label() -> None:
    disputed = {**MISROUTED.channels, "classifier": {"domain": "general"}}
    others = [replace(MISROUTED, asked=None), replace(MISROUTED, channels=disputed), replace(MISROUTED, channels={})]
    [row] = misrouted_rows([MISROUTED, *others], OF)
    assert row["domain"] == "math" and row["provenance"]["suspicions"] == ["labelled math, served by general"]
    assert misrouted_rows([MISROUTED], {"math": "general"}) == []


@pytest.mark.parametrize(
    "provenance",
    [None, "x", [], {"time": "x", "routed": "x", "rating": {}, "comment": 7, "request_id": None}, {"time": None}],
)
def test_a_rows_provenance_may_be_anything(recipe: Recipe, tmp_path: Path, provenance: object) -> None:
    row = {"messages": [*ASKED, {"role": "assistant", "content": "two"}], "domain": "math", "provenance": provenance}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row), encoding="utf-8")
    assert take_in(recipe, tmp_path / "rows.jsonl") == 1
    [kept] = export(recipe, tmp_path / "out.jsonl")
    assert kept["messages"] == row["messages"] and kept["domain"] == "math"  # whoever labels a row answers for it
    assert remove(recipe, kept["provenance"]["request_id"]) == 1


def test_out_of_one_store_and_into_another(recipe: Recipe, tmp_path: Path) -> None:
    with opened(store_url(recipe)) as store:
        store.add([MISROUTED])
        store.add_feedback([UP, RIGHT])
    out = tmp_path / "rows.jsonl"
    assert [row["domain"] for row in export(recipe, out)] == ["math"]
    assert [row["messages"][0]["content"] for row in export(recipe, out, misroutes=True)] == [
        ASKED[0]["content"],
        "2+2",
    ]
    other = recipe.model_copy(update={"output": str(tmp_path / "other")})
    assert take_in(other, out) == 2 and take_in(other, out) == 0
    again = tmp_path / "again.jsonl"
    export(other, again)
    both = [
        [(row["messages"], row["domain"]) for row in map(json.loads, file.read_text().splitlines())]
        for file in (out, again)
    ]
    assert both[0] == both[1]
    found = listed(recipe, 5)
    assert [row["request_id"] for row in found["feedback"]] == ["b", "a"]
    assert [row["request_id"] for row in found["misroutes"]] == ["c"]
    assert found["feedback"][0]["question"] == ASKED[0]["content"]
    assert "labelled math, served by general" in markdown(found) and ASKED[0]["content"] in markdown(found)


def test_the_commands(tmp_path: Path, recipe: Recipe) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.model_dump_json(exclude_defaults=True), encoding="utf-8")
    run = CliRunner().invoke
    assert run(app, ["feedback", "export", str(path)]).exit_code == 1  # a UserError, which `main` turns into a sentence
    with opened(store_url(recipe)) as store:
        store.add_feedback([RIGHT])
    assert run(app, ["feedback", "export", str(path)]).exit_code == 0
    rows = (recipe.folder / "exported-feedback.jsonl").read_text().splitlines()
    assert len(rows) == 1
    told = run(app, ["feedback", "list", str(path), "--json", "-"])
    assert json.loads(told.stdout)["feedback"][0]["comment"] == "a sum"
    assert run(app, ["feedback", "import", str(path), str(recipe.folder / "exported-feedback.jsonl")]).exit_code == 0
