"""An explanation as one HTML file: no other file, no address, nothing to build (page.html, with the data in it).

write_text(Path("out.html"), page(explanation))
"""

import json
from importlib.resources import files
from typing import Any

from fusion.explain.explanation import Explanation

DRAWN = 2000  # tokens at most: the first half and the last half of them
DIGITS = 3  # of probabilities and weights
PLACE = "__EXPLANATION__"  # in the template


def page(explanation: Explanation) -> str:
    """The page; whatever the prompt holds, it stays data."""
    head, tail = files("fusion.explain").joinpath("page.html").read_text(encoding="utf-8").split(PLACE)
    text = json.dumps(drawn(explanation), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return head + text + tail


def drawn(explanation: Explanation) -> dict[str, Any]:
    """What the page shows: the explanation, tokens numbered (`at`), without the middle of a long text."""
    count = len(explanation.tokens)
    kept = [i for i in range(count) if count <= DRAWN or i < DRAWN // 2 or i >= count - DRAWN // 2]
    data = explanation.as_dict()
    data["left_out"] = count - len(kept)
    data["tokens"] = [{**data["tokens"][i], "at": i} for i in kept]
    data["chosen"] = [[layer[i] for i in kept] for layer in explanation.chosen]
    for key in ("probabilities", "weights"):
        layers = getattr(explanation, key)
        data[key] = [[[round(value, DIGITS) for value in layer[i]] for i in kept] for layer in layers]
    return data
