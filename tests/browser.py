"""Pages in a real browser (Debian's chromium, driven by Playwright), and the colours of their templates.

    with running_browser() as browser:
        page = Opened(browser, "http://127.0.0.1:8000/ui", "phone", "dark").page

QWEN_FUSION_SCREENSHOTS=FOLDER keeps the screenshots.
"""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from playwright.sync_api import Browser, Page, sync_playwright

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
WIDTHS = {"desktop": (1280, 860), "phone": (390, 844), "narrow": (360, 640)}
CONTRAST = 4.5  # WCAG 2 AA for text


@contextmanager
def running_browser() -> Iterator[Browser]:
    """A headless browser; the test is skipped where this machine has none."""
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine (Debian: apt-get install chromium)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class Opened:
    """A page that is open, what it said on the console and which addresses it asked for, after its own."""

    def __init__(self, browser: Browser, url: str, width: str = "desktop", scheme: Any = "light") -> None:
        across, down = WIDTHS[width]
        self.page: Page = browser.new_page(viewport={"width": across, "height": down}, color_scheme=scheme)
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("dialog", lambda dialog: self.said.append(dialog.message))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(url)
        self.asked.remove(url)

    def screenshot(self, name: str, otherwise: Path, **options: Any) -> bytes:
        """The picture, in the folder that is asked for, or in `otherwise`."""
        kept = Path(os.environ.get("QWEN_FUSION_SCREENSHOTS") or otherwise)
        return self.page.screenshot(path=kept / f"{name}.png", **options)


def colours(template: Path, scheme: str) -> dict[str, np.ndarray]:
    """A template's colours in one scheme, sRGB from 0 to 1."""
    light, dark = re.findall(r":root \{(.*?)\}", template.read_text(encoding="utf-8"), re.DOTALL)
    found = re.findall(r"--([a-z0-9-]+): #([0-9a-f]{6})", light if scheme == "light" else dark)
    return {name: np.array(list(bytes.fromhex(code))) / 255 for name, code in found}


def linear(colour: np.ndarray) -> np.ndarray:
    """sRGB as light, both from 0 to 1."""
    return np.where(colour <= 0.04045, colour / 12.92, ((colour + 0.055) / 1.055) ** 2.4)


def contrast(one: np.ndarray, other: np.ndarray) -> float:
    """The contrast of two colours by WCAG 2, from 1 to 21."""
    low, high = sorted(float(linear(colour) @ [0.2126, 0.7152, 0.0722]) for colour in (one, other))
    return (high + 0.05) / (low + 0.05)
