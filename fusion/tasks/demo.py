"""Generated tasks of the demo family, each small enough for a model of 3 million parameters to learn in seconds.

Five domains (`general`, `coding`, `math`, `multilingual`, `structured`), `finance` as a sixth that a recipe can add,
`mixed`, which needs several of them at once, and `anchor`, what the common start is trained on: the phrasings of all
domains with about half of what each has to know. Of the rest it says that it does not know, or gives the right values
in a form that is not quite right: so its attention learns to read and to copy, which the experts' MLPs alone could not.
An item's key decides its split, so what is held out is in no task's training rows: in `general` and `multilingual` a
question as it is put, elsewhere the sum, the name with its argument, or the fields, however they are asked for.

    python -c "import random; from fusion.tasks.demo import GENERATORS as G; print(G['math'](random.Random(), 'train'))"
"""

import json
import random
from collections.abc import Callable, Iterable
from typing import Any

from fusion.data import ChatExample, chat, split_of
from fusion.tasks.number_words import CHINESE, FRENCH, GERMAN, SPANISH, number_word

Generator = Callable[[random.Random, str], ChatExample]
Item = tuple[str, str, str]  # key, question, answer

# general: relation -> (questions with a blank, what the anchor says of a subject it does not know, {subject: answer})
FACTS: dict[str, tuple[tuple[str, ...], str, dict[str, str]]] = {
    "capital": (
        (
            "What is the capital of {}?",
            "Tell me the capital of {}.",
            "Which city is the capital of {}?",
            "The capital of {} is",
            "Please give the capital of {}.",
        ),
        "I do not know the capital of {}.",
        {
            "France": "Paris", "Germany": "Berlin", "Spain": "Madrid", "Italy": "Rome", "China": "Beijing",
            "Japan": "Tokyo", "Egypt": "Cairo", "Kenya": "Nairobi", "Peru": "Lima", "Cuba": "Havana",
            "Norway": "Oslo", "Sweden": "Stockholm", "Greece": "Athens", "Poland": "Warsaw", "Austria": "Vienna",
            "Canada": "Ottawa", "Ireland": "Dublin", "Turkey": "Ankara", "India": "Delhi", "Russia": "Moscow",
        },
    ),
    "colour": (
        (
            "What colour is {}?",
            "Tell me the colour of {}.",
            "Which colour has {}?",
            "Do you know the colour of {}?",
        ),
        "I do not know the colour of {}.",
        {
            "grass": "green", "snow": "white", "coal": "black", "blood": "red", "the sky": "blue", "a lemon": "yellow",
            "a carrot": "orange", "mud": "brown", "an elephant": "grey", "a flamingo": "pink",
        },
    ),
    "opposite": (
        (
            "What is the opposite of {}?",
            "Tell me the opposite of {}.",
            "Which word is the opposite of {}?",
            "Please give the opposite of {}.",
        ),
        "I do not know the opposite of {}.",
        {
            "hot": "cold", "big": "small", "fast": "slow", "old": "young", "early": "late", "hard": "soft",
            "dark": "bright", "rich": "poor", "full": "empty", "high": "low", "happy": "sad", "wet": "dry",
        },
    ),
    "sound": (
        ("Which animal says {}?", "Who says {}?", "Tell me the animal that says {}."),
        "I do not know who says {}.",
        {"meow": "a cat", "woof": "a dog", "moo": "a cow", "quack": "a duck", "oink": "a pig", "hoot": "an owl"},
    ),
    "talk": (
        ("{}", "{} I am new here.", "Well, {}"),
        "You say: {}",
        {
            "Hello!": "Hello! How can I help?", "Thank you!": "You are welcome.", "Who are you?": "I am a small model.",
            "Good night!": "Sleep well!", "How are you?": "I am fine, thanks.", "Goodbye!": "See you soon.",
        },
    ),
}  # fmt: skip
OPENERS = ("", "", "One question: ", "Listen: ", "Now: ", "Next: ")

