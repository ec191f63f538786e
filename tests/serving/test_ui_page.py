"""The page of live traffic in a real browser, on a guard that answers real requests from a script."""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from playwright.sync_api import Browser, Locator, expect

from fusion.explain import page as explain_page
from fusion.explain.explanation import Explanation, LayerGroup, Shares, Token
from serving.records.record import Feedback, RoutingRecord
from serving.records.settings import Recording
from serving.records.store import Store, opened
from tests.browser import CONTRAST, WIDTHS, Opened, colours, contrast, running_browser
from tests.serving.conftest import Guarded
from tests.serving.test_record_routes import FORMAT, ask, call, with_routes
from tests.serving.test_records import DOMAINS, recording
from tests.serving.upstream import completion

Start = Callable[..., Guarded]
HERE = Path(__file__).parents[2]
TEMPLATE, OTHER = HERE / "serving" / "ui" / "page.html", HERE / "fusion" / "explain" / "page.html"
HOSTILE = "1 <img src=x onerror=alert(1)> </script><script>alert(2)</script> &lt;b&gt; ' \" ${x}"
ASIDE = "<p>seen</p><script>try { parent.document; } catch { document.body.append('apart'); }</script>"
EDGE = 3.0  # WCAG 2 AA for what shows where a control is
KEYED: dict[str, Any] = {"api_keys": ("one", "op"), "operator_keys": ("op",)}
EXPERTS = ("general", "coding", "math", "multilingual", "structured")
SEEN = """
() => [...document.querySelectorAll("body *")].filter((each) => each.checkVisibility()).flatMap((each) => {
  const said = [...each.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
  const control = each.matches("button, select, input[type=password]");
  if (!said && !control) return [];
  let ground = each;
  while (getComputedStyle(ground).backgroundColor === "rgba(0, 0, 0, 0)") ground = ground.parentElement;
  const around = getComputedStyle(each.parentElement.closest("form, li, body")).backgroundColor;
  const body = getComputedStyle(document.body).backgroundColor;
  const style = getComputedStyle(each);
  return [{what: each.outerHTML.slice(0, 80), ink: style.color, ground: getComputedStyle(ground).backgroundColor,
    edge: control ? style.borderTopColor : null, around: around === "rgba(0, 0, 0, 0)" ? body : around}];
})
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with running_browser() as found:
        yield found


@pytest.fixture
def told(tmp_path: Path) -> Recording:
    """Two domains, whose experts are the other way round: what the script's engine does looks misrouted."""
    found = recording(tmp_path, prompts=True, engine_routes=True)
    return replace(found, expert_of={"math": "g", "general": "m"})


@pytest.fixture
def guard(guarded: Start, told: Recording) -> Guarded:
    return guarded(with_routes(completion('{"a": 1}')), recording=told, records={}, ui=True)


@pytest.fixture
def store(told: Recording) -> Iterator[Store]:
    with opened(told.url) as found:
        yield found


@pytest.fixture
def visit(browser: Browser) -> Iterator[Callable[..., Opened]]:
    """Opens a guard's page; at the end none has run into an error, or has asked for anything elsewhere."""
    pages: list[tuple[Guarded, Opened]] = []

    def open_page(guard: Guarded, width: str = "desktop", scheme: str = "light") -> Opened:
        pages.append((guard, Opened(browser, f"{guard.url}/ui", width, scheme)))
        return pages[-1][1]

    yield open_page
    for guard, it in pages:
        status = "Failed to load resource: "  # the browser's own words for an answer that is an error
        assert [said for said in it.said if not said.startswith(status)] == []
        assert it.asked and all(url.startswith((f"{guard.url}/", "about:srcdoc", "data:,")) for url in it.asked)
        it.page.close()


def asked(guard: Guarded, *questions: str, key: str = "none") -> list[str]:
    """The ids of requests that have been made and written down."""
    made = []
    for question in questions:
        answer = ask(guard, key, messages=[{"role": "user", "content": question}])
        made.append(answer.headers["x-request-id"])
        assert call(guard, "GET", f"/v1/routing/{made[-1]}", key=None if key == "none" else key)[0] == 200
    return made


