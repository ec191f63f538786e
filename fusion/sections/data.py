"""Recipe sections of data: where rows come from, how they are scored, what requests of a domain look like."""

import re
from typing import Literal, get_args

from pydantic import Field, PositiveInt, field_validator, model_validator

from fusion.sections.section import Section

# fusion/evaluation/scores.py
ScoreName = Literal["exact_match", "exact_values", "function_calls", "number", "tests_passed", "chrf"]
SCORE_NAMES: tuple[str, ...] = get_args(ScoreName)


class DataSource(Section):
    """Where chat rows come from: a generated task, a hub data set, a file (in place of `hub` if both), or parts.

    `form` names public data whose files are no table of prompts and answers (fusion/tasks/public.py reads them).
    """

    generated: str | None = None  # MODULE.TASK of fusion/tasks
    path: str | None = None  # JSON lines: {"messages": [...]}, {"conversations": [...]} or the two columns below
    hub: str | None = None  # data set id, with config and columns
    file: str | None = None  # file or folder within the recipe's data_folder
    parts: tuple["DataSource", ...] = ()  # of which each gives its `rows`, or an equal share of what is asked for
    config: str | None = None
    split: str = "train"
    lines: tuple[PositiveInt, PositiveInt] | None = None  # first and last line of the file that count
    form: Literal["table", "bfcl", "codeio", "xquad", "xquad_json"] = "table"
    prompt: str = "prompt"  # column, or a text with {columns} in it
    answer: str = "answer"  # column, or a text with {columns} in it
    reference: str | None = None  # column that the scorer compares with; None: the answer
    score: ScoreName = "exact_match"
    rows: int | None = Field(None, gt=0)
    license: str | None = None

    @model_validator(mode="after")
    def _one_source(self) -> "DataSource":
        if [bool(self.generated), bool(self.path or self.hub), bool(self.parts)].count(True) != 1:
            why = "'file' is one of the recipe's data_folder, which is not set" if self.file and not self.path else ""
            raise ValueError(why or "name a 'generated' task, or a 'hub' data set or a file's 'path', or 'parts'")
        if self.lines and self.lines[0] > self.lines[1]:
            raise ValueError(f"'lines' are the first and the last, not {self.lines[0]} and {self.lines[1]}")
        if self.form != "table" and self.split not in ("train", "held_out"):
            raise ValueError(f"form '{self.form}' has the splits 'train' and 'held_out', not '{self.split}'")
        if self.generated and self.split not in ("train", "held_out"):
            raise ValueError(f"a generated task has the splits 'train' and 'held_out', not '{self.split}'")
        if self.score == "tests_passed" and self.form == "table" and not (self.generated or self.reference):
            raise ValueError("score 'tests_passed' needs 'reference', the column with the tests")
        return self

    def describe(self) -> str:
        """The source in a few words, for messages."""
        if self.parts:
            return " and ".join(part.describe() for part in self.parts)
        return f"{self.generated or self.path or self.hub}, {self.split}"


class ExtraSource(DataSource):
    """Rows that anchor and fused model are compared on, and that no expert is for."""

    max_new_tokens: int | None = Field(None, gt=0)  # None: evaluation.max_new_tokens
    optional: bool = False  # left out with a note where it cannot be had


class Rule(Section):
    """One sign that a question belongs to a domain; any of its parts is enough."""

    pattern: str | None = None  # regular expression, searched for without regard to case
    words: tuple[str, ...] = ()  # whole words, without regard to case
    not_languages: tuple[str, ...] = ()  # matches when the detected language is none of these ISO 639-1 codes

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str | None) -> str | None:
        if pattern is not None:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"'{pattern}' is not a regular expression ({error})") from error
        return pattern

    @model_validator(mode="after")
    def _not_empty(self) -> "Rule":
        if not (self.pattern or self.words or self.not_languages):
            raise ValueError("a rule needs 'pattern', 'words' or 'not_languages'")
        return self


class Domain(Section):
    """What one kind of request looks like, and which data stand for it."""

    description: str = ""
    train: DataSource
    held_out: DataSource
    rules: tuple[Rule, ...] = ()  # domains are tried in the recipe's order; the first match wins
    fallback: str | None = None  # the domain whose expert serves this one, where it has none of its own


def general_domain(domains: dict[str, Domain]) -> str:
    """The domain that takes what no rule claims: the first without rules, otherwise the first."""
    return next((name for name, domain in domains.items() if not domain.rules), next(iter(domains)))
