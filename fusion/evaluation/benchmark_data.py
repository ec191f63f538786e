"""Copies of public benchmarks, rewritten as the JSON lines that upstream's tasks find on the hub.

    write_split("mgsm", Path("data/mgsm/mgsm_de.tsv"), Path("runs/demo/benchmark/tasks/mgsm_de/test.jsonl"))

The columns are the hub data sets' own, so that the tasks of lm-evaluation-harness need no change but a path.
"""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fusion.checkpoint import read_lines, write_lines
from fusion.errors import UserError
from fusion.tasks.public import XQUAD_TRAIN

MBPP_TEST = range(11, 511)  # task_id of upstream's split `test`
Row = dict[str, Any]


def write_split(form: str, source: Path, target: Path) -> None:
    """Writes the rows of a benchmark's file or folder. Raises UserError where it is missing or another data set's."""
    try:
        rows = FORMS[form](source)
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(f"{source} is not the benchmark's own file ({error}): download it again") from error
    write_lines(target, rows)


def ifeval(path: Path) -> list[Row]:
    """IFEval's multilingual copy, whose instructions have their language before their names."""
    rows = read_lines(path)
    return [row | {"instruction_id_list": [n.removeprefix("en:") for n in row["instruction_id_list"]]} for row in rows]


def mbpp(path: Path) -> list[Row]:
    """MBPP's one file cut to the split that is tested on."""
    return [row for row in read_lines(path) if row["task_id"] in MBPP_TEST]


def mgsm(path: Path) -> list[Row]:
    """Question and number, with the columns that only the examples have."""
    rows = []
    with path.open(encoding="utf-8", newline="") as file:
        for question, number in csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE):
            value = float(number.replace(",", ""))
            rows.append(
                {"question": question, "answer": None, "answer_number": int(value) if value.is_integer() else value}
            )
    return rows


def xquad(path: Path) -> list[Row]:
    """SQuAD's tree as rows, of the paragraphs that form `xquad` trains nobody on."""
    paragraphs = [p for article in json.loads(path.read_text(encoding="utf-8"))["data"] for p in article["paragraphs"]]
    rows = []
    for paragraph in paragraphs[XQUAD_TRAIN:]:
        for question in paragraph["qas"]:
            answers = {key: [answer[key] for answer in question["answers"]] for key in ("text", "answer_start")}
            row = {"id": question["id"], "context": paragraph["context"], "question": question["question"]}
            rows.append(row | {"answers": answers})
    return rows


def bbh(path: Path) -> list[Row]:
    """The examples of one BIG-Bench Hard task."""
    rows: list[Row] = json.loads(path.read_text(encoding="utf-8"))["examples"]
    return rows


def mmlu(path: Path) -> list[Row]:
    """Lines of question, four answers and the right one's letter, without a header."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = [(line[0], line[1:5], "ABCD".index(line[5])) for line in csv.reader(file)]
    return [{"question": question, "choices": choices, "answer": answer} for question, choices, answer in rows]


def with_header(path: Path) -> list[Row]:
    """A table whose first line names its columns."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def schemas(folder: Path) -> list[Row]:
    """A folder with one JSON schema a file."""
    paths = sorted(folder.glob("*.json"))
    return [{"json_schema": path.read_text(encoding="utf-8"), "unique_id": path.stem} for path in paths]


FORMS: dict[str, Callable[[Path], list[Row]]] = {
    "json_lines": read_lines,
    "ifeval": ifeval,
    "mbpp": mbpp,
    "mgsm": mgsm,
    "xquad": xquad,
    "bbh": bbh,
    "mmlu": mmlu,
    "csv": with_header,
    "schemas": schemas,
}