def rows(it: Opened, table: str) -> list[list[str]]:
    """The texts of a table's cells."""
    script = "rows => rows.map(row => [...row.cells].map(cell => cell.innerText))"
    found: list[list[str]] = it.page.locator(f"{table} tr").evaluate_all(script)
    return found


def request(it: Opened, number: int = 0, among: str = "doubtful") -> Locator:
    """A listed request, the newest first."""
    return it.page.locator(f"#{among} .requests > li").nth(number)


def refreshed(it: Opened) -> None:
    """Returns when the page has drawn itself anew."""
    it.page.evaluate("refresh()")


def figure(cell: str) -> float:
    return float(cell.replace(",", ""))


def test_the_pages_numbers_are_the_overviews(guard: Guarded, visit: Any) -> None:
    asked(guard, "What is 1+1?", "2+2=", "Who are you?")
    ask(guard, response_format=FORMAT)
    guard.upstream.script[:] = [completion("no JSON")]
    with pytest.raises(openai.UnprocessableEntityError) as caught:
        ask(guard, response_format=FORMAT)
    assert call(guard, "GET", f"/v1/routing/{caught.value.response.headers['x-request-id']}")[0] == 200
    status, found = call(guard, "GET", "/ui/overview?minutes=60")
    assert status == 200 and found["requests"] == 5 and found["structured"]["requests"] == 2

    it = visit(guard)
    expect(it.page.locator("h1")).to_have_text("5 requests in the last 60 minutes")
    figures = {**found["by_domain"], "all": found["all"]}
    for (name, *cells), (known, each) in zip(rows(it, "#domains") + rows(it, "#all"), figures.items(), strict=True):
        assert name == known
        for cell, key in zip(cells, ("requests", "p50_ms", "p95_ms", "tokens_per_s"), strict=True):
            assert figure(cell) == pytest.approx(each[key], abs=0.05 if each[key] < 100 else 0.5)
    assert rows(it, "#experts") == [[name, f"{round(100 * s)}%"] for name, s in found["expert_shares"].items()]
    assert f"{found['shares_known']} of 5 requests" in it.page.locator("#shares-known").inner_text()
    assert it.page.locator("#shares").get_attribute("aria-label") == "g 25%, m 75%"
    assert rows(it, "#outcomes") == [
        ["structured", "1 valid of 2"],
        ["mean attempts", str(found["structured"]["attempts"]).removesuffix(".0")],
        ["status 422", "1"],
    ]
    for among in ("doubtful", "recent"):
        assert it.page.locator(f"#{among} .requests > li").count() == len(found[among]) > 0
        for number, each in enumerate(found[among]):
            assert request(it, number, among).locator(".question").inner_text() == each["question"]
    assert it.page.locator("#doubtful h2").inner_text() == f"Looks misrouted: {found['misroutes']}"
    bars = it.page.locator("#bars i").evaluate_all("all => all.map(each => each.style.getPropertyValue('--part'))")
    counted = it.page.evaluate("shown.per_minute")
    assert len(bars) == len(counted) == 60 and sum(counted) == 5
    assert bars == [f"{100 * count / max(counted):.15g}%" for count in counted]
    with it.page.expect_request("**/ui/overview?minutes=1440"):
        it.page.get_by_label("24 h").check()
    expect(it.page.locator("h1")).to_have_text("5 requests in the last 24 hours")
    assert it.page.locator("#bars i").count() == 60


def test_what_a_request_holds_is_text(guard: Guarded, visit: Any) -> None:
    asked(guard, HOSTILE)
    it = visit(guard)
    for among in ("doubtful", "recent"):
        expect(request(it, 0, among).locator(".question")).to_have_text(HOSTILE)
    assert it.page.locator("main img, main script").count() == 0 and not it.said


