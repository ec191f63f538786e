"""Public data whose files are no table of prompts and answers, read as chat rows.

    python -m fusion.tasks.public bfcl ../berkeley-function-call-leaderboard/bfcl_eval/data held_out 3

`bfcl`: function calls (Apache-2.0), the synthetic ones to train on, the `live` ones, which users wrote, held out.
`xquad`: paragraphs in eleven languages (CC BY-SA 4.0), to be translated and asked about; the first 200 train.
`xquad_json`: the same paragraphs with two questions whose answers are wanted as JSON.
`codeio`: problems with a solution and a generator of inputs (Apache-2.0), turned into tests by running both.
"""

import hashlib
import json
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fusion.checkpoint import cache_folder, read_json, read_lines, write_json
from fusion.data import ChatExample, chat, split_of
from fusion.errors import UserError, counted, run_main
from fusion.progress import track
from fusion.sandbox import run_python
from fusion.sections.data import DataSource

BFCL_FILES = {"train": ("simple_python", "multiple"), "held_out": ("live_simple", "live_multiple")}
BFCL_TYPES = {"dict": "object", "float": "number", "tuple": "array"}  # Python's names for JSON's types
BFCL_PROMPT = """You have these functions:
{functions}

Answer with a JSON array of the calls to make, each {{"name": ..., "arguments": {{...}}}}, and with nothing else.

{question}"""
LONGEST_FUNCTIONS = 4000  # characters of a row's functions: some rows of `live_multiple` have 37 of them

XQUAD_TRAIN = 200  # of 240 paragraphs
XQUAD_PAIRS = 4  # translations of a paragraph, and as many questions about it
LONGEST_PARAGRAPH = 700  # characters
LANGUAGES = {  # those of XQuAD that the tokenizer of Qwen2.5 does not cut into single bytes
    "de": "German",
    "es": "Spanish",
    "ro": "Romanian",
    "ru": "Russian",
    "tr": "Turkish",
    "vi": "Vietnamese",
    "zh": "Chinese",
}
ASK_TRANSLATION = (
    "Translate into {target}:\n\n{text}",
    "Translate the following {source} text into {target}.\n\n{text}",
    "{text}\n\nWhat is this in {target}? Give the translation alone.",
)

ASK_JSON = 'JSON: {"first": "...", "second": "..."}, each answer in the words of the text.'
JSON_ANSWERS = {
    "type": "object",
    "properties": {"first": {"type": "string"}, "second": {"type": "string"}},
    "required": ["first", "second"],
    "additionalProperties": False,
}

CODEIO_PROMPT = """{task_description}

{input_output_spec}

Write a Python function main_solution for this. It must pass:
{tests}"""
CODEIO_TESTS = 3
CODEIO_SECONDS = 3
LONGEST_CODE = 1500  # characters of the problem's own solution
LONGEST_TEST = 300  # characters of one assertion
CODEIO_PROGRAM = """
import json as _json
_rng, _found = Random(0), []
for _ in range(4 * {tests}):
    _inputs = generate_inputs(_rng)
    _text = f"assert main_solution(**{{_inputs!r}}) == {{main_solution(**_inputs)!r}}"
    if len(_text) < {longest} and _text not in _found:
        _found.append(_text)
    if len(_found) == {tests}:
        break
print(_json.dumps(_found))
"""


def bfcl(folder: Path, source: DataSource, domain: str) -> list[ChatExample]:
    """Questions with the functions that are there, answered by calls; scored by `function_calls`."""
    rows = []
    for name in BFCL_FILES[source.split]:
        wanted = {
            row["id"]: row["ground_truth"] for row in _json_lines(folder / "possible_answer" / f"BFCL_v4_{name}.json")
        }
        for row in _json_lines(folder / f"BFCL_v4_{name}.json"):
            functions = [{**f, "parameters": _json_schema(f["parameters"])} for f in row["function"]]
            described = "\n".join(json.dumps(f, ensure_ascii=False) for f in functions)
            calls = wanted[row["id"]]
            if len(described) > LONGEST_FUNCTIONS or not all(_has_values(call) for call in calls):
                continue
            rows.append(
                chat(
                    BFCL_PROMPT.format(functions=described, question=row["question"][0][-1]["content"]),
                    json.dumps([_call(call) for call in calls], ensure_ascii=False),
                    domain,
                    score="function_calls",
                    reference=calls,
                    schema=_calls_schema(functions),
                )
            )
    return rows


