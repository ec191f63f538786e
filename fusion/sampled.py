"""Sampled answers: what a teacher says to an expert's questions, as far as the rows' own scores find it right.

    qwen-fusion branch configs/qwen2.5-0.5b-math.yaml --expert math     # branch.answers: sampled

Rejection sampling is how experts are made that are better than their anchor, which may be the teacher (STaR: Zelikman
et al., 2022; RFT: Yuan et al., 2023): reference answers are written in another's style and may teach a model to skip
the reasoning that it needs. vLLM draws several answers a question; of the verified ones the first different ones are
learnt, in the order in which they were drawn. That is the teacher's own distribution given that the answer is right;
the shortest ones would teach brevity. A `preamble` (an instruction, worked examples) says how to answer to the teacher
alone: what it brings is learnt into the weights (context distillation: Askell et al., 2021, arXiv:2112.00861).

Every question that has been asked is a line of a JSON-lines file, with all answers and their verdicts, under a key of
all that decides them: an interrupted call goes on behind the last whole line, and more rows ask the new ones alone.
"""

import hashlib
import json
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from fusion.data import ChatExample
from fusion.encoding import load_tokenizer, prompt_text
from fusion.errors import UserError
from fusion.evaluation.scores import expected, score, unfenced
from fusion.hardware import compute_dtype
from fusion.json_lines import cut_off_rest, whole_lines
from fusion.language import detect_language
from fusion.progress import console, progress_bar
from fusion.sections.serving import Serving
from fusion.sections.training import AnswerSampling
from fusion.sources import ModelSource, whole_model

RIGHT = "right"
ANSWER_TIMEOUT_S = 3600.0  # many answers share one CPU
DECISIVE = ("samples", "temperature", "top_p", "max_tokens", "minimum_chrf", "seed")  # for what a question's line says


@dataclass(frozen=True)
class Yield:
    """What sampling brought: counts of questions, answers and tokens, and the seconds in which vLLM made them."""

    questions: int
    answered: int  # questions with a verified answer
    answers: int
    verified: int
    learnt: int  # answers, after at most `keep` different ones of every question were taken
    tokens: int
    seconds: float

    def sentence(self) -> str:
        """The yield in one line."""
        return (
            f"{self.questions:,} questions, {self.answers:,} answers, {self.verified:,} verified "
            f"({self.verified / max(1, self.answers):.1%}); {self.answered:,} questions with one "
            f"({self.answered / max(1, self.questions):.1%}), {self.learnt:,} answers to learn; "
            f"{self.tokens:,} tokens in {self.seconds:.0f} s ({self.tokens / max(self.seconds, 1e-9):.1f} tokens/s)"
        )

    def as_dict(self) -> dict[str, Any]:
        """The counts as plain data."""
        return asdict(self)


