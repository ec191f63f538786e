"""Generated chat tasks for a real model that need no hub: what an assistant is asked besides structured output.

`general`, `coding`, `math` and `multilingual`, in English and Chinese (`multilingual` in more), each with right and
natural answers. Many rows speak of JSON, dates, names or prices, or are lists, but none is answered with a document.
An item's key (function and name, numbers, sentence, question) decides its split. Print some:

    python -m fusion.tasks.assistant coding held_out 8
"""

import random
from collections.abc import Callable

from fusion.data import ChatExample, chat, split_of
from fusion.errors import UserError, counted, run_main
from fusion.tasks.assistant_code import FUNCTIONS, Function
from fusion.tasks.assistant_math import PROBLEMS
from fusion.tasks.assistant_texts import ASKED, COUNTRIES, PAIRS, REQUESTS, SENTENCES, TONGUES
from fusion.tasks.extraction import FIRST_EN, GIVEN_ZH, SURNAMES_ZH, meeting, order, person

ASK_CODE = {
    "en": (
        "Write a Python function `{f}({a})` that {task}.",
        "Can you write a function called {f} in Python that {task}?",
        "I need a Python function {f}({a}) that {task}. Please keep it short.",
        "Implement {f}({a}) in Python: a function that {task}.",
        "Write a Python function that {task}. Your code should pass this test:\n{test}",
        "How can I write a function named `{f}` which {task}?",
    ),
    "zh": (
        "用 Python 写一个函数 {f}({a})，{task}。",
        "请实现 Python 函数 `{f}`：{task}。",
        "帮我写一个名为 {f} 的 Python 函数，要求{task}。",
        "怎么用 Python {task}？函数名用 {f}，参数为 {a}。",
        "编写 Python 函数：{task}。代码需要通过测试：\n{test}",
    ),
}
OPEN_CODE = {
    "en": (
        "Here is a Python function that {task}:",
        "Certainly! The function `{f}` {task}:",
        "You can do it like this:",
        "Sure, here's `{f}`:",
    ),
    "zh": ("下面是 `{f}` 函数的实现：", "当然可以，代码如下：", "可以用下面的 Python 函数来实现：", "以下是实现代码："),
}
ASK_MATH = {
    "en": ("{}", "{}", "{} Think step by step.", "Please solve this problem: {}", "{} Explain your steps."),
    "zh": ("{}", "{}", "{}请写出步骤。", "请解答下面的应用题：{}", "{}请一步步计算。"),
}
END_MATH = {
    "en": ("The answer is {}.", "So the answer is {}.", "Therefore, the answer is **{}**.", "Answer: {}"),
    "zh": ("答案是 {}。", "所以答案是 {}。", "因此，答案是 **{}**。", "答案：{}"),
}
GOODS = {"en": ("book", "toy", "ticket", "mug", "lamp", "notebook"), "zh": ("玩具", "杯子", "台灯", "书包", "本子")}
EN_COUNTRY = (
    (
        "What is the capital of {0}?",
        "Tell me the capital of {0} and its currency.",
        "Which language is spoken in {0}?",
        "Where is {0}, and what is its capital?",
    ),
    (
        "The capital of {0} is {1}.",
        "The capital of {0} is {1}, and its currency is {2}.",
        "The main language of {0} is {3}. The capital of the country is {1}.",
        "{0} is in {4}. Its capital is {1}, and the main language is {3}.",
    ),
)
ZH_COUNTRY = (
    ("{0}的首都是哪里？", "请告诉我{0}的首都和货币。", "{0}人说什么语言？", "{0}在哪个洲？首都是哪里？"),
    (
        "{0}的首都是{1}。",
        "{0}的首都是{1}，使用的货币是{2}。",
        "{0}的主要语言是{3}，首都是{1}。",
        "{0}位于{4}，首都是{1}，主要语言是{3}。",
    ),
)


def _of_split(rng: random.Random, split: str, draw: Callable[[], tuple[str, tuple]]) -> tuple:
    """What `draw` gives beside its key, drawn until the key belongs to `split`."""
    while True:
        key, item = draw()
        if split_of(key) == split:
            return item


def coding(rng: random.Random, split: str) -> ChatExample:
    """A Python function with a given name: one sentence, the code in a fence, one remark; scored by its tests."""

    def draw() -> tuple[str, tuple[Function, str]]:
        function = rng.choice(FUNCTIONS)
        name = rng.choice(function.names.split())
        return f"{function.code}/{name}", (function, name)

    function, name = _of_split(rng, split, draw)
    lang = rng.choice(("en", "zh"))
    task = function.en if lang == "en" else function.zh
    tests = [test.replace("{f}", name) for test in function.tests]
    blanks = {"f": name, "a": function.arguments, "task": task, "test": tests[0]}
    question = rng.choice(ASK_CODE[lang]).format(**blanks)
    opening = rng.choice(OPEN_CODE[lang]).format(**blanks)
    remark = function.remark_en if lang == "en" else function.remark_zh
    answer = f"{opening}\n\n```python\n{function.code.replace('{f}', name)}\n```\n\n{remark}"
    return chat(question, answer, "coding", score="tests_passed", reference=tests)


