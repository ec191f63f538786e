"""What each task score takes for right, on answers made to be nearly right; and greedy answers by draft."""

import time
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen2ForCausalLM

from fusion.data import chat
from fusion.evaluation import generate as generate_module
from fusion.evaluation import scores
from fusion.evaluation.generate import answer_examples, answer_losses, generate
from fusion.evaluation.scores import SCORES, score
from fusion.sandbox import run_python
from fusion.tasks.extraction import render
from tests.families import byte_tokenizer, config

VALUE = {"name": "张三", "age": 28, "city": None, "tags": ["a", "b"], "price": {"amount": 2.5, "paid": True}}


def values(answer: str, form: str = "json", value=VALUE) -> float:
    return SCORES["exact_values"](answer, chat("", "", "d", reference={"format": form, "value": value}))


@pytest.mark.parametrize("form", ["json", "yaml", "xml"])
def test_the_taught_answer_is_right_and_any_change_is_wrong(form: str):
    text = render(VALUE, form)
    assert values(text, form) == 1.0
    assert values(f"```{form}\n{text}\n```", form) == 1.0
    assert values(text.replace("28", "29"), form) == 0.0
    assert values(text.replace("张三", "李四"), form) == 0.0
    assert values(f"Here it is:\n{text}", form) == 0.0
    assert values(f"```{form}\n{text}\n```\nDone.", form) == 0.0
    assert values("", form) == 0.0


def test_key_order_does_not_count_and_list_order_does():
    assert values('{"b": 1, "a": [1, 2]}', value={"a": [1, 2], "b": 1}) == 1.0
    assert values('{"b": 1, "a": [2, 1]}', value={"a": [1, 2], "b": 1}) == 0.0


@pytest.mark.parametrize(
    ("answer", "value"),
    [
        ('{"a": "28"}', {"a": 28}),
        ('{"a": 1}', {"a": True}),
        ('{"a": NaN}', {"a": 1}),
        ('{"a": 2, "a": 1}', {"a": 1}),
        ('{"a": 1, "b": 2}', {"a": 1}),
        ('{"a": 1}{"a": 1}', {"a": 1}),
        ("[" * 5000, {"a": 1}),
    ],
)
def test_json_is_strict(answer: str, value):
    assert values(answer, value=value) == 0.0


def test_numbers_are_equal_by_value():
    assert values('{"a": 28.0}', value={"a": 28}) == 1.0


def test_yaml_reads_dates_and_times_as_written():
    value = {"date": "2024-03-05", "start": "14:30", "answer": "no", "none": None}
    assert values("date: 2024-03-05\nstart: 14:30\nanswer: no\nnone:", "yaml", value) == 1.0
    assert values("date: '2024-03-05'\nstart: '14:30'\nanswer: 'no'\nnone: null", "yaml", value) == 1.0
    assert values("date: 2024-03-05\ndate: 2024-03-05", "yaml", {"date": "2024-03-05"}) == 0.0
    assert values("? [a]\n: 1", "yaml", {"a": 1}) == 0.0
    assert values("!!python/object/apply:os.getcwd []", "yaml", {"a": 1}) == 0.0


def test_xml_knows_null_lists_numbers_and_no_entities():
    assert values("<r><a/><b>2.50</b><c><item>x</item></c></r>", "xml", {"a": None, "b": 2.5, "c": ["x"]}) == 1.0
    assert values("<r><a>x</a></r>", "xml", {"a": None}) == 0.0
    assert values("<r><a><b>1</b></a></r>", "xml", {"a": 1}) == 0.0
    assert values('<!DOCTYPE r [<!ENTITY e "1">]><r><a>&e;</a></r>', "xml", {"a": 1}) == 0.0
    assert values("<r><a>1</a>", "xml", {"a": 1}) == 0.0


TEXT = st.text(st.characters(categories=["L"]), min_size=1, max_size=8)
SCALAR = st.one_of(st.none(), st.booleans(), st.integers(-(10**9), 10**9), TEXT)
TREE = st.recursive(
    SCALAR, lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXT, inner, max_size=3))
)


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(TEXT, TREE, max_size=4), st.sampled_from(["json", "yaml"]))
def test_whatever_is_rendered_is_right(value, form: str):
    assert values(render(value, form), form, value) == 1.0


def test_a_document_as_text_is_a_reference():
    row = chat("", '{"a": [1, "x"]}', "d", score="exact_values")
    assert score('```json\n{"a": [1, "x"]}\n```', row) == 1.0
    assert score('{"a": [1, "y"]}', row) == 0.0
    assert score("{}", chat("", "no document", "d", score="exact_values")) == 0.0


def test_exact_match_ignores_white_space_around():
    assert score(" 42\n", chat("", "42", "d")) == 1.0
    assert score("42.", chat("", "42", "d")) == 0.0
    assert score("x", chat("", "42", "d", reference="x")) == 1.0


@pytest.mark.parametrize(
    ("answer", "right"), [("so it is 1,042", 1.0), ("1042.0", 1.0), ("1042 or 7", 0.0), ("none", 0.0), ("-1042", 0.0)]
)
def test_number_takes_the_last(answer: str, right: float):
    assert score(answer, chat("", "#### 1042", "d", score="number")) == right