@dataclass(frozen=True)
class Sampler:
    """A teacher, how it is asked, and the file that keeps its answers.

    With `imitate` (anchoring), rows whose score verifies nothing (chrf) give the teacher's one greedy answer, provided
    that its language is right; otherwise they have to come as close to the reference as `minimum_chrf`.
    """

    teacher: ModelSource
    settings: AnswerSampling
    store: Path
    imitate: bool = False

    def ask(self, rows: Sequence[ChatExample], serving: Serving, log: Path) -> None:
        """Asks the teacher, served by vLLM, what of `rows` the file does not have yet.

        Questions that leave no room for an answer within `max_model_len` are left out and counted. Raises UserError
        where vLLM cannot serve the teacher or ends.
        """
        from serving.engine import Engine, EngineSettings

        missing = self._fitting(self.missing(rows))
        for row in missing:
            if row.schema is not None:
                _checker(row.schema)
        if not missing:
            return
        with whole_model(self.teacher) as teacher:
            settings = EngineSettings(
                model=str(teacher),
                served_name="teacher",
                dtype=str(compute_dtype()).removeprefix("torch."),  # many answers at once are bound by arithmetic
                tensor_parallel_size=_ways(serving),
                gpu_memory_utilization=serving.gpu_memory_utilization,
                max_model_len=self.settings.max_model_len,
                cpu_kv_cache_bytes=serving.cpu_kv_cache_bytes,
            )
            with Engine(settings, log) as engine:
                try:
                    self.ask_server(engine.url, missing)
                except UserError as error:
                    engine.check()  # an engine that has died says more than its last connection
                    raise UserError(
                        f"{self.teacher.name} stopped answering ({error}): see {log}; what it has answered is kept in "
                        f"{self.store}, and the same command goes on from there"
                    ) from error

    def missing(self, rows: Sequence[ChatExample]) -> list[ChatExample]:
        """Those of `rows` that the file has no line for, each question once."""
        known = _read(self.store)
        return [row for key, row in self._keyed(rows).items() if key not in known]

    def ask_server(self, url: str, rows: Sequence[ChatExample]) -> None:
        """Asks the OpenAI server at `url`; every question's answers are on disk before the next one's are looked at."""
        self.store.parent.mkdir(parents=True, exist_ok=True)
        pool = ThreadPoolExecutor(self.settings.questions_at_once)
        before, verified, answers = time.monotonic(), 0, 0
        try:
            running = {pool.submit(self._request, url, key, row): (key, row) for key, row in self._keyed(rows).items()}
            cut_off_rest(self.store)
            with self.store.open("ab") as file, progress_bar() as bar:
                task = bar.add_task(f"asking {self.teacher.name}", total=len(running), unit="questions")
                for future in as_completed(running):
                    key, row = running.pop(future)
                    line = self._line(key, row, future.result())
                    now = time.monotonic()
                    line["seconds"], before = round(now - before, 3), now
                    file.write(json.dumps(line, ensure_ascii=False).encode("utf-8", "replace") + b"\n")
                    file.flush()
                    os.fsync(file.fileno())
                    answers += len(line["answers"])
                    verified += sum(answer["verdict"] == RIGHT for answer in line["answers"])
                    said = f"asking {self.teacher.name}, {verified:,} of {answers:,} answers verified"
                    bar.update(task, advance=1, description=said)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def learnt(self, rows: Sequence[ChatExample]) -> tuple[list[ChatExample], Yield]:
        """`rows` with the teacher's verified answers in the place of their own, as the file has them, and the yield.

        A question comes at most `keep` times, one without a verified answer not at all or with its reference. Raises
        UserError where nothing is left.
        """
        lines, kept = _read(self.store), self.settings.keep
        learnt: list[ChatExample] = []
        found: list[dict[str, Any]] = []
        answered = 0
        for key, row in self._keyed(rows).items():
            if key not in lines:
                continue
            found.append(lines[key])
            texts = _distinct([a["text"] for a in lines[key]["answers"] if a["verdict"] == RIGHT])
            answered += bool(texts)
            if not texts and self.settings.unanswered == "reference":
                texts = [row.answer]
            learnt += [_with_answer(row, text) for text in texts[:kept]]
        verdicts = [answer["verdict"] for line in found for answer in line["answers"]]
        brought = Yield(
            questions=len(found),
            answered=answered,
            answers=len(verdicts),
            verified=verdicts.count(RIGHT),
            learnt=len(learnt),
            tokens=sum(line["tokens"] for line in found),
            seconds=round(sum(line["seconds"] for line in found), 1),
        )
        if not learnt:
            raise UserError(
                f"none of the {len(verdicts)} answers that {self.teacher.name} gave to {len(found)} questions is right "
                f"({self.store} has them all): name a better teacher, ask for more samples, or give easier questions"
            )
        return learnt, brought

    def _fitting(self, rows: list[ChatExample]) -> list[ChatExample]:
        if not rows:
            return rows
        tokenizer = load_tokenizer(self.teacher.folder)
        room = self.settings.max_model_len - self.settings.max_tokens
        try:
            texts = [prompt_text(tokenizer, self._asked(row)) for row in rows]
        except ValueError as error:
            raise UserError(f"teacher {self.teacher.folder} cannot be asked ({error}): name a chat model") from error
        asked = tokenizer(texts, add_special_tokens=False)["input_ids"]
        fitting = [row for row, ids in zip(rows, asked, strict=True) if len(ids) <= room]
        if len(fitting) < len(rows):
            left = f"{len(rows) - len(fitting)} questions over sampling.max_model_len less max_tokens ({room} tokens)"
            console.print(f"  {left} left out", highlight=False)
        return fitting

    def _asked(self, row: ChatExample) -> list[dict[str, Any]]:
        """The row's messages behind the preamble; a system message of the row's own takes the place of its."""
        prompt = list(row.prompt)
        own = [prompt.pop(0)] if prompt[0]["role"] == "system" else []
        before = [turn.model_dump() for turn in self.settings.preamble if not (own and turn.role == "system")]
        return [*own, *before, *prompt]

    def _keyed(self, rows: Sequence[ChatExample]) -> dict[str, ChatExample]:
        """The rows by their keys, each question once."""
        return {self._key(row): row for row in rows}

    def _key(self, row: ChatExample) -> str:
        decisive = [self._teacher_stamp, *(getattr(self.settings, name) for name in DECISIVE), self._greedy(row)]
        decisive += [turn.model_dump() for turn in self.settings.preamble]
        question = [row.prompt, row.score, expected(row), row.schema]
        text = json.dumps([decisive, question], sort_keys=True, ensure_ascii=False, default=str)
        return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:32]

    @cached_property
    def _teacher_stamp(self) -> str:
        from fusion.merge import source_stamp

        return source_stamp(self.teacher)

    def _greedy(self, row: ChatExample) -> bool:
        return self.imitate and row.score == "chrf"

    def _request(self, url: str, key: str, row: ChatExample) -> dict[str, Any]:
        from serving.client import chat

        settings = self.settings
        options: dict[str, Any] = {"temperature": 0.0, "n": 1}
        if not self._greedy(row):
            seed = settings.seed + int(key[:7], 16)  # vLLM gives the n answers seed, seed + 1, ...
            options = {
                "temperature": settings.temperature,
                "top_p": settings.top_p,
                "n": settings.samples,
                "seed": seed,
            }
        options["max_tokens"] = settings.max_tokens
        return chat(url, "teacher", self._asked(row), timeout_s=ANSWER_TIMEOUT_S, **options).raw

    def _line(self, key: str, row: ChatExample, completion: dict[str, Any]) -> dict[str, Any]:
        minimum = 0.0 if self._greedy(row) else self.settings.minimum_chrf
        answers = []
        for choice in completion["choices"]:
            text = choice["message"].get("content") or ""
            answers.append({"verdict": verdict(text, choice.get("finish_reason"), row, minimum), "text": text})
        return {
            "key": key,
            "teacher": self.teacher.name,
            "messages": row.prompt,
            "score": row.score,
            "reference": expected(row),
            "answers": answers,
            "tokens": int(completion["usage"]["completion_tokens"]),
        }