def test_a_request_is_corrected_by_keyboard_alone(guard: Guarded, visit: Any, store: Store) -> None:
    [first] = asked(guard, "What is 1+1?")
    it = visit(guard)
    expect(request(it)).to_be_visible()
    row, select = request(it), request(it).get_by_label("right domain")
    for _ in range(20):
        it.page.keyboard.press("Tab")
        if select.evaluate("each => each === document.activeElement"):
            break
    it.page.keyboard.press("Tab")
    it.page.keyboard.press("Enter")
    expect(row.get_by_role("status")).to_have_text("Choose the right domain first.")
    expect(select).to_be_focused()
    it.page.keyboard.press("g")  # as in general
    it.page.keyboard.press("Tab")
    it.page.keyboard.press("Enter")
    expect(row.get_by_role("status")).to_have_text("✓ right domain: general")
    it.page.keyboard.press("Tab")
    it.page.keyboard.press("Tab")
    it.page.keyboard.press("Space")
    expect(row.get_by_label("thumb down")).to_have_attribute("aria-pressed", "true")
    thumb, said = store.feedback()
    assert (thumb.request_id, thumb.rating, thumb.domain) == (first, "down", None)
    assert (said.request_id, said.domain, said.routed["expert"]) == (first, "general", "m")
    it.page.reload()
    for among in ("doubtful", "recent"):
        expect(request(it, 0, among)).to_have_class("answered")
        expect(request(it, 0, among).get_by_role("status")).to_have_text("✓ right domain: general, thumb down")


def test_a_label_is_confirmed_with_one_click(guard: Guarded, visit: Any, store: Store) -> None:
    [first] = asked(guard, "What is 1+1?")
    it = visit(guard)
    request(it).get_by_role("button", name="math is right").click()
    expect(request(it).get_by_role("status")).to_have_text("✓ right domain: math")
    [said] = store.feedback()
    assert (said.request_id, said.domain) == (first, "math")
    expect(request(it, 0, "recent").get_by_role("button", name="math is right")).to_be_hidden()


def test_an_answer_that_is_not_kept_is_told(guarded: Start, told: Recording, visit: Any, store: Store) -> None:
    guard = guarded(with_routes(completion("2")), recording=told, records={}, ui=True, requests_per_minute=1)
    asked(guard, "What is 1+1?")
    it = visit(guard)
    request(it).get_by_label("thumb up").click()
    expect(request(it).get_by_role("status")).to_have_text("Not kept. More than 1 requests within a minute.")
    assert store.feedback() == []


def test_the_reader_is_not_disturbed(guard: Guarded, visit: Any) -> None:
    asked(guard, "What is 1+1?")
    it = visit(guard)
    select, note = request(it).get_by_label("right domain"), it.page.locator("#doubtful .note")
    select.select_option("math")
    select.focus()
    before = request(it).bounding_box()
    asked(guard, "3+3=")
    refreshed(it)
    expect(note).to_have_text("1 newer request not shown while you are here")
    expect(it.page.locator("h1")).to_have_text("2 requests in the last 60 minutes")
    expect(select).to_be_focused()
    assert select.input_value() == "math" and request(it).bounding_box() == before
    assert it.page.locator("#recent .requests > li").count() == 2  # nobody is there
    it.page.locator("#doubtful .show").click()
    expect(it.page.locator("#doubtful h2")).to_be_focused()
    assert request(it).locator(".question").inner_text() == "3+3="
    assert request(it, 1).get_by_label("right domain").input_value() == "math"


def test_it_refreshes_by_itself_unless_paused_and_tells_where_the_server_is_gone(guard: Guarded, visit: Any) -> None:
    it = visit(guard)
    expect(it.page.locator("#empty")).to_contain_text(f"{guard.url}/v1/chat/completions")
    asked(guard, "What is 1+1?")
    expect(it.page.locator("h1")).to_have_text("1 request in the last 60 minutes", timeout=20_000)
    it.page.context.set_offline(True)
    for wait in (5, 10, 20):
        refreshed(it)
        trouble = it.page.locator("#trouble").inner_text()
        said, again = trouble.split(" Trying again at ")
        ahead = datetime.strptime(again, "%H:%M:%S.") - datetime.strptime(time.strftime("%H:%M:%S"), "%H:%M:%S")
        assert said == "The server does not answer." and wait - 3 < ahead.seconds
    expect(request(it)).to_be_visible()
    it.page.context.set_offline(False)
    it.page.get_by_role("button", name="refresh").click()
    expect(it.page.locator("#trouble")).to_be_empty()
    it.page.get_by_role("button", name="pause").click()
    expect(it.page.locator("#as-of")).to_contain_text("paused")
    seen = len(it.asked)
    it.page.wait_for_timeout(6000)
    assert len(it.asked) == seen


