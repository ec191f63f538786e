"""What the page is given: figures of the records, for operators alone; a page that explains, once it is drawn."""

import time
import urllib.request
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from serving.records.record import Feedback, RoutingRecord
from serving.records.store import opened
from serving.ui.overview import overview
from tests.serving.conftest import Guarded
from tests.serving.test_record_routes import ask, call
from tests.serving.test_records import recording

Start = Callable[..., Guarded]


def test_the_figures_are_those_of_the_records(tmp_path: Path) -> None:
    now = time.time()
    fine = RoutingRecord(
        "a", "/v1/chat/completions", 200, 100.0, time=now - 1, domain="math", channels={"rules": {"domain": "math"}},
        shares={"all": {"g": 0.0, "m": 1.0}}, completion_tokens=20,
    )  # fmt: skip
    wrong = replace(fine, request_id="b", ms=300.0, time=now - 130, shares={"all": {"g": 0.9, "m": 0.1}})
    failed = RoutingRecord(
        "c", "/v1/chat/completions", 422, 50.0, time=now - 131, domain="general", attempts=3, violations=["type"]
    )
    valid = replace(failed, request_id="d", status=200, attempts=1)
    said = [Feedback("b", "up"), Feedback("b", "down", "general"), Feedback("elsewhere", domain="math")]
    found = overview([fine, wrong, failed, valid], said, recording(tmp_path), 5)
    assert found["per_minute"] == [0, 0, 3, 0, 1] and found["requests"] == 4
    assert found["by_domain"]["math"] == {"requests": 2, "p50_ms": 200.0, "p95_ms": 290.0, "tokens_per_s": 100.0}
    assert found["expert_shares"] == {"g": 0.45, "m": 0.55} and found["shares_known"] == 2
    assert found["structured"] == {"requests": 2, "valid": 1, "attempts": 2.0} and found["errors"] == {"422": 1}
    assert [row["request_id"] for row in found["doubtful"]] == ["b", "c"] and found["misroutes"] == 2
    assert [row["said"] for row in found["recent"]] == [{}, {"rating": "up", "domain": "general"}, {}, {}]
    assert overview([], [], recording(tmp_path), 5)["all"]["p50_ms"] is None


@pytest.fixture
def guard(guarded: Start, tmp_path: Path) -> Guarded:
    told = recording(tmp_path, prompts=True)
    return guarded(recording=told, records={}, ui=True, api_keys=("one", "op"), operator_keys=("op",))


def test_the_page_is_open_and_its_data_are_for_operators(guard: Guarded) -> None:
    with urllib.request.urlopen(f"{guard.url}/ui") as answer:
        assert answer.headers["content-type"].startswith("text/html") and b"<html" in answer.read()
        assert "connect-src 'self'" in answer.headers["content-security-policy"]
    request_id = ask(guard, key="one").headers["x-request-id"]
    assert call(guard, "GET", f"/v1/routing/{request_id}", key="one")[0] == 200  # it is written
    assert call(guard, "GET", "/ui/overview")[0] == 401
    assert call(guard, "GET", "/ui/overview", key="one")[0] == 403
    status, found = call(guard, "GET", "/ui/overview?minutes=5", key="op")
    assert status == 200 and found["requests"] == 1 and found["recent"][0]["question"] == "What is 1+1?"
    for minutes in ("0", "x", "-1", "100000", "٣"):
        path = f"/ui/overview?minutes={urllib.request.quote(minutes)}"  # type: ignore[attr-defined]
        assert call(guard, "GET", path, key="op")[0] == 400


def test_a_page_is_asked_for_and_comes(guard: Guarded, tmp_path: Path) -> None:
    request_id = ask(guard, key="one").headers["x-request-id"]
    assert call(guard, "GET", f"/v1/routing/{request_id}", key="one")[0] == 200
    assert call(guard, "GET", f"/ui/explain/{request_id}", key="op") == (
        202,
        {"request_id": request_id, "page": "wanted"},
    )
    assert call(guard, "GET", f"/ui/explain/{request_id}", key="one")[0] == 403
    assert call(guard, "GET", "/ui/explain/none", key="op")[0] == 404
    with opened(recording(tmp_path).url) as store:
        [(number, wanted, _)] = store.waiting(5)
        assert wanted == "page"
        store.fill(number, page="<html>é")
    request = urllib.request.Request(f"{guard.url}/ui/explain/{request_id}", headers={"authorization": "Bearer op"})
    with urllib.request.urlopen(request) as answer:
        assert answer.read().decode() == "<html>é"


def test_without_the_key_in_the_recipe_there_is_no_page(guarded: Start, tmp_path: Path) -> None:
    guard = guarded(recording=recording(tmp_path))
    for path in ("/ui", "/ui/overview", "/ui/explain/a"):
        assert call(guard, "GET", path)[0] == 404
