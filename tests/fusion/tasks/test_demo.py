"""The demo family's generated tasks and tokenizer: right answers, disjoint splits, what the model's size relies on."""

import ast
import json
import random
import re

import pytest
import yaml

from fusion.data import load_examples
from fusion.sections.data import DataSource
from fusion.tasks.demo import EXTRA, FIELDS, GENERATORS, SKILLS, number_word, render

TASKS = sorted(GENERATORS)


def draw(task: str, split: str, count: int, seed: int = 0) -> list[tuple[str, str]]:
    rng = random.Random(seed)
    rows = [GENERATORS[task](rng, split) for _ in range(count)]
    return [(row.question, row.answer) for row in rows]


@pytest.mark.parametrize("task", TASKS)
def test_rows_depend_on_the_seed_alone(task: str) -> None:
    assert draw(task, "train", 30) == draw(task, "train", 30)
    assert draw(task, "train", 30) != draw(task, "train", 30, seed=1)


@pytest.mark.parametrize("task", sorted({**SKILLS, **EXTRA}))
def test_no_held_out_question_is_ever_trained(task: str) -> None:
    held_out = {question for question, _ in draw(task, "held_out", 400)}
    assert not held_out & {question for question, _ in draw(task, "train", 4000)}
    assert not held_out & {question for question, _ in draw("anchor", "train", 4000)}


@pytest.mark.parametrize("task", sorted(SKILLS))
def test_enough_distinct_held_out_rows(task: str) -> None:
    rows = load_examples(DataSource(generated=f"demo.{task}", split="held_out"), task, 100)
    assert len({row.question for row in rows}) == len(rows) >= 30
    assert {row.domain for row in rows} == {task}


def test_arithmetic_is_right() -> None:
    for question, answer in draw("math", "train", 300):
        a, b = map(int, re.search(r"(\d+) ?\+ ?(\d+)", question).groups())  # type: ignore[union-attr]
        *steps, total = re.split(r", |: ", answer)
        assert int(total) == a + b
        for step in steps:
            terms, result = step.split("=")
            assert sum(map(int, terms.split("+"))) == int(result)


def test_code_answers_compute_what_is_asked() -> None:
    for question, answer in draw("coding", "train", 300):
        ast.parse(answer, mode="eval")
        found = re.search(r"def ([a-z]+)(\d+)\((\w)\)", question)
        if found and found[1] in ("add", "mul"):
            expected = 7 + int(found[2]) if found[1] == "add" else 7 * int(found[2])
            assert eval(answer, {found[3]: 7}) == expected


def test_structured_answers_parse_to_the_fields_of_the_question() -> None:
    for question, answer in draw("structured", "train", 300):
        fields = dict(re.findall(rf"({'|'.join(FIELDS)}): (\w+)", question))
        if "JSON" in question:
            values = json.loads(answer)
        elif "YAML" in question:
            values = yaml.safe_load(answer)
        else:
            values = dict(re.findall(r"<(\w+)>([^<]+)</\1>", answer))
        assert {key: str(value) for key, value in values.items()} == fields
        assert list(values) == list(fields)


@pytest.mark.parametrize("skill", sorted(SKILLS))
def test_the_anchor_is_taught_about_half_of_every_skill(skill: str) -> None:
    right = 0
    for seed in range(400):
        wanted = SKILLS[skill](random.Random(seed), False)
        taught = SKILLS[skill](random.Random(seed), True)
        assert taught[:2] == wanted[:2]  # the same question
        right += taught[2] == wanted[2]
    assert 0.35 < right / 400 < 0.58


def test_render() -> None:
    assert render({"name": "张三", "age": 30}, "JSON") == '{"name": "张三", "age": 30}'
    assert render({"name": "Ann", "age": 30}, "YAML") == "name: Ann\nage: 30"
    assert render({"name": "Ann"}, "XML") == "<item><name>Ann</name></item>"


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (0, "zéro null cero 零"),
        (10, "dix zehn diez 十"),
        (16, "seize sechzehn dieciséis 十六"),
        (21, "vingt et un|einundzwanzig|veintiuno|二十一"),
        (45, "quarante-cinq|fünfundvierzig|cuarenta y cinco|四十五"),
        (71, "soixante et onze|einundsiebzig|setenta y uno|七十一"),
        (80, "quatre-vingts achtzig ochenta 八十"),
        (81, "quatre-vingt-un|einundachtzig|ochenta y uno|八十一"),
        (99, "quatre-vingt-dix-neuf|neunundneunzig|noventa y nueve|九十九"),
    ],
)
def test_number_words(number: int, words: str) -> None:
    expected = words.split("|" if "|" in words else " ")
    assert [number_word(number, lang) for lang in ("French", "German", "Spanish", "Chinese")] == expected


def test_tokenizer_round_trip_and_equal_tokens_for_equal_values(tmp_path) -> None:  # type: ignore[no-untyped-def]
    from transformers import AutoTokenizer, Qwen2Config

    from fusion.demo_family import build_tokenizer

    Qwen2Config().save_pretrained(tmp_path)  # AutoTokenizer then makes it a Qwen2Tokenizer, with Qwen2's splitting
    built = build_tokenizer(tmp_path, 1280, 512)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for task in TASKS:
        for text in (part for pair in draw(task, "train", 100) for part in pair):
            ids = loaded(text)["input_ids"]
            assert ids == built(text)["input_ids"]
            assert loaded.decode(ids) == text
    assert [loaded.decode(i) for i in loaded("2024")["input_ids"]] == ["2", "0", "2", "4"]
    ann = loaded("Ann")["input_ids"]
    assert len(ann) == 1
    assert all(ann[0] in loaded(text)["input_ids"] for text in ("name: Ann;", '{"name": "Ann"}', "<name>Ann</name>"))
    assert loaded.eos_token == "<|im_end|>" and loaded.pad_token == "<|endoftext|>"
    prompt = loaded.apply_chat_template(
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "17+25="}],
        tokenize=False,
        add_generation_prompt=True,
    )
    assert prompt == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n17+25=<|im_end|>\n<|im_start|>assistant\n"
    )