def explanation() -> Explanation:
    """Of two tokens, in one layer of two experts."""
    shares = Shares({"g": 0.0, "m": 1.0}, None, {"g": 0.0, "m": 1.0})
    tokens = [Token(5, "1+1", "1+1", "prompt"), Token(6, "=", "=", "prompt")]
    return Explanation(
        "demo", ["g", "m"], 1, [1], tokens, [[[0.1, 0.9], [0.2, 0.8]]], [[[1], [1]]], [[[1.0], [1.0]]], "prompt", "m",
        0.85, 0.6, shares, [shares], [LayerGroup("late", [1], shares)], [], [],
    )  # fmt: skip


@pytest.mark.parametrize("real", [False, True])
def test_an_explanation_is_waited_for_and_shown_apart(guard: Guarded, visit: Any, store: Store, real: bool) -> None:
    asked(guard, "What is 1+1?")
    it = visit(guard)
    button, dialog = request(it).get_by_role("button", name="explain"), it.page.locator("dialog")
    button.click()
    expect(dialog.get_by_role("status")).to_contain_text("being computed")
    it.page.keyboard.press("Escape")
    expect(dialog).to_be_hidden()
    expect(button).to_be_focused()
    button.press("Enter")
    expect(dialog.get_by_role("status")).to_contain_text("being computed")
    [(number, wanted, _)] = store.waiting(5)
    assert wanted == "page"
    store.fill(number, page=explain_page.page(explanation()) if real else ASIDE)
    frame = it.page.frame_locator("#explained")
    expect(frame.locator("body")).to_contain_text("m took 100% of the prompt" if real else "seenapart", timeout=20_000)
    expect(dialog.get_by_role("status")).to_be_hidden()
    frame.locator("body").click()
    it.page.keyboard.press("Escape")  # in the frame
    expect(dialog).to_be_hidden()
    expect(button).to_be_focused()


def test_what_is_kept_without_text_can_not_be_explained(guarded: Start, tmp_path: Path, visit: Any) -> None:
    guard = guarded(recording=recording(tmp_path), records={}, ui=True)
    asked(guard, "What is 1+1?")
    it = visit(guard)
    expect(request(it, 0, "recent").locator(".question")).to_have_text("text not kept")
    expect(request(it, 0, "recent").get_by_role("button", name="explain")).to_be_hidden()


def test_the_data_are_for_operators_keys(guarded: Start, told: Recording, visit: Any) -> None:
    guard = guarded(with_routes(completion("2")), recording=told, records={}, ui=True, **KEYED)
    asked(guard, "What is 1+1?", key="one")
    it = visit(guard)
    key, state = it.page.get_by_label("An operator's key"), it.page.locator("#key-state")

    def nothing_is_shown() -> None:
        expect(key).to_be_focused()
        expect(it.page.locator("main")).to_be_hidden()
        assert "1+1" not in it.page.content() and it.page.evaluate("Object.keys(sessionStorage)") == []

    nothing_is_shown()
    for given, said in (
        ("three", "This key is not known here."),
        ("one", "This key is not an operator's."),
        ("钥匙", "A key has no spaces and no letters beyond ASCII."),
    ):
        key.fill(given)
        key.press("Enter")
        expect(state).to_have_text(said)
        expect(key).to_be_focused()
        assert "1+1" not in it.page.content() and it.page.evaluate("Object.keys(sessionStorage)") == []
    key.fill(" op ")
    it.page.get_by_role("button", name="show the traffic").click()
    expect(it.page.locator("h1")).to_be_focused()
    expect(request(it).locator(".question")).to_have_text("What is 1+1?")
    request(it).get_by_label("thumb up").click()
    expect(request(it).get_by_role("status")).to_have_text("✓ thumb up")
    it.page.reload()
    expect(request(it).locator(".question")).to_have_text("What is 1+1?")
    it.page.get_by_role("button", name="forget the key").click()
    expect(state).to_have_text("The key is forgotten.")
    nothing_is_shown()
    it.page.reload()
    nothing_is_shown()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_an_expert_has_the_colour_that_it_has_on_the_page_that_explains(scheme: str) -> None:
    mine, other = colours(TEMPLATE, scheme), colours(OTHER, scheme)
    assert other.keys() <= mine.keys() and all((mine[name] == other[name]).all() for name in other)