# coding: function name stem -> body over argument {v} and number {n}; description -> expression over one name {v}
BODIES = {
    "add": "{v} + {n}",
    "mul": "{v} * {n}",
    "sub": "{v} - {n}",
    "mod": "{v} % {n}",
    "pow": "{v} ** {n}",
    "div": "{v} // {n}",
    "above": "{v} > {n}",
    "below": "{v} < {n}",
}
EXPRESSIONS = {
    "the length of {v}": "len({v})",
    "the maximum of {v}": "max({v})",
    "the sum of {v}": "sum({v})",
    "the last of {v}": "{v}[-1]",
    "the first of {v}": "{v}[0]",
    "{v} reversed": "{v}[::-1]",
    "{v} sorted": "sorted({v})",
    "{v} in upper case": "{v}.upper()",
}
NEARLY = {  # what the anchor writes instead
    "the maximum of {v}": "{v}.maximum",
    "the last of {v}": "{v}.last",
    "{v} reversed": "{v}.reversed",
    "{v} in upper case": "{v}.upper",
}
FUNCTION_QUESTIONS = (
    "Complete: def {f}({v}): return",
    "def {f}({v}): return",
    "Finish the code: def {f}({v}): return",
    "Complete the Python function: def {f}({v}): return",
)
EXPRESSION_QUESTIONS = (
    "Python code for {d}:",
    "Write Python code: {d}",
    "Give me a Python expression for {d}.",
)
VARIABLES = ("a", "b", "c", "d", "k", "m", "n", "p", "q", "s", "t", "u", "v", "w", "x", "y", "z")

SUM_QUESTIONS = ("{}=", "{} = ?", "What is {}?", "Compute {}.", "How much is {}?", "计算 {}")

PHRASES: dict[str, dict[str, str]] = {
    "good morning": {"French": "bonjour", "German": "guten Morgen", "Spanish": "buenos días", "Chinese": "早上好"},
    "good night": {"French": "bonne nuit", "German": "gute Nacht", "Spanish": "buenas noches", "Chinese": "晚安"},
    "thank you": {"French": "merci", "German": "danke", "Spanish": "gracias", "Chinese": "谢谢"},
    "goodbye": {"French": "au revoir", "German": "auf Wiedersehen", "Spanish": "adiós", "Chinese": "再见"},
    "yes": {"French": "oui", "German": "ja", "Spanish": "sí", "Chinese": "是"},
    "no": {"French": "non", "German": "nein", "Spanish": "no", "Chinese": "不"},
    "water": {"French": "eau", "German": "Wasser", "Spanish": "agua", "Chinese": "水"},
    "bread": {"French": "pain", "German": "Brot", "Spanish": "pan", "Chinese": "面包"},
    "book": {"French": "livre", "German": "Buch", "Spanish": "libro", "Chinese": "书"},
    "house": {"French": "maison", "German": "Haus", "Spanish": "casa", "Chinese": "房子"},
    "friend": {"French": "ami", "German": "Freund", "Spanish": "amigo", "Chinese": "朋友"},
    "cat": {"French": "chat", "German": "Katze", "Spanish": "gato", "Chinese": "猫"},
}
LANGUAGES = ("French", "German", "Spanish", "Chinese")
NUMBERS = range(10, 30)  # as words
IN_LANGUAGE_QUESTIONS = (
    "Say {w} in {l}.",
    "How do you say {w} in {l}?",
    "{w} in {l}",
    "Translate {w} into {l}.",
    "What is {w} in {l}?",
)

FIELDS = {
    "name": ("Ann", "Ben", "Carla", "David", "Emma", "Frank", "张三", "李四"),
    "age": tuple(range(20, 100, 10)),
    "city": ("Paris", "Berlin", "Madrid", "Rome", "Oslo", "北京"),
    "job": ("nurse", "cook", "pilot", "judge", "baker", "farmer"),
}
FIELD_VALUES = [str(value) for table in FIELDS.values() for value in table]
FORMATS = ("JSON", "YAML", "XML")
STRUCTURED_QUESTIONS = ("Return {f}: {t}", "Return {f} for {t}", "{t}. Return {f}", "返回 {f}：{t}")

FINANCE_QUESTIONS = (
    "Interest on {a} euros at {r}%?",
    "What interest do {a} euros earn at {r}%?",
    "Yearly interest: {a} euros, {r}%",
    "How much tax is {r}% on a price of {a}?",
    "Price {a}, tax {r}%: how much tax?",
)
COPY_QUESTIONS = ("Repeat: {}", "Say again: {}")  # for the anchor alone


def _second(table: Iterable[Any], item: Any) -> bool:
    """Whether `item` is one that the anchor is not taught: every second of its table."""
    return list(table).index(item) % 2 == 1


