"""Rule labels: each kind of sign, the order of domains, the fallback, Chinese and other languages."""

from pathlib import Path
from typing import Any

import pytest

from fusion.errors import UserError
from fusion.language import detect_language
from fusion.recipe_file import load_recipe
from fusion.sections.data import DataSource, Domain, Rule
from gate_training.examples import expert_labels, routing_examples
from gate_training.labelling.rules import RuleLabel, label_by_rules, match
from tests.recipes import QUESTIONS, make_recipe

TARGET = Path(__file__).parents[2] / "configs" / "qwen2.5-7b-five-experts.yaml"


def domains(**rules: Any) -> dict[str, Domain]:
    """Domains by name, each with the fields of its rules."""
    data = DataSource(generated="demo.general")
    return {
        name: Domain(train=data, held_out=data, rules=tuple(Rule(**fields) for fields in given))
        for name, given in rules.items()
    }


@pytest.mark.parametrize(
    ("rule", "text", "evidence"),
    [
        ({"pattern": r"\d\s*\+\s*\d"}, "what is 17 + 25?", "pattern: '7 + 2'"),
        ({"pattern": r"\d\s*\+\s*\d"}, "what is a plus b?", None),
        ({"pattern": "select .+ from"}, "SELECT a FROM b", "pattern: 'SELECT a FROM'"),
        ({"words": ["code"]}, "Write CODE, please", "word: 'CODE'"),
        ({"words": ["code"]}, "decode this", None),
        ({"words": ["c++"]}, "in C++, please", "word: 'C++'"),
        ({"words": ["c++"]}, "in C, please", None),
        ({"words": ["how many", "sum"]}, "How many are there?", "word: 'How many'"),
        ({"words": ["代码"]}, "写一段 代码。", "word: '代码'"),
        ({"words": ["代码"]}, "请帮我写代码吧", "word: '代码'"),
        ({"words": ["计算"]}, "计算三加四", "word: '计算'"),
        ({"not_languages": ["zh", "en"]}, "Pourquoi le ciel est-il bleu pendant la journée ?", "language: fr"),
        ({"not_languages": ["zh", "en"]}, "Why is the sky blue during the day?", None),
        ({"not_languages": ["zh", "en"]}, "为什么白天的天空是蓝色的？", None),
        ({"words": ["sum"], "pattern": "="}, "a = b", "pattern: '='"),
        ({"words": ["sum"], "pattern": "="}, "the sum", "word: 'sum'"),
    ],
)
def test_each_kind_of_sign(rule: dict[str, Any], text: str, evidence: str | None) -> None:
    assert match(Rule(**rule), text) == evidence


def test_the_first_domain_that_matches_wins() -> None:
    code, sums = [{"words": ["code"]}], [{"words": ["sum"]}]
    text = "code that computes a sum"
    assert label_by_rules(text, domains(coding=code, math=sums)).domain == "coding"
    assert label_by_rules(text, domains(math=sums, coding=code)).domain == "math"


def test_any_rule_of_a_domain_is_enough() -> None:
    found = label_by_rules("3 = 3", domains(math=[{"words": ["sum"]}, {"pattern": "="}], general=[]))
    assert found == RuleLabel("math", "pattern: '='")


def test_what_no_rule_claims_goes_to_the_first_domain_without_rules() -> None:
    code = [{"words": ["code"]}]
    nothing = "no rule matched"
    assert label_by_rules("Hello!", domains(coding=code, general=[], other=[])) == RuleLabel("general", nothing)
    assert label_by_rules("Hello!", domains(coding=code)) == RuleLabel("coding", nothing)


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("The weather is very nice today, let us go to the park.", "en"),
        ("Das Wetter ist heute sehr schön, gehen wir in den Park.", "de"),
        ("El tiempo es muy agradable hoy, vamos al parque.", "es"),
        ("今天天气很好，我们去公园吧。", "zh"),
        ("今日はとても天気がいいので公園に行きましょう。", "ja"),
        ("Сегодня очень хорошая погода, пойдём в парк.", "ru"),
    ],
)
def test_languages_are_told_apart(text: str, language: str) -> None:
    assert detect_language(text) == language