def _json_schema(given: Any) -> Any:
    """BFCL's parameters as JSON Schema."""
    if isinstance(given, list):
        return [_json_schema(item) for item in given]
    if not isinstance(given, dict):
        return given
    found = {key: _json_schema(value) for key, value in given.items() if key != "optional"}
    if isinstance(found.get("type"), str):
        found["type"] = BFCL_TYPES.get(found["type"], found["type"])
        if found["type"] == "any":
            del found["type"]
    return found


def _calls_schema(functions: list[dict[str, Any]]) -> dict[str, Any]:
    """What an array of calls of `functions` looks like."""
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": f["name"]}, "arguments": f["parameters"]},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for f in functions
    ]
    return {"type": "array", "minItems": 1, "items": calls[0] if len(calls) == 1 else {"anyOf": calls}}


def _has_values(wanted: Any) -> bool:
    """Whether every argument of a call has a value that counts; a few rows have an empty list."""
    if isinstance(wanted, dict):
        return all(value != [] and _has_values(value) for value in wanted.values())
    return not isinstance(wanted, list) or all(map(_has_values, wanted))


def _call(wanted: dict[str, Any]) -> dict[str, Any]:
    """One call in the form that is asked for, of every argument the first value that counts as right."""
    [(name, arguments)] = wanted.items()
    return {"name": name, "arguments": _first_values(arguments)}


def _first_values(arguments: dict[str, Any]) -> dict[str, Any]:
    """{argument: [values that count]} with the first value; an argument that may be missing is left out."""
    return {key: _first(values) for key, values in arguments.items() if "" not in values}


def _first(values: list[Any]) -> Any:
    value = values[0]
    if isinstance(value, dict):
        return _first_values(value)
    if isinstance(value, list):
        return [_first_values(item) if isinstance(item, dict) else item for item in value]
    return value


def xquad(folder: Path, source: DataSource, domain: str) -> list[ChatExample]:
    """Paragraphs to translate from one language into another, and questions in one about a paragraph in another."""
    texts = {code: list(_paragraphs(folder / f"xquad.{code}.json")) for code in LANGUAGES}
    if len({len(rows) for rows in texts.values()}) != 1:
        raise UserError(f"{folder}: its files have different numbers of paragraphs: download XQuAD again")
    rows = []
    for number in range(len(texts["de"])):
        if (number < XQUAD_TRAIN) != (source.split == "train"):
            continue
        rng = random.Random(f"xquad/{number}")
        for _ in range(XQUAD_PAIRS):
            here, there = rng.sample(list(LANGUAGES), 2)
            (text, asked), (other, asked_there) = texts[here][number], texts[there][number]
            if max(len(text), len(other)) <= LONGEST_PARAGRAPH:
                form = rng.choice(ASK_TRANSLATION)
                question = form.format(source=LANGUAGES[here], target=LANGUAGES[there], text=text)
                rows.append(chat(question, other, domain, score="chrf"))
            which = rng.randrange(len(asked))
            answer = asked_there[which]["answers"][0]["text"]
            rows.append(chat(f"{text}\n\n{asked_there[which]['question']}", answer, domain, score="chrf"))
    return rows