def math(rng: random.Random, split: str) -> ChatExample:
    """A word problem solved in short steps that end with the number."""

    def draw() -> tuple[str, tuple[int, dict[str, int]]]:
        index = rng.randrange(len(PROBLEMS))
        problem = PROBLEMS[index]
        drawn = {name: rng.randint(*bounds) for name, bounds in problem.ranges.items()}
        return f"{index}/{sorted(drawn.items())}", (index, drawn | problem.solve(**drawn))

    index, numbers = _of_split(rng, split, draw)
    lang = rng.choice(("en", "zh"))
    name = rng.choice(FIRST_EN) if lang == "en" else rng.choice(SURNAMES_ZH) + rng.choice(GIVEN_ZH)
    words = {"n": name, "g": rng.choice(GOODS[lang])}
    question, steps = (text.format(**numbers, **words) for text in getattr(PROBLEMS[index], lang))
    end = rng.choice(END_MATH[lang]).format(numbers["r"])
    return chat(
        rng.choice(ASK_MATH[lang]).format(question), f"{steps}\n{end}", "math", score="number", reference=numbers["r"]
    )


def general(rng: random.Random, split: str) -> ChatExample:
    """A question with its answer, a fact about a country, or a request about a text that is not for its record."""
    kind = rng.random()
    if kind < 0.6:
        asked, answer = _of_split(rng, split, lambda: (lambda pair: (pair[0], pair))(rng.choice(PAIRS)))
        question = rng.choice(asked.split("|"))
    elif kind < 0.75:
        question, answer = _country(rng, split)
    else:
        question, answer = rng.choice((_introduce, _confirm, _remind))(rng, split, rng.choice(("en", "zh")))
    return chat(question, answer, "general", score="chrf")


def _country(rng: random.Random, split: str) -> tuple[str, str]:
    def draw() -> tuple[str, tuple]:
        names, form = rng.choice(COUNTRIES), rng.randrange(4)
        return names[0][0], (names, form)

    (en, zh), form = _of_split(rng, split, draw)
    (questions, answers), facts = rng.choice(((EN_COUNTRY, en), (ZH_COUNTRY, zh)))
    return questions[form].format(*facts), answers[form].format(*facts)


def _introduce(rng: random.Random, split: str, lang: str) -> tuple[str, str]:
    text, who, _ = person(rng, split, lang)
    name, age, job, city = who["name"], who["age"], who["occupation"], who["city"]
    if lang == "zh":
        home = f"目前生活在{city}，" if city else ""
        return (
            f"{text}请写一句欢迎词介绍这位新同事。",
            f"请欢迎新同事{name}！{name}今年{age}岁，是一名{job}，{home}期待和大家合作。",
        )
    where = f" from {city}" if city else ""
    return (
        f"{text} Write a short welcome message for this new colleague.",
        f"Please give a warm welcome to {name}, {'an' if job[0] in 'aeiou' else 'a'} {job}{where}! "
        f"{name.split()[0]} is {age} and looks forward to working with all of us.",
    )


def _confirm(rng: random.Random, split: str, lang: str) -> tuple[str, str]:
    text, bought, _ = order(rng, split, lang)
    number, lines = bought["order_id"], bought["items"]
    if lang == "zh":
        goods = "和".join(f"{line['quantity']}个{line['product']}" for line in lines)
        return (
            f"{text}请给客户回一条确认短信。",
            f"您好！您的订单{number}已确认，包括{goods}。我们会尽快为您发货，感谢您的支持！",
        )
    goods = " and ".join(f"{line['quantity']} x {line['product']}" for line in lines)
    return (
        f"{text} Write a short confirmation to the customer.",
        f"Dear customer,\n\nthank you for your order {number}. We have received your request for {goods} and will ship "
        "it soon.\n\nKind regards",
    )


def _remind(rng: random.Random, split: str, lang: str) -> tuple[str, str]:
    text, _, _ = meeting(rng, split, lang)
    if lang == "zh":
        return (
            f"{text}帮我写一句提醒，语气友好一点。",
            f"温馨提醒：{text.rstrip('。')}。请大家准时参加，提前准备好相关材料，谢谢！",
        )
    return (
        f"{text} Turn this into a friendly reminder for the team.",
        f"Hi everyone, just a friendly reminder: {text} Please be on time and bring your questions. See you there!",
    )


def multilingual(rng: random.Random, split: str) -> ChatExample:
    """One or two sentences to translate, or a question asked and answered in another language than en and zh."""
    if rng.random() < 0.3:
        question, answer = _of_split(rng, split, lambda: (lambda pair: (pair[0], pair))(rng.choice(ASKED)))
        return chat(question, answer, "multilingual", score="chrf")

    def sentence() -> dict[str, str]:
        return _of_split(rng, split, lambda: (lambda s: (s["en"], (s,)))(rng.choice(SENTENCES)))[0]

    first, second = sentence(), sentence()
    texts = [first] if rng.random() < 0.3 or first == second else [first, second]
    asker = rng.choice(("en", "zh"))
    source, target = rng.sample(tuple(TONGUES), 2)
    source_text, answer = (
        ("" if lang in ("zh", "ja") else " ").join(text[lang] for text in texts) for lang in (source, target)
    )
    said = TONGUES[target][0 if asker == "en" else 1]
    question = rng.choice(REQUESTS[asker]).format(t=said, s=source_text)
    return chat(question, answer, "multilingual", score="chrf")


GENERATORS: dict[str, Callable[[random.Random, str], ChatExample]] = {
    "general": general,
    "coding": coding,
    "math": math,
    "multilingual": multilingual,
}


def main(task: str = "general", split: str = "held_out", rows: str = "8") -> None:
    """Prints some rows."""
    if task not in GENERATORS:
        raise UserError(f"there is no task '{task}': name one of {', '.join(GENERATORS)}")
    chance = random.Random(0)
    for _ in range(counted(rows)):
        row = GENERATORS[task](chance, split)
        print(row.question, row.answer, sep="\n-> ", end="\n\n")


if __name__ == "__main__":
    run_main(main)