def verdict(text: str, finish_reason: str | None, row: ChatExample, minimum_chrf: float) -> str:
    """RIGHT, or what is wrong with an answer: empty, cut, schema, language, unlike or wrong.

    The row's score has to be 1, and a text around a number in the question's language. chrf verifies nothing by
    equality: there the answer has to be in the reference's language, where that has one that can be told, and at least
    `minimum_chrf` like it.
    """
    if not text.strip():
        return "empty"
    if finish_reason != "stop":
        return "cut"
    if row.schema is not None and not _satisfies(text, row.schema):
        return "schema"
    if row.score == "number" and _other_language(text, row.question):
        return "language"
    if row.score != "chrf":
        return RIGHT if score(text, row) == 1 else "wrong"
    language = detect_language(str(expected(row)))
    if language is not None and detect_language(text) != language:
        return "language"
    return RIGHT if score(text, row) >= minimum_chrf else "unlike"


def _other_language(text: str, question: str) -> bool:
    """Whether both are in a language that can be told, and not in the same."""
    found = detect_language(text), detect_language(question)
    return None not in found and found[0] != found[1]


def _satisfies(text: str, schema: dict[str, Any]) -> bool:
    from serving.guard.strict_json import Malformed, parse

    try:
        return not _checker(schema).violations(parse(unfenced(text)))
    except Malformed:
        return False


def _checker(schema: dict[str, Any]) -> Any:
    from serving.guard.schema import Checker, SchemaError

    try:
        return Checker(schema)
    except SchemaError as error:
        raise UserError(f"a training row's schema cannot be used ({error}): mend the row") from error


def _distinct(texts: Sequence[str]) -> list[str]:
    """The texts that differ in more than white space, in their order."""
    found: dict[str, str] = {}
    for text in texts:
        found.setdefault(" ".join(text.split()), text.strip())
    return list(found.values())


def _with_answer(row: ChatExample, text: str) -> ChatExample:
    return replace(row, messages=(*row.messages[:-1], {"role": "assistant", "content": text}))


def _ways(serving: Serving) -> int:
    """Over how many cards the teacher goes: one where this process sees fewer than serving takes."""
    enough = not torch.cuda.is_available() or torch.cuda.device_count() >= serving.tensor_parallel_size
    return serving.tensor_parallel_size if enough else 1


def _read(store: Path) -> dict[str, dict[str, Any]]:
    """The file's whole lines by key. Raises UserError where one is not what was written."""
    lines = {}
    for number, text in enumerate(whole_lines(store), 1):
        try:
            line = json.loads(text)
            lines[line["key"]] = line
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{store}, line {number}: not a sampled question ({error}); remove the line") from error
    return lines