def xquad_json(folder: Path, source: DataSource, domain: str) -> list[ChatExample]:
    """Two questions in one language about a paragraph in it, to be answered as JSON: two experts' skills in one row."""
    texts = {code: list(_paragraphs(folder / f"xquad.{code}.json")) for code in LANGUAGES}
    rows = []
    for paragraphs in texts.values():
        for number, (text, asked) in enumerate(paragraphs):
            if (number < XQUAD_TRAIN) != (source.split == "train") or len(asked) < 2 or len(text) > LONGEST_PARAGRAPH:
                continue
            first, second = asked[:2]
            value = {"first": first["answers"][0]["text"], "second": second["answers"][0]["text"]}
            question = f"{text}\n\n1. {first['question']}\n2. {second['question']}\n\n{ASK_JSON}"
            reference = {"format": "json", "value": value}
            answer = json.dumps(value, ensure_ascii=False)
            rows.append(chat(question, answer, domain, score="exact_values", reference=reference, schema=JSON_ANSWERS))
    return rows


def _paragraphs(path: Path) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    for article in _json(path)["data"]:
        for paragraph in article["paragraphs"]:
            yield paragraph["context"], paragraph["qas"]


def codeio(path: Path, source: DataSource, domain: str) -> list[ChatExample]:
    """Problems whose solution runs, with tests made of what it answers to generated inputs; scored by those."""
    kept = [row for row in _json_lines(path) if len(row["code_sample"]) <= LONGEST_CODE]
    kept = [row for row in kept if split_of(row["task_description"]) == source.split]
    store = cache_folder() / f"codeio-{hashlib.sha256(CODEIO_PROGRAM.encode()).hexdigest()[:8]}.json"
    known: dict[str, list[str]] = read_json(store) if store.is_file() else {}
    before = len(known)
    rows: list[ChatExample] = []
    for row in track(kept[: 4 * (source.rows or len(kept))], f"codeio, {source.split}"):
        if len(rows) == source.rows:
            break
        key = hashlib.sha256(f"{row['code_sample']}\n{row['input_generator']}".encode()).hexdigest()
        tests = known[key] if key in known else _tests(row)
        if tests is not None:
            known[key] = tests
        if tests:
            prompt = CODEIO_PROMPT.format(**row | {"tests": "\n".join(tests)})
            answer = f"```python\n{_without_scaffold(row['code_sample'])}\n```"
            rows.append(chat(prompt, answer, domain, score="tests_passed", reference=tests))
    if len(known) > before:
        write_json(store, known)
    return rows


def _tests(row: dict[str, Any]) -> list[str] | None:
    """Assertions on what the problem's solution answers to generated inputs; none where it fails, or its own test.

    None where it has not ended in time, which may be the machine's doing.
    """
    program = CODEIO_PROGRAM.format(tests=CODEIO_TESTS, longest=LONGEST_TEST)
    parts = ["import random\nfrom random import Random", row["code_sample"], row["input_generator"], program]
    done = run_python("\n".join(parts), CODEIO_SECONDS)
    if done.timed_out:
        return None
    tests: list[str] = json.loads(done.output.splitlines()[-1]) if done.passed and done.output else []
    right = len(tests) == CODEIO_TESTS and run_python("\n".join([row["code_sample"], *tests]), CODEIO_SECONDS).passed
    return tests if right else []


def _without_scaffold(code: str) -> str:
    """A solution without the comments that every one of them has."""
    scaffold = r"^# (import necessary packages|main function|all class and function definitions.*)\n"
    return re.sub(scaffold, "", code, flags=re.MULTILINE).strip()


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): name the folder of the data set's own files") from error


def _json_lines(path: Path) -> list[dict[str, Any]]:
    try:
        return read_lines(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): name the data set's own files") from error


READERS: dict[str, Callable[[Path, DataSource, str], list[ChatExample]]] = {
    "bfcl": bfcl,
    "xquad": xquad,
    "xquad_json": xquad_json,
    "codeio": codeio,
}


def main(form: str, path: str, split: str, rows: str) -> None:
    """Prints the first rows."""
    if form not in READERS:
        raise UserError(f"there is no form '{form}': name one of {', '.join(READERS)}")
    given = DataSource.model_validate({"path": path, "form": form, "split": split, "rows": counted(rows)})
    for example in READERS[form](Path(path), given, form)[: given.rows]:
        print(json.dumps(example.messages, ensure_ascii=False, indent=1))


if __name__ == "__main__":
    run_main(main)
