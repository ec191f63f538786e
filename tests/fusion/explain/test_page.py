"""The page of an explanation in a real browser, light and dark."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from playwright.sync_api import Browser

from fusion.checkpoint import Checkpoint
from fusion.encoding import load_tokenizer
from fusion.explain.explain import explain
from fusion.explain.explanation import Explanation, Opinion
from fusion.explain.page import DRAWN, page
from tests.browser import CONTRAST, WIDTHS, Opened, colours, contrast, linear, running_browser
from tests.fusion.explain.test_explain import OUT, fused

TEMPLATE = Path(__file__).parents[3] / "fusion" / "explain" / "page.html"
APART = 0.06  # OKLab distance; two colours side by side are told apart from about 0.02
TO_LMS = [[0.4122, 0.5363, 0.0514], [0.2119, 0.6807, 0.1074], [0.0883, 0.2817, 0.6300]]
TO_LAB = [[0.2105, 0.7936, -0.0041], [1.9780, -2.4286, 0.4506], [0.0259, 0.7828, -0.8087]]
EYES = {  # linear RGB as seen by others (Machado et al. 2009, severity 1)
    "most": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "protan": [[0.1523, 1.0526, -0.2049], [0.1145, 0.7863, 0.0992], [-0.0039, -0.0481, 1.0520]],
    "deutan": [[0.3673, 0.8606, -0.2280], [0.2801, 0.6725, 0.0474], [-0.0118, 0.0429, 0.9689]],
    "tritan": [[1.2555, -0.0767, -0.1788], [-0.0784, 0.9308, 0.1476], [0.0047, 0.6914, 0.3039]],
}


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_on_every_colour_at_every_strength(scheme: str) -> None:
    found = colours(TEMPLATE, scheme)
    experts = [found[f"expert-{i}"] for i in range(9)]
    for strength in np.linspace(0, 1, 21):
        for expert in experts:
            assert contrast(found["ink"], strength * expert + (1 - strength) * found["paper"]) >= CONTRAST
    for ground in ("paper", "card"):
        assert contrast(found["ink"], found[ground]) >= CONTRAST
        assert contrast(found["quiet"], found[ground]) >= CONTRAST


@pytest.mark.parametrize("eyes", EYES)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nine_experts_are_told_apart_by_all_eyes(scheme: str, eyes: str) -> None:
    rgb = linear(np.array([colours(TEMPLATE, scheme)[f"expert-{i}"] for i in range(9)]))
    seen = np.clip(rgb @ np.array(EYES[eyes]).T, 0, 1)
    lab = np.cbrt(seen @ np.array(TO_LMS).T) @ np.array(TO_LAB).T  # (experts, 3)
    distances = np.linalg.norm(lab[:, None] - lab[None], axis=2)
    assert distances[np.triu_indices(9, 1)].min() >= APART


@pytest.fixture(scope="module")
def explained(tmp_path_factory: pytest.TempPathFactory, anchor: Path, anchored_experts: dict[str, Path]) -> Explanation:
    """A prompt that tries to break out of the page, its answer, and a label that disagrees."""
    recipe = fused(tmp_path_factory.mktemp("page") / "run", anchor, anchored_experts, 2)
    asked = [{"role": "user", "content": f"Return JSON:\n\tname: Ann {OUT}"}]
    found = explain(Checkpoint(recipe.fused), load_tokenizer(recipe.fused), asked, '{"name": "Ann"}')
    rules = Opinion("rules", "math", "math", f"pattern: {OUT!r}", None, agrees=False)
    return replace(found, opinions=[rules])


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with running_browser() as found:
        yield found


def token_colours(it: Opened) -> list[str]:
    """The colour of every token."""
    script = "all => all.map(each => getComputedStyle(each).backgroundColor)"
    found: list[str] = it.page.locator(".token").evaluate_all(script)
    return found


@pytest.fixture
def opened(browser: Browser, explained: Explanation, tmp_path: Path) -> Iterator[Any]:
    """Opens the explanation at a width and in a scheme; at the end no page has said or asked for anything."""
    file, pages = tmp_path / "out.html", []
    file.write_text(page(explained), encoding="utf-8")

    def open_page(width: str = "desktop", scheme: str = "light", of: Path = file) -> Opened:
        pages.append(Opened(browser, of.as_uri(), width, scheme))
        return pages[-1]

    yield open_page
    for each in pages:
        assert not each.said and not each.asked
        each.page.close()


def test_the_slider_changes_the_colours_and_the_shares(opened: Any, explained: Explanation) -> None:
    it = opened()
    seen, slider = {tuple(token_colours(it))}, it.page.locator("#layer")
    slider.focus()
    for number, layer in enumerate(explained.layers, 1):
        slider.press("ArrowRight")
        assert it.page.locator("#layer-name").inner_text() == f"layer {layer}, {number} of {len(explained.layers)}"
        seen.add(tuple(token_colours(it)))
        shares = explained.shares_by_layer[number - 1]
        for row, name in zip(it.page.locator("#shares tbody tr").all(), explained.experts, strict=True):
            columns = (shares.prompt, shares.answer or {}, shares.everything)
            assert row.inner_text().split() == [name, *(f"{round(100 * share[name])}%" for share in columns)]
    assert len(seen) == 1 + len(explained.layers)


def test_the_keyboard_shows_the_weights_of_a_token(opened: Any, explained: Explanation) -> None:
    it = opened()
    it.page.locator("#layer").press("ArrowRight")
    for _ in range(2):  # past the box for the template, to the first token of the prompt
        it.page.keyboard.press("Tab")
    first = next(i for i, token in enumerate(explained.tokens) if token.part == "prompt")
    for number in (first, first + 1):
        said = it.page.locator("#token").inner_text()
        assert f"prompt, token {number + 1}, id {explained.tokens[number].id}; layer {explained.layers[0]}" in said
        rows = it.page.locator("#token tbody tr").all()
        for expert, (row, name) in enumerate(zip(rows, explained.experts, strict=True)):
            probability = explained.probabilities[0][number][expert]
            served = dict(zip(explained.chosen[0][number], explained.weights[0][number], strict=True))
            found, shown, weight = row.inner_text().split()
            assert found == name
            assert float(shown) == pytest.approx(probability, abs=0.001)
            assert (weight == "–") if expert not in served else float(weight) == pytest.approx(served[expert], abs=0.01)
        it.page.keyboard.press("ArrowRight")


def test_the_pointer_shows_them_too_and_the_template_can_be_seen(opened: Any, explained: Explanation) -> None:
    it = opened()
    last = it.page.locator(".answer .token").last
    last.hover()
    assert f"answer, token {len(explained.tokens)}," in it.page.locator("#token").inner_text()
    template = it.page.locator(".template .token").first
    assert not template.is_visible()
    it.page.locator("#whole").check()
    assert template.is_visible() and template.inner_text() == "<|im_start|>"


def test_what_lies_in_the_prompt_is_shown_as_it_is(opened: Any) -> None:
    it = opened()
    assert it.page.locator(".prompt .tokens").inner_text().replace("\u200b", "").endswith(OUT)
    assert (
        "math" in it.page.locator("#opinions").inner_text() and "disagrees" in it.page.locator("#opinions").inner_text()
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_it_fits_and_has_the_schemes_colours(opened: Any, tmp_path: Path, width: str, scheme: str) -> None:
    it = opened(width, scheme)
    ground = it.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert ground == f"rgb({', '.join(str(round(255 * value)) for value in colours(TEMPLATE, scheme)['paper'])})"
    across = it.page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert across[0] <= across[1]
    it.page.locator(".prompt .token").nth(3).hover()
    assert len(it.screenshot(f"explain-{width}-{scheme}", tmp_path)) > 10_000


def test_a_long_text_is_drawn_in_part_and_at_once(
    opened: Any, tmp_path: Path, anchor: Path, anchored_experts: dict[str, Path]
) -> None:
    recipe = fused(tmp_path / "long", anchor, anchored_experts, 1)
    asked = [{"role": "user", "content": "word " * 600}]
    found = explain(Checkpoint(recipe.fused), load_tokenizer(recipe.fused), asked)
    file = tmp_path / "long.html"
    file.write_text(page(found), encoding="utf-8")
    it = opened(of=file)
    assert it.page.locator(".token").count() == DRAWN
    left_out = f"{len(found.tokens) - DRAWN:,} tokens in the middle are not drawn"
    assert left_out in it.page.locator("#left-out").inner_text()
    painted = it.page.evaluate(
        "(() => { const begin = performance.now(); paint(); return performance.now() - begin; })()"
    )
    assert painted < 3000  # milliseconds; some 50 on an idle core
