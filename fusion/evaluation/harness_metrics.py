"""Metrics that the task files of configs/benchmarks name: what lm-evaluation-harness asks us about one answer.

A row of ours travels as JSON text beside its prompt, since the columns of a data set must have one type each.
"""

import json
import re
from math import comb
from typing import Any

from fusion.data import ChatExample
from fusion.evaluation.scores import score, unfenced
from fusion.language import detect_language
from fusion.sandbox import run_python
from serving.guard import formats, strict_json
from serving.guard.schema import Checker

COMMENT = re.compile(r"#\s*(.+)")
MESSAGES = "\x00messages\x00"  # begins a prompt that is a whole conversation


def row_of(example: ChatExample) -> dict[str, str]:
    """A chat row as a row of a harness data set."""
    row = {
        "messages": example.messages,
        "domain": example.domain,
        "score": example.score,
        "reference": example.reference,
        "schema": example.schema,
    }
    prompt = example.prompt
    plain = len(prompt) == 1 and prompt[0]["role"] == "user"
    asked = prompt[0]["content"] if plain else MESSAGES + json.dumps(prompt, ensure_ascii=False)
    return {"prompt": asked, "answer": example.answer, "row": json.dumps(row, ensure_ascii=False)}


def example_of(doc: dict[str, str]) -> ChatExample:
    """The chat row that `row_of` has put into `doc`."""
    row = json.loads(doc["row"])
    return ChatExample(**row | {"messages": tuple(row["messages"])})


def unpacked(chat: list[dict[str, str]]) -> list[dict[str, str]]:
    """The conversation that the harness makes of a prompt, or the one that the prompt itself holds."""
    if chat and chat[-1]["content"].startswith(MESSAGES):
        conversation: list[dict[str, str]] = json.loads(chat[-1]["content"].removeprefix(MESSAGES))
        return [*chat[:-1], *conversation]
    return chat


def row_score(doc: dict[str, str], results: list[str]) -> dict[str, float]:
    """The row's own score of one answer."""
    return {"score": score(results[0], example_of(doc))}


def structured_score(doc: dict[str, str], results: list[str]) -> dict[str, float]:
    """The row's own score, and whether the answer can be parsed in its format and fits its schema, if it has one."""
    example = example_of(doc)
    return {"score": score(results[0], example), "valid": float(is_valid(results[0], example))}


def german_comments(doc: dict[str, str], results: list[str]) -> dict[str, float]:
    """Whether a program passes its tests, whether its comments are German, and both, which is what was asked for."""
    passed = score(results[0], example_of(doc))
    code = formats.FENCE.search(results[0])
    comments = " ".join(COMMENT.findall(code[1] if code else results[0]))
    german = float(bool(comments) and detect_language(comments) == "de")
    return {"score": passed * german, "passed": passed, "german": german}


def is_valid(answer: str, example: ChatExample) -> bool:
    """Whether an answer is a document of the format that the row asks for (JSON where none), by its schema."""
    wanted = example.reference.get("format", "json") if isinstance(example.reference, dict) else "json"
    text = unfenced(answer)
    try:
        if wanted == "xml":
            formats.parse_xml(text)
            return True
        value = formats.parse_yaml(text) if wanted == "yaml" else strict_json.parse(text)
    except strict_json.Malformed:
        return False
    return example.schema is None or not Checker(example.schema).violations(value)


def programs(resps: list[list[str]], docs: list[dict[str, Any]]) -> list[list[str]]:
    """The code of answers that go on behind an opened fence: up to its end, or that of a fence of their own."""
    return [[_program(answer) for answer in answers] for answers in resps]


def _program(answer: str) -> str:
    own = formats.FENCE.match(answer.lstrip())
    return own[1] if own else answer.partition("```")[0]


class CodeEval:
    """Stands in for the hub's `code_eval` metric, which upstream's tasks fetch and run unsandboxed."""

    def compute(self, references: list[str], predictions: list[list[str]], k: list[int]) -> Any:
        """({pass@k: mean over problems}, {}), as code_eval has it, by the estimate of arXiv:2107.03374."""
        passed = [
            [run_python(f"{program}\n\n{tests}\n").passed for program in programs]
            for tests, programs in zip(references, predictions, strict=True)
        ]
        means = {
            f"pass@{n}": sum(pass_at_k(len(row), sum(row), n) for row in passed) / len(passed)
            for n in k
            if all(len(row) >= n for row in passed)
        }
        return means, {}


def pass_at_k(samples: int, right: int, k: int) -> float:
    """The chance that one of `k` of the samples is right: 1 - C(samples - right, k) / C(samples, k)."""
    return 1.0 - comb(samples - right, k) / comb(samples, k)