def test_code_is_run_against_its_tests(monkeypatch):
    row = chat("", "", "d", score="tests_passed", reference=["assert add(1, 2) == 3", "assert add(0, 0) == 0"])
    assert score("Sure:\n```python\ndef add(a, b):\n    return a + b\n```\nThat adds.", row) == 1.0
    assert score("def add(a, b):\n    return a + b", row) == 1.0
    assert score("def add(a, b):\n    return a - b", row) == 0.0
    assert score("def add(a, b)", row) == 0.0
    monkeypatch.setattr(scores, "run_python", partial(run_python, seconds=1))
    began = time.monotonic()
    assert score("while True: pass", row) == 0.0
    assert score("x = bytearray(3 << 30)\ndef add(a, b):\n    return a + b", row) == 0.0
    assert time.monotonic() - began < 20


def test_chrf_grows_with_likeness():
    row = chat("", "Der Hund schläft im Garten.", "d", score="chrf")
    assert score(row.answer, row) == pytest.approx(1.0)
    assert 1.0 > score("Der Hund schläft im Haus.", row) > score("A dog sleeps.", row) >= 0.0


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    return Qwen2ForCausalLM(config(initializer_range=0.3)).eval(), byte_tokenizer()


QUESTIONS = ["one two", "ten", "three four five six seven", "two", "nine nine nine"]


def test_batched_answers_are_the_single_ones_in_order(tiny):
    model, tokenizer = tiny
    prompts = [[{"role": "user", "content": q}] for q in QUESTIONS]
    singles = [generate(model, tokenizer, [p], max_new_tokens=12)[0] for p in prompts]
    assert generate(model, tokenizer, prompts, max_new_tokens=12, batch_size=3) == singles


@pytest.mark.parametrize("draft_tokens", [1, 60, 4096])
def test_drafts_change_no_answer(tiny, monkeypatch, draft_tokens: int):
    monkeypatch.setattr(generate_module, "DRAFT_TOKENS", draft_tokens)  # how many caches are joined
    model, tokenizer = tiny
    prompts = [[{"role": "user", "content": q}] for q in QUESTIONS]
    greedy = generate(model, tokenizer, prompts, max_new_tokens=12)
    drafts = [greedy[0], greedy[1][: len(greedy[1]) // 2] + "ten", "one two three", "", greedy[4] + " and more"]
    rows = [chat(q, d, "d") for q, d in zip(QUESTIONS, drafts, strict=True)]
    answered = answer_examples(model, tokenizer, rows, max_new_tokens=12, batch_size=3)
    assert [answer.text for answer in answered] == greedy
    nats, tokens = zip(*answer_losses(model, tokenizer, rows), strict=True)
    assert [answer.nats for answer in answered] == pytest.approx(nats, rel=1e-4)
    assert tuple(answer.tokens for answer in answered) == tokens


@pytest.mark.parametrize("stretch", [1, 5])
def test_rows_that_have_ended_leave_the_batch_and_change_no_answer(tiny, monkeypatch, stretch: int):
    model, _ = tiny
    tokenizer = byte_tokenizer()
    prompts = [[{"role": "user", "content": q}] for q in QUESTIONS]
    whole = generate(model, tokenizer, prompts, max_new_tokens=40)
    ends = [index for index in range(40) if len({text[index : index + 1] for text in whole}) > 1]
    tokenizer.eos_token = whole[0][ends[0]]  # some answers now end before others
    monkeypatch.setattr(generate_module, "STRETCH", 1000)
    ended = generate(model, tokenizer, prompts, max_new_tokens=40)
    assert len({len(text) for text in ended}) > 1
    monkeypatch.setattr(generate_module, "STRETCH", stretch)
    assert generate(model, tokenizer, prompts, max_new_tokens=40, batch_size=5) == ended
    rows = [chat(q, "three", "d") for q in QUESTIONS]
    assert [a.text for a in answer_examples(model, tokenizer, rows, 40, batch_size=5)] == ended
    limits = [3, 40, 1, 17, 8]
    cut = [answer_examples(model, tokenizer, [row], limit)[0].text for row, limit in zip(rows, limits, strict=True)]
    assert [a.text for a in answer_examples(model, tokenizer, rows, limits, batch_size=5)] == cut


def test_answer_losses_are_those_of_the_full_forward(tiny):
    model, tokenizer = tiny
    rows = [chat(q, a, "d") for q, a in zip(QUESTIONS, reversed(QUESTIONS), strict=True)]
    for row, (loss, count) in zip(rows, answer_losses(model, tokenizer, rows, batch_size=2), strict=True):
        ids = torch.tensor([tokenizer.apply_chat_template(list(row.messages), return_dict=False)])
        start = len(tokenizer.apply_chat_template(row.prompt, add_generation_prompt=True, return_dict=False))
        assert count == len(tokenizer(row.answer)["input_ids"]) + 1
        logits = model(input_ids=ids).logits[0, start - 1 : start - 1 + count]
        expected = torch.nn.functional.cross_entropy(logits, ids[0, start : start + count], reduction="sum")
        assert loss == pytest.approx(expected.item(), rel=1e-4)