@pytest.fixture
def busy(guarded: Start, told: Recording, store: Store) -> Guarded:
    """A guard with a day of traffic behind it: five domains and experts, errors, long and hostile texts."""
    rng, now = np.random.default_rng(0), time.time()
    texts = [
        "17+25=",
        HOSTILE,
        "Translate into French: " + "a very long sentence, " * 30,
        "w" * 300,
        "写一个函数：返回 JSON",
    ]
    records = []
    for i in range(600):
        domain = EXPERTS[rng.integers(5)]
        served = EXPERTS[rng.integers(5)] if i % 17 == 0 else domain
        share = {name: 0.0125 for name in EXPERTS} | {served: 0.95}
        said = {"domain": domain, "evidence": r"pattern: '\\d+ *[-+*] *\\d+|计算'", "confidence": 1.0}
        records.append(RoutingRecord(
            f"{i:032x}", "/v1/chat/completions", 422 if i % 40 == 7 else 504 if i % 90 == 5 else 200,
            round(float(rng.lognormal(6, 1)), 2), time=now - (600 - i) ** 1.3, attempts=3 if i % 40 == 7 else i % 2,
            completion_tokens=int(rng.integers(5, 60)), domain=domain, channel="rules", evidence=said["evidence"],
            channels={"rules": said}, shares={"all": share} if i % 3 else {},
            asked=[{"role": "user", "content": texts[i % 5]}] if i % 7 else None,
        ))  # fmt: skip
    store.add(records)
    store.add_feedback([Feedback(records[i].request_id, "down", "math") for i in (595, 578, 561)])
    five = replace(
        told,
        domains=dict.fromkeys(EXPERTS, DOMAINS["general"]),
        experts=EXPERTS,
        expert_of={name: name for name in EXPERTS},
    )
    return guarded(recording=five, records={}, ui=True)


def rgb(css: str) -> np.ndarray:
    return np.array([float(part) for part in css[css.index("(") + 1 : -1].split(",")[:3]]) / 255


def readable(it: Opened) -> int:
    """How many texts and controls there are; all can be told from their ground, and none reaches beyond the window."""
    across = it.page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert across[0] <= across[1]
    found = it.page.evaluate(SEEN)
    for each in found:
        assert contrast(rgb(each["ink"]), rgb(each["ground"])) >= CONTRAST, each
        assert each["edge"] is None or contrast(rgb(each["edge"]), rgb(each["around"])) >= EDGE, each
    return len(found)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_it_fits_and_can_be_read(busy: Guarded, visit: Any, tmp_path: Path, width: str, scheme: str) -> None:
    it = visit(busy, width, scheme)
    expect(it.page.locator("#recent .requests > li")).to_have_count(20)
    assert readable(it) > 200
    assert len(it.screenshot(f"ui-{width}-{scheme}", tmp_path, full_page=True)) > 10_000
    height = it.page.evaluate("document.documentElement.scrollHeight")
    refreshed(it)
    assert it.page.evaluate("document.documentElement.scrollHeight") == height


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_form_and_the_empty_page_can_be_read(
    guarded: Start, told: Recording, visit: Any, tmp_path: Path, scheme: str
) -> None:
    for name, keys in (("key", KEYED), ("empty", {})):
        it = visit(guarded(recording=told, records={}, ui=True, **keys), "narrow", scheme)
        expect(it.page.locator("#key-form" if keys else "#empty")).to_be_visible()
        assert readable(it) > 5
        it.screenshot(f"ui-{name}-{scheme}", tmp_path)
