"""Sampled answers: what counts as right, what is learnt of it, going on after a kill, and the road through vLLM."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from fusion import road_experts
from fusion.architecture import is_mlp
from fusion.branch import train_expert
from fusion.checkpoint import Checkpoint, read_json
from fusion.data import ChatExample, chat, general_rows
from fusion.encoding import load_tokenizer, prompt_text
from fusion.errors import UserError
from fusion.evaluation.generate import answer_examples
from fusion.sampled import RIGHT, Sampler, verdict
from fusion.sections.data import DataSource
from fusion.sections.serving import Serving
from fusion.sections.training import AnchoringSettings, AnswerSampling, BranchSettings
from fusion.sources import ModelSource, whole_model
from fusion.steps import step_hash
from tests.families import byte_tokenizer, write_model
from tests.recipes import make_recipe
from tests.serving.upstream import DROP, Upstream, completion

FRENCH = "Le temps est beau aujourd'hui et je voudrais aller me promener dans le parc."
TESTS = ["assert twice(2) == 4"]
CODE = "Here it is:\n```python\ndef twice(x):\n    return {}\n```\nThat is all."
DOCUMENT = {"format": "json", "value": {"age": 28}}
SCHEMA = {"type": "object", "properties": {"age": {"type": "integer", "maximum": 20}}}


@pytest.mark.parametrize(
    ("score", "reference", "text", "expected"),
    [
        ("number", "so #### 42", "Six times seven is \\boxed{42}.", RIGHT),
        ("number", "so #### 42", "It is 42, or 43.", "wrong"),
        ("number", "so #### 42", "I do not know.", "wrong"),
        ("tests_passed", TESTS, CODE.format("2 * x"), RIGHT),
        ("tests_passed", TESTS, CODE.format("x + 1"), "wrong"),
        ("exact_values", DOCUMENT, '```json\n{"age": 28}\n```', RIGHT),
        ("exact_values", DOCUMENT, '{"age": "28"}', "wrong"),
        ("exact_match", "moon tree", " moon tree\n", RIGHT),
        ("exact_match", "moon tree", "moon trees", "wrong"),
        ("exact_match", "", " \n", "empty"),
        ("chrf", FRENCH, FRENCH.replace("beau", "magnifique"), RIGHT),
        ("chrf", FRENCH, "Le chat mange une souris grise derrière la maison de ma grand-mère.", "unlike"),
        ("chrf", FRENCH, "The weather is beautiful today and I would like to go for a walk in the park.", "language"),
        ("chrf", "12 + 5", "12 + 5", RIGHT),  # in no language that could be told
    ],
)
def test_an_answer_is_right_by_the_rows_own_score(score: str, reference: Any, text: str, expected: str) -> None:
    row = chat("?", str(reference), "d", score=score, reference=reference)
    assert verdict(text, "stop", row, 0.5) == expected
    if expected == RIGHT:
        assert verdict(text, "length", row, 0.5) == "cut"


def test_a_right_number_in_another_language_is_not_learnt() -> None:
    row = chat("How many apples are left in the basket after lunch?", "5", "math", score="number")
    assert verdict("After lunch there are five apples left in the basket: 5", "stop", row, 0.5) == RIGHT
    assert verdict("午饭后篮子里还剩下苹果，一共有5", "stop", row, 0.5) == "language"
    assert verdict("\\boxed{5}", "stop", row, 0.5) == RIGHT


def test_right_values_that_break_the_schema_are_not_learnt() -> None:
    row = chat("?", "", "d", score="exact_values", reference=DOCUMENT, schema=SCHEMA)
    assert verdict('{"age": 28}', "stop", row, 0.5) == "schema"
    assert verdict("28 years", "stop", row, 0.5) == "schema"
    looser = chat("?", "", "d", score="exact_values", reference=DOCUMENT, schema={"type": "object"})
    assert verdict('{"age": 28}', "stop", looser, 0.5) == RIGHT


def test_a_schema_that_is_none_is_told_before_anyone_is_asked(sampler: Sampler, tmp_path: Path) -> None:
    row = chat("?", "", "d", score="exact_values", reference=DOCUMENT, schema={"type": "whatever"})
    with pytest.raises(UserError, match="schema cannot be used"):
        sampler.ask([row], Serving(), tmp_path / "log")


def sums(count: int, start: int = 0) -> list[ChatExample]:
    return [chat(f"{i}+{i}=", f"{2 * i}", "math", score="number") for i in range(start, start + count)]


@pytest.fixture
def sampler(tmp_path: Path, anchor: Path) -> Sampler:
    settings = AnswerSampling(samples=3, keep=2, questions_at_once=1)
    return Sampler(ModelSource("anchor", anchor), settings, tmp_path / "samples" / "math.jsonl")


def changed(sampler: Sampler, **settings: Any) -> Sampler:
    made = sampler.settings.model_copy(update=settings)
    return Sampler(sampler.teacher, made, sampler.store, sampler.imitate)


def test_different_right_answers_are_learnt_in_their_order_up_to_keep(sampler: Sampler) -> None:
    rows = sums(3)
    script = [
        completion("it is 0", "it  is 0\n", "1"),
        completion("a long way to 2", "2", "yes, 2"),
        completion("5", "6", "7"),
    ]
    with Upstream(*script) as upstream:
        sampler.ask_server(upstream.url, rows)
    learnt, brought = sampler.learnt(rows)
    assert [(row.question, row.answer) for row in learnt] == [
        ("0+0=", "it is 0"),
        ("1+1=", "a long way to 2"),
        ("1+1=", "2"),
    ]
    assert (brought.questions, brought.answered, brought.answers, brought.verified) == (3, 2, 9, 5)
    assert (brought.learnt, brought.tokens) == (3, 15)
    with_reference, _ = changed(sampler, unanswered="reference", keep=1).learnt(rows)
    assert [row.answer for row in with_reference] == ["it is 0", "a long way to 2", "4"]


def test_requests_ask_for_all_samples_and_repeat_themselves(sampler: Sampler) -> None:
    with Upstream(completion("0")) as upstream:
        sampler.ask_server(upstream.url, sums(2))
        sampler.store.unlink()
        sampler.ask_server(upstream.url, sums(2))
        first, second, again, _ = upstream.requests
    assert (first["n"], first["temperature"], first["top_p"], first["max_tokens"]) == (3, 0.7, 1.0, 512)
    assert first["messages"] == [{"role": "user", "content": "0+0="}]
    assert first == again
    assert first["seed"] != second["seed"]


PREAMBLE = [
    {"role": "system", "content": "Say the sum alone."},
    {"role": "user", "content": "1+2="},
    {"role": "assistant", "content": "3"},
]


def test_a_preamble_goes_before_every_question_and_is_not_learnt(sampler: Sampler) -> None:
    settings = AnswerSampling.model_validate({"preamble": PREAMBLE, "samples": 3, "questions_at_once": 1})
    told = Sampler(sampler.teacher, settings, sampler.store)
    told_before = ChatExample(({"role": "system", "content": "In full."}, *sums(1)[0].messages), "math", score="number")
    with Upstream(completion("0")) as upstream:
        told.ask_server(upstream.url, [*sums(1), told_before])
        plain, own = (request["messages"] for request in upstream.requests)
    assert plain == [*PREAMBLE, {"role": "user", "content": "0+0="}]
    assert own == [{"role": "system", "content": "In full."}, *PREAMBLE[1:], {"role": "user", "content": "0+0="}]
    assert [row.prompt for row in told.learnt(sums(1))[0]] == [sums(1)[0].prompt]
    assert sampler.missing(sums(1)) == sums(1)


def test_a_question_that_leaves_no_room_for_an_answer_is_left_out(
    sampler: Sampler, capsys: pytest.CaptureFixture[str]
) -> None:
    length = len(load_tokenizer(sampler.teacher.folder)(prompt_text(byte_tokenizer(), sums(1)[0].prompt))["input_ids"])
    long = chat("how much is " + "1+" * 40 + "1=", "41", "math", score="number")
    fits, short = (changed(sampler, max_model_len=length + more, max_tokens=40) for more in (40, 39))
    assert fits._fitting([*sums(1), long]) == sums(1)
    assert "1 questions over" in capsys.readouterr().err
    assert short._fitting(sums(1)) == []
    told = changed(fits, preamble=AnswerSampling.model_validate({"preamble": PREAMBLE}).preamble)
    assert told._fitting(sums(1)) == []


@pytest.mark.parametrize("turns", [PREAMBLE[:2], PREAMBLE[2:], PREAMBLE[1:] + PREAMBLE[:1]])
def test_a_preamble_of_half_a_turn_is_refused(turns: list[dict[str, str]]) -> None:
    with pytest.raises(ValueError, match="questions of the user with their answers"):
        AnswerSampling.model_validate({"preamble": turns})


def test_a_killed_call_goes_on_behind_its_last_whole_line(sampler: Sampler) -> None:
    sampler = changed(sampler, questions_at_once=1)  # lines come in the order of the answers
    rows = sums(5)
    script = [completion(f"it is {2 * i}", "no", "no") for i in range(5)]
    with Upstream(*script) as upstream:
        sampler.ask_server(upstream.url, rows)
    whole = sampler.learnt(rows)[0]
    lines = sampler.store.read_bytes().splitlines(keepends=True)
    assert len(lines) == 5
    sampler.store.write_bytes(b"".join(lines[:3]) + lines[3][:40])
    assert sampler.missing(rows) == rows[3:]
    with Upstream(*script[3:]) as upstream:
        sampler.ask_server(upstream.url, sampler.missing(rows))
        assert [request["messages"] for request in upstream.requests] == [row.prompt for row in rows[3:]]
    assert sampler.store.read_bytes().count(b"\n") == 5
    assert sampler.missing(rows) == []
    assert sampler.learnt(rows)[0] == whole


def test_a_server_that_dies_costs_the_question_it_was_asked(sampler: Sampler) -> None:
    rows = sums(4)
    with Upstream(completion("0"), completion("2"), DROP) as upstream, pytest.raises(UserError, match="no answer from"):
        sampler.ask_server(upstream.url, rows)
    assert sampler.missing(rows) == rows[2:]


def test_what_decides_the_answers_decides_what_is_asked_again(sampler: Sampler, tmp_path: Path) -> None:
    rows = sums(2)
    with Upstream(completion("0", "1", "2")) as upstream:
        sampler.ask_server(upstream.url, rows)
    assert not sampler.missing(rows)
    assert not changed(sampler, keep=1, questions_at_once=9, max_model_len=999, unanswered="reference").missing(rows)
    assert sampler.missing(sums(3)) == sums(1, 2)
    for setting in ({"samples": 4}, {"temperature": 0.6}, {"top_p": 0.5}, {"max_tokens": 9}, {"seed": 1}):
        assert changed(sampler, **setting).missing(rows) == rows
    other = ModelSource("anchor", write_model(tmp_path / "other", seed=9))
    assert Sampler(other, sampler.settings, sampler.store).missing(rows) == rows


def test_nothing_right_and_a_broken_line_are_sentences(sampler: Sampler) -> None:
    with Upstream(completion("x")) as upstream:
        sampler.ask_server(upstream.url, sums(2))
    with pytest.raises(UserError, match="none of the 2 answers that anchor gave to 2 questions is right"):
        sampler.learnt(sums(2))
    sampler.store.write_text('{"key": 1}\nhello\n', encoding="utf-8")
    with pytest.raises(UserError, match="line 2: not a sampled question"):
        sampler.missing(sums(2))


def test_imitated_answers_without_a_verdict_are_greedy(sampler: Sampler) -> None:
    imitator = Sampler(sampler.teacher, sampler.settings, sampler.store, imitate=True)
    rows = [chat("?", FRENCH, "d", score="chrf"), *sums(1)]
    unlike = "Le chat mange une souris grise derrière la maison de ma grand-mère."
    with Upstream(completion(unlike), completion("0", "1", "0!")) as upstream:
        imitator.ask_server(upstream.url, rows)
        greedy, drawn = upstream.requests
    assert (greedy["n"], greedy["temperature"]) == (1, 0.0)
    assert (drawn["n"], drawn["temperature"]) == (3, 0.7)
    assert [row.answer for row in imitator.learnt(rows)[0]] == [unlike, "0", "0!"]
    assert sampler.missing(rows) == rows[:1]


TRAINING: dict[str, Any] = {
    "steps": 40,
    "batch_rows": 8,
    "max_length": 128,
    "warmup_steps": 2,
    "learning_rate": 1e-2,
    "evaluate_every": 20,
    "held_out_rows": 4,
    "score_rows": 4,
    "max_new_tokens": 12,
    "allow_no_gain": True,
}


def requests_for(answers: list[str], start: int = 0) -> list[ChatExample]:
    return [chat(f"say {i}, {'please ' * 6}", answer, "math") for i, answer in enumerate(answers, start)]


def write_data(path: Path, rows: list[ChatExample]) -> DataSource:
    path.write_text("\n".join(json.dumps({"messages": row.messages}) for row in rows), encoding="utf-8")
    return DataSource(path=str(path))


def test_general_rows_suffice_for_all_answers_that_may_be_kept(tmp_path: Path, anchor: Path) -> None:
    recipe = make_recipe(tmp_path, anchor, {"general": anchor, "math": anchor})
    plain = BranchSettings(data=recipe.domains["math"].train, rows=2, general_share=0.5)
    sampled = plain.model_copy(update={"answers": "sampled", "sampling": AnswerSampling(samples=2, keep=2)})
    assert (len(general_rows(recipe, plain)), len(general_rows(recipe, sampled))) == (2, 4)


def test_a_teacher_with_an_adapter_is_served_as_a_whole(tmp_path: Path, anchor: Path) -> None:
    lora = BranchSettings(data=DataSource(generated="demo.math"), lora_rank=4, **{**TRAINING, "steps": 4})
    train_expert(anchor, tmp_path / "adapter", requests_for(["moon"] * 8), requests_for(["moon"] * 2, 90), lora)
    plain, adapted = ModelSource("plain", anchor), ModelSource("adapted", anchor, tmp_path / "adapter")
    with whole_model(plain) as folder:
        assert folder == anchor
    with whole_model(adapted) as folder:
        made, ours = Checkpoint(folder), Checkpoint(anchor)
        moved = {name for name in ours.weight_map if not torch.equal(made.tensor(name), ours.tensor(name))}
        assert moved and all(map(is_mlp, moved))
        assert load_tokenizer(folder).chat_template == load_tokenizer(anchor).chat_template
    assert not folder.exists()


def test_text_anchoring_learns_what_the_teacher_writes(tmp_path: Path, anchor: Path) -> None:
    drifted = write_model(tmp_path / "drifted", seed=5, anchor=anchor, drift=True)
    recipe = make_recipe(tmp_path, anchor, {"general": anchor, "math": drifted})
    data = write_data(tmp_path / "data.jsonl", requests_for(["moon", "sun"] * 16))
    held_out = write_data(tmp_path / "held-out.jsonl", requests_for(["moon"] * 4, 100))
    sampling = AnswerSampling(samples=2, questions_at_once=1)
    section = AnchoringSettings(method="text", data=data, held_out=held_out, sampling=sampling, **TRAINING)
    expert = recipe.experts[1].model_copy(update={"anchor": section})
    recipe = recipe.model_copy(update={"experts": (recipe.experts[0], expert)})
    sampler = road_experts._sampler(recipe, expert, section)
    assert sampler is not None and sampler.teacher.folder == drifted
    with Upstream(completion("moon", "lake")) as upstream:  # `sun` is never right
        sampler.ask_server(upstream.url, road_experts._rows(recipe, expert, section)[0])
    road_experts.anchor(recipe)  # every question has its answers: no engine is started
    out = recipe.folder / "anchored" / "math"
    noted = read_json(out / "anchoring.json")
    assert noted["sampling"]["questions"] == 32
    assert noted["sampling"]["learnt"] == noted["sampling"]["answered"] == 16
    assert noted["scores"]["anchored"] > 0.5 > noted["scores"]["expert"]
    made, ours = Checkpoint(out), Checkpoint(anchor)
    moved = {name for name in ours.weight_map if not torch.equal(made.tensor(name), ours.tensor(name))}
    assert moved and all(map(is_mlp, moved))


def test_an_expert_learns_a_teachers_verified_answers_through_vllm(
    tmp_path: Path, anchor: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    taught = BranchSettings(data=DataSource(generated="demo.math"), trainable="all", **TRAINING)
    teacher = tmp_path / "teacher"
    train_expert(anchor, teacher, requests_for(["moon tree"] * 64), requests_for(["moon tree"] * 4, 90), taught)

    recipe = make_recipe(tmp_path, anchor, {"general": anchor, "math": anchor})
    recipe = recipe.model_copy(
        update={"serving": recipe.serving.model_copy(update={"dtype": "float32", "cpu_kv_cache_bytes": 64 << 20})}
    )
    section = BranchSettings(
        data=write_data(tmp_path / "data.jsonl", requests_for(["moon tree", "lake"] * 16)),
        held_out=write_data(tmp_path / "held-out.jsonl", requests_for(["moon tree"] * 4, 100)),
        answers="sampled",
        teacher=str(teacher),
        # 32 prompts of 60 tokens three times are more than vLLM reads in one step
        sampling=AnswerSampling(samples=3, temperature=0.3, max_tokens=24, max_model_len=128, questions_at_once=32),
        **TRAINING,
    )
    expert = recipe.experts[1].model_copy(update={"model": None, "branch": section})
    recipe = recipe.model_copy(update={"experts": (recipe.experts[0], expert)})
    road_experts.branch(recipe)

    out, store = recipe.folder / "experts" / "math", recipe.folder / "samples" / "math.jsonl"
    noted = read_json(out / "branch.json")["sampling"]
    assert (noted["questions"], noted["answers"]) == (32, 96)
    assert 8 <= noted["answered"] <= 16 and noted["learnt"] == noted["answered"] <= noted["verified"]
    assert noted["tokens"] >= 96 * len("moon tree") * 0.5 and noted["seconds"] > 0
    printed = capfd.readouterr().err
    assert "sample math" in printed and "32 questions, 96 answers" in printed and "tokens/s" in printed
    assert not (out / store.name).exists()
    for line in map(json.loads, store.read_text(encoding="utf-8").splitlines()):
        assert all((a["verdict"] == RIGHT) == (a["text"].strip() == line["reference"]) for a in line["answers"])
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    answers = answer_examples(model, byte_tokenizer(), requests_for(["moon tree"] * 4, 200), 12, 4, "answers")
    assert [answer.text for answer in answers] == ["moon tree"] * 4

    road_experts.branch(recipe)
    printed = capfd.readouterr().err
    assert "every question has its answers" in printed and "branch math: unchanged" in printed
    warmer = section.sampling.model_copy(update={"temperature": 0.5})
    hotter = expert.model_copy(update={"branch": section.model_copy(update={"sampling": warmer})})
    weights = teacher / "model.safetensors"
    before = [step_hash(road_experts._branch_step(recipe, e)) for e in (expert, hotter)]
    assert before[0] != before[1]
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\1")
    assert step_hash(road_experts._branch_step(recipe, expert)) != before[0]


def test_the_last_questions_answers_are_held_back() -> None:
    rows = [row for row in sums(10) for _ in range(2)]
    assert road_experts._held_back(rows, 1) == (rows[:18], rows[18:])
    assert road_experts._held_back(rows, 16) == (rows[:16], rows[16:])  # a fifth at most
    assert road_experts._held_back(rows[:6], 16) == (rows[:6], [])