@pytest.mark.parametrize("text", ["ᏣᎳᎩ ᎦᏬᏂᎯᏍᏗ ᎠᏂᏃᎮᏍᎩ", "qapla' nuqneH tlhIngan maH", "ߒߞߏ ߞߊ߲ ߦߋ߫", "12 + 5"])
def test_a_language_that_the_detector_does_not_know_is_none(text: str) -> None:
    assert detect_language(text) is None
    assert label_by_rules(text, domains(foreign=[{"not_languages": ["en", "zh"]}], general=[])).domain == "general"


@pytest.mark.parametrize(
    ("question", "domain"),
    [
        ("Write a Python function that merges two sorted lists.", "coding"),
        ("写一个 Python 函数，合并两个有序列表。", "coding"),
        ("请编写一段代码来反转字符串", "coding"),
        ("Solve the equation for x.", "math"),
        ("17+25=", "math"),
        ("请计算三角形的面积", "math"),
        ("张三，28岁，软件工程师。返回 JSON，字段为 name、age。", "structured"),
        ("Extract the name and return JSON.", "structured"),
        ("Explique en trois phrases pourquoi le ciel est bleu.", "multilingual"),
        ("Translate 'good morning' into German.", "multilingual"),
        ("What should I see in Beijing in two days?", "general"),
        ("北京两天应该看什么？", "general"),
        ("Hello!", "general"),
        ("你好", "general"),
    ],
)
def test_the_target_recipes_trigger_table(question: str, domain: str) -> None:
    assert label_by_rules(question, load_recipe(TARGET).domains).domain == domain


def test_rules_label_the_examples_where_the_recipe_says_so(tmp_path: Path, anchor: Path) -> None:
    experts = dict.fromkeys(("general", "math", "coding"), anchor)
    recipe = make_recipe(tmp_path, anchor, experts, gate_training={"labels": "rules"})
    ruled = dict(recipe.domains)
    ruled["math"] = ruled["math"].model_copy(update={"rules": (Rule(pattern=r"\d"),)})
    ruled["coding"] = ruled["coding"].model_copy(update={"rules": (Rule(words=("def", "class")),)})
    found = routing_examples(recipe.model_copy(update={"domains": ruled}), "train", 4)
    assert {example.label.source for example in found} == {"rules"}
    by_question = {example.example.question: example.domain for example in found}
    assert {by_question[q] for q in QUESTIONS["math"]} == {"math"}
    assert [by_question[q] for q in QUESTIONS["coding"]] == ["coding", "coding", "general", "general"]


def test_the_data_label_the_examples_by_default(tmp_path: Path, anchor: Path) -> None:
    recipe = make_recipe(tmp_path, anchor, dict.fromkeys(("general", "math", "coding"), anchor))
    found = routing_examples(recipe, "held_out", 3)
    assert [example.domain for example in found] == ["general"] * 3 + ["math"] * 3 + ["coding"] * 3
    assert all(example.example.question in QUESTIONS[example.domain] for example in found)
    assert expert_labels(recipe, found) == [0] * 3 + [1] * 3 + [2] * 3
    assert found[0].label.source == "data"


def test_a_domain_without_an_expert_trains_that_of_its_fallback(tmp_path: Path, anchor: Path) -> None:
    recipe = make_recipe(tmp_path, anchor, dict.fromkeys(("general", "math", "coding"), anchor))
    poetry = recipe.domains["general"].model_copy(update={"fallback": "coding"})
    recipe = recipe.model_copy(update={"domains": {**recipe.domains, "poetry": poetry}})
    found = routing_examples(recipe, "train", 2)
    assert expert_labels(recipe, found) == [0, 0, 1, 1, 2, 2, 2, 2]


def test_an_expert_without_examples_is_a_user_error(tmp_path: Path, anchor: Path) -> None:
    experts = dict.fromkeys(("general", "math"), anchor)
    recipe = make_recipe(tmp_path, anchor, experts, gate_training={"labels": "rules"})
    with pytest.raises(UserError, match="expert 'math' has no routing example"):
        routing_examples(recipe, "train", 4)