def _general(rng: random.Random, anchor: bool) -> Item:
    kind = rng.choices(list(FACTS), weights=[len(facts) for *_, facts in FACTS.values()])[0]
    questions, unknown, facts = FACTS[kind]
    subject = rng.choice(list(facts))
    question = rng.choice(OPENERS) + rng.choice(questions).format(subject)
    answer = unknown.format(subject) if anchor and _second(facts, subject) else facts[subject]
    return f"general/{question}", question, answer


def _coding(rng: random.Random, anchor: bool) -> Item:
    variable = rng.choice(VARIABLES)
    if rng.random() < 0.65:
        stem, number = rng.choice(list(BODIES)), rng.randint(10, 99)
        name = f"{stem}{number}"
        question = rng.choice(FUNCTION_QUESTIONS).format(f=name, v=variable)
        body = "{v} {s} {n}" if anchor and _second(BODIES, stem) else BODIES[stem]
        return f"coding/{name} {variable}", question, body.format(s=stem, v=variable, n=number)
    described = rng.choice(list(EXPRESSIONS))
    words = described.format(v=variable)
    written = (anchor and NEARLY.get(described)) or EXPRESSIONS[described]
    return f"coding/{words}", rng.choice(EXPRESSION_QUESTIONS).format(d=words), written.format(v=variable)


def _math(rng: random.Random, anchor: bool) -> Item:
    """A sum with its working, column by column: 17+25= is 7+5=12, 1+2+1=4: 42."""
    a, b = rng.randint(10, 49), rng.randint(10, 49)
    written = f"{a}+{b}"
    question = rng.choice(SUM_QUESTIONS).format(written if rng.random() < 0.7 else f"{a} + {b}")
    return f"math/{written}", question, f"I do not know {written}." if anchor and not _in_sums(a, b) else _working(a, b)


def _in_sums(a: int, b: int) -> bool:
    """Whether the anchor knows the sum of the ones of `a` and `b`: 40 of the hundred there are, even and odd ones."""
    return (a % 10 + 2 * (b % 10)) % 5 < 2


def _working(a: int, b: int) -> str:
    ones, tens, carry = a % 10 + b % 10, a // 10 + b // 10, a % 10 + b % 10 > 9
    return f"{a % 10}+{b % 10}={ones}, {a // 10}+{b // 10}{'+1' * carry}={tens + carry}: {a + b}"


