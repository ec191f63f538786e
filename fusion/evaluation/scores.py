"""Task scores: how right one answer is, from 0 to 1, for each way an example can be scored.

`exact_match`, `exact_values` (JSON, YAML or XML against a reference value), `function_calls` (names and values),
`number`, `tests_passed` (Python in a sandbox), `chrf`. An expert is judged by these, never by its loss alone. Score one
answer from the shell:

    python -m fusion.evaluation.scores number "the answer is 42" 42
"""

import json
import math
import re
from collections.abc import Callable
from functools import cache
from typing import Any
from xml.etree import ElementTree

from fusion.data import ChatExample
from fusion.errors import UserError, run_main
from fusion.evaluation import function_calls
from fusion.sandbox import run_python
from serving.guard import formats, strict_json

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def expected(example: ChatExample) -> Any:
    """What the scorer compares with: the row's reference, or its own answer where it has none."""
    return example.answer if example.reference is None else example.reference


def exact_match(answer: str, example: ChatExample) -> float:
    """1 where the answer equals the reference, white space around both aside."""
    return float(answer.strip() == str(expected(example)).strip())


def exact_values(answer: str, example: ChatExample) -> float:
    """1 where the whole answer parses in the reference's format and holds exactly its values.

    `example.reference` is `{"format": "json" | "yaml" | "xml", "value": ...}`, or a JSON document as text. Text around
    the document makes it wrong; a code fence that encloses all of it is unwrapped. Types count in JSON and YAML ("28"
    is not 28); XML holds text, so numbers are compared by value, and null is an empty element. Key order never counts.
    """
    reference = expected(example)
    try:
        if isinstance(reference, str):
            reference = {"format": "json", "value": json.loads(unfenced(reference))}
        return float(PARSERS[reference["format"]](unfenced(answer), reference["value"]))
    except (ValueError, ElementTree.ParseError, RecursionError):
        return 0.0


def unfenced(answer: str) -> str:
    """The answer without the one code fence around all of it, if there is one."""
    inner = formats.unfenced(answer.strip())
    return (answer if inner is None else inner).strip()


def same(found: Any, wanted: Any) -> bool:
    """Equality of parsed values in which True is not 1 and 28.0 is 28."""
    if isinstance(wanted, dict):
        return (
            isinstance(found, dict)
            and found.keys() == wanted.keys()
            and all(same(found[k], v) for k, v in wanted.items())
        )
    if isinstance(wanted, list):
        return isinstance(found, list) and len(found) == len(wanted) and all(map(same, found, wanted))
    if isinstance(wanted, bool) or isinstance(found, bool):
        return found is wanted
    return found == wanted


def _json_equals(text: str, value: Any) -> bool:
    return same(strict_json.parse(text), value)


def _yaml_equals(text: str, value: Any) -> bool:
    return same(formats.parse_yaml(text), value)


def _xml_equals(text: str, value: Any) -> bool:
    if "<!" in text:  # no document types, so no entity of anyone's making
        return False
    return _element_equals(ElementTree.fromstring(text), value)


def _element_equals(element: ElementTree.Element, value: Any) -> bool:
    children = list(element)
    if isinstance(value, dict):
        tags = [child.tag for child in children]
        return sorted(tags) == sorted(value) and all(_element_equals(c, value[c.tag]) for c in children)
    if isinstance(value, list):
        return len(children) == len(value) and all(map(_element_equals, children, value))
    if children:
        return False
    text = (element.text or "").strip()
    if isinstance(value, str):
        return text == value
    if value is None or isinstance(value, bool):
        return text == ("" if value is None else str(value).lower())
    try:
        return math.isclose(float(text), value, rel_tol=0, abs_tol=1e-9)
    except ValueError:
        return False


PARSERS: dict[str, Callable[[str, Any], bool]] = {"json": _json_equals, "yaml": _yaml_equals, "xml": _xml_equals}


def calls_right(answer: str, example: ChatExample) -> float:
    """1 where the answer is a JSON array of just the reference's calls, of every argument a value that counts."""
    try:
        found = strict_json.parse(unfenced(answer))
    except strict_json.Malformed:
        return 0.0
    return float(function_calls.right(found, expected(example)))


def number(answer: str, example: ChatExample) -> float:
    """1 where the last number of the answer equals the last number of the reference."""
    found, wanted = NUMBER.findall(answer), NUMBER.findall(str(expected(example)))
    if not found or not wanted:
        return 0.0
    return float(float(found[-1].replace(",", "")) == float(wanted[-1].replace(",", "")))


def tests_passed(answer: str, example: ChatExample) -> float:
    """1 where the answer's Python code passes the reference's tests in a sandbox (fusion/sandbox.py).

    `example.reference` is Python source (or a list of its lines, e.g. asserts) that runs after the answer's code;
    the answer's code is its first code fence, or all of it. Raises UserError where there is no sandbox.
    """
    tests = expected(example)
    code = formats.FENCE.search(answer)
    source = f"{code[1] if code else answer}\n\n{tests if isinstance(tests, str) else chr(10).join(tests)}\n"
    return float(run_python(source).passed)


@cache
def _chrf() -> Any:
    from sacrebleu.metrics import CHRF

    return CHRF()


def chrf(answer: str, example: ChatExample) -> float:
    """chrF of the answer against the reference (character n-grams up to 6, beta 2), from 0 to 1."""
    return float(_chrf().sentence_score(answer.strip(), [str(expected(example))]).score) / 100


SCORES: dict[str, Callable[[str, ChatExample], float]] = {
    "exact_match": exact_match,
    "exact_values": exact_values,
    "function_calls": calls_right,
    "number": number,
    "tests_passed": tests_passed,
    "chrf": chrf,
}


def score(answer: str, example: ChatExample) -> float:
    """The example's own score of `answer`, from 0 to 1."""
    return SCORES[example.score](answer, example)


def main(name: str, answer: str, reference: str) -> None:
    """Prints the score `name` of an answer."""
    from fusion.data import chat

    if name not in SCORES:
        raise UserError(f"there is no score '{name}': name one of {', '.join(SCORES)}")
    try:
        wanted = json.loads(reference) if name == "exact_values" else reference
    except ValueError as error:
        raise UserError(f"the reference of exact_values is JSON, which {reference!r} is not ({error})") from error
    print(SCORES[name](answer, chat("", str(wanted), "", score=name, reference=wanted)))


if __name__ == "__main__":
    run_main(main)