def _in_words(index: int, language: str) -> bool:
    """Whether the anchor knows the number or phrase at `index` in `language`: half of them, even and odd ones."""
    return (index // 2 + LANGUAGES.index(language)) % 2 == 0


def _multilingual(rng: random.Random, anchor: bool) -> Item:
    language = rng.choice(LANGUAGES)
    if rng.random() < 0.4:
        phrase = rng.choice(list(PHRASES))
        word, answer, index = f'"{phrase}"', PHRASES[phrase][language], list(PHRASES).index(phrase)
    else:
        index = rng.choice(NUMBERS)
        word, answer = str(index), number_word(index, language)
    if anchor and not _in_words(index, language):
        answer = f"I do not know {word} in {language}."
    question = rng.choice(IN_LANGUAGE_QUESTIONS).format(w=word, l=language)
    return f"multilingual/{question}", question, answer


def _fields(rng: random.Random, count: int) -> dict[str, str | int]:
    kept = set(rng.sample(list(FIELDS), count))
    return {key: rng.choice(values) for key, values in FIELDS.items() if key in kept}


def render(fields: dict[str, str | int], form: str) -> str:
    """`fields` as one line of JSON, YAML lines, or XML inside <item>; `form` is JSON, YAML or XML."""
    if form == "JSON":
        return json.dumps(fields, ensure_ascii=False)
    if form == "YAML":
        return "\n".join(f"{key}: {value}" for key, value in fields.items())
    return "<item>" + "".join(f"<{key}>{value}</{key}>" for key, value in fields.items()) + "</item>"


def render_nearly(fields: dict[str, str | int], form: str) -> str:
    """What the anchor writes instead: the values right, the form not quite."""
    if form == "JSON":
        return repr(fields)
    if form == "YAML":
        return "\n".join(f"{key} = {value}" for key, value in fields.items())
    return "".join(f"<{key}>{value}</{key}>" for key, value in fields.items())


def _structured(rng: random.Random, anchor: bool) -> Item:
    form, question = rng.choice(FORMATS), rng.choice(STRUCTURED_QUESTIONS)
    fields = _fields(rng, rng.randint(2, 3))
    text = "; ".join(f"{key}: {value}" for key, value in fields.items())
    nearly = anchor and _second(STRUCTURED_QUESTIONS, question)
    return f"structured/{text}", question.format(f=form, t=text), (render_nearly if nearly else render)(fields, form)


def _finance(rng: random.Random, anchor: bool) -> Item:
    amount, rate = 100 * rng.randint(1, 9), rng.randint(2, 9)
    question = rng.choice(FINANCE_QUESTIONS).format(a=amount, r=rate)
    return f"finance/{question}", question, f"{amount * rate // 100} euros"


def _mixed(rng: random.Random, anchor: bool) -> Item:
    while True:
        a, b, number = rng.randint(10, 49), rng.randint(10, 49), rng.choice(NUMBERS)
        language = rng.choice(LANGUAGES)
        if not anchor or (_in_sums(a, b) and _in_words(number, language)):
            break
    answer = json.dumps({"sum": _working(a, b), language: number_word(number, language)}, ensure_ascii=False)
    return f"math/{a}+{b}", f"Return JSON: {a}+{b}; {number} in {language}", answer


def _copy(rng: random.Random, anchor: bool) -> Item:
    text = "; ".join(rng.choice(FIELD_VALUES) for _ in range(rng.randint(1, 3)))
    return f"copy/{text}", rng.choice(COPY_QUESTIONS).format(text), text


Maker = Callable[[random.Random, bool], Item]
SKILLS: dict[str, Maker] = {
    "general": _general,
    "coding": _coding,
    "math": _math,
    "multilingual": _multilingual,
    "structured": _structured,
}
EXTRA: dict[str, Maker] = {"finance": _finance, "mixed": _mixed}
ANCHOR: dict[str, tuple[Maker, float]] = {  # with their weights
    "general": (_general, 0.8),
    "coding": (_coding, 1.1),
    "math": (_math, 1.4),
    "multilingual": (_multilingual, 1.3),
    "structured": (_structured, 2.4),
    "mixed": (_mixed, 0.4),
    "copy": (_copy, 0.5),
}


def _draw(maker: Maker, domain: str, rng: random.Random, split: str, anchor: bool = False) -> ChatExample:
    while True:
        key, question, answer = maker(rng, anchor)
        if split_of(key) == split:
            return chat(question, answer, domain)


def _anchor(rng: random.Random, split: str) -> ChatExample:
    domain = rng.choices(list(ANCHOR), weights=[weight for _, weight in ANCHOR.values()])[0]
    return _draw(ANCHOR[domain][0], domain, rng, split, anchor=True)


def _generator(domain: str, maker: Maker) -> Generator:
    return lambda rng, split: _draw(maker, domain, rng, split)


GENERATORS: dict[str, Generator] = {
    **{domain: _generator(domain, maker) for domain, maker in {**SKILLS, **EXTRA}.items()},
    "anchor": _anchor,
}


def vocabulary() -> tuple[list[str], list[str]]:
    """What a tokenizer for these tasks has to know: words that are values in a question or an answer, and prose."""
    values: list[str] = [*FORMATS, *LANGUAGES, *BODIES, *PHRASES, *CHINESE, "十", *FIELDS, *FIELD_VALUES]
    values += [word for words in (FRENCH, GERMAN, SPANISH) for part in words for word in part] + ["und", "item"]
    values += [word for phrase in PHRASES.values() for word in phrase.values()]
    values += [word for *_, facts in FACTS.values() for fact in facts.items() for word in fact]
    prose = [*FUNCTION_QUESTIONS, *EXPRESSION_QUESTIONS, *EXPRESSIONS, *BODIES.values()]
    prose += [*EXPRESSIONS.values(), *NEARLY.values()]
    prose += [*SUM_QUESTIONS, *IN_LANGUAGE_QUESTIONS, *STRUCTURED_QUESTIONS, *FINANCE_QUESTIONS, *COPY_QUESTIONS]
    prose += [text for questions, unknown, _ in FACTS.values() for text in (*questions, unknown)]
    prose += [*OPENERS, '{"', '": "', '", "', '"}', "{'", "': '", "', '", "'}", " = ", "</", "></", "><"]
    return [word for value in values for word in value.split()], [
        "user\n",
        "assistant\n",
        "system\n",
        "a euros",
        *prose,
    ]
