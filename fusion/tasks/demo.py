"""Generated tasks of the demo family, each small enough for a model of 3 million parameters to learn in seconds.

Five domains (`general`, `coding`, `math`, `multilingual`, `structured`), `finance` as a sixth that a recipe can add,
`mixed`, which needs two of them at once and is only for evaluation, and `anchor`, what the common start is trained on:
the phrasings and formats of all domains, but only the easy part of each skill. An item's key decides its split, so an
item held out is never in any task's training rows.

    python -c "import random; from fusion.tasks.demo import GENERATORS as G; print(G['math'](random.Random(), 'train'))"
"""

import json
import random
from collections.abc import Callable

from fusion.data import ChatExample, chat, split_of
from fusion.tasks.number_words import CHINESE, FRENCH, GERMAN, SPANISH, number_word

Generator = Callable[[random.Random, str], ChatExample]
Item = tuple[str, str, str]  # key, question, answer

# general: (questions with a blank, {subject: answer}); every second subject is unknown to the anchor
FACTS: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {
    "capital": (
        (
            "What is the capital of {}?",
            "Tell me the capital of {}.",
            "Which city is the capital of {}?",
            "The capital of {} is",
            "Please give the capital of {}.",
        ),
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
        {
            "hot": "cold", "big": "small", "fast": "slow", "old": "young", "early": "late", "hard": "soft",
            "dark": "bright", "rich": "poor", "full": "empty", "high": "low", "happy": "sad", "wet": "dry",
        },
    ),
    "sound": (
        ("Which animal says {}?", "Who says {}?", "Tell me the animal that says {}."),
        {"meow": "a cat", "woof": "a dog", "moo": "a cow", "quack": "a duck", "oink": "a pig", "hoot": "an owl"},
    ),
    "talk": (
        ("{}", "{} I am new here.", "Well, {}"),
        {
            "Hello!": "Hello! How can I help?", "Thank you!": "You are welcome.", "Who are you?": "I am a small model.",
            "Good night!": "Sleep well!", "How are you?": "I am fine, thanks.", "Goodbye!": "See you soon.",
        },
    ),
}  # fmt: skip

# coding: function name stem -> body over argument {v} and number {n}; (description, expression) over one name {v}
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
    "the largest of {v}": "max({v})",
    "the sum of {v}": "sum({v})",
    "the last of {v}": "{v}[-1]",
    "the first of {v}": "{v}[0]",
    "{v} reversed": "{v}[::-1]",
    "{v} sorted": "sorted({v})",
    "{v} in upper case": "{v}.upper()",
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
IN_LANGUAGE_QUESTIONS = (
    "Say {w} in {l}.",
    "How do you say {w} in {l}?",
    "{w} in {l}",
    "Translate {w} into {l}.",
    "What is {w} in {l}?",
)

NAMES = ("Ann", "Ben", "Carla", "David", "Emma", "Frank", "张三", "李四")
CITIES = ("Paris", "Berlin", "Madrid", "Rome", "Oslo", "北京")
JOBS = ("nurse", "cook", "pilot", "judge", "baker", "farmer")
FORMATS = ("JSON", "YAML", "XML")
STRUCTURED_QUESTIONS = ("Return {f}: {t}", "Return {f} for {t}", "{t}. Return {f}", "返回 {f}：{t}")

FINANCE_QUESTIONS = (
    "Interest on {a} euros at {r}%?",
    "What interest do {a} euros earn at {r}%?",
    "Yearly interest: {a} euros, {r}%",
    "How much tax is {r}% on a price of {a}?",
    "Price {a}, tax {r}%: how much tax?",
)
COPY_QUESTIONS = ("Repeat: {}", "Say again: {}")


def _general(rng: random.Random, easy: bool) -> Item:
    kind = rng.choices(list(FACTS), weights=[len(facts) for _, facts in FACTS.values()])[0]
    questions, facts = FACTS[kind]
    subject = rng.choice(list(facts)[:: 2 if easy else 1])
    question = rng.choice(questions).format(subject)
    return question, question, facts[subject]


def _coding(rng: random.Random, easy: bool) -> Item:
    step = 2 if easy else 1
    variable = rng.choice(VARIABLES)
    if rng.random() < 0.65:
        stem = rng.choice(list(BODIES)[::step])
        number = rng.randint(2, 99)
        name = f"{stem}{number}"
        question = rng.choice(FUNCTION_QUESTIONS).format(f=name, v=variable)
        return f"{name} {variable}", question, BODIES[stem].format(v=variable, n=number)
    described = rng.choice(list(EXPRESSIONS)[::step])
    words = described.format(v=variable)
    return words, rng.choice(EXPRESSION_QUESTIONS).format(d=words), EXPRESSIONS[described].format(v=variable)


def _known(first: int, second: int) -> bool:
    """Whether the anchor is taught the sum of these two digits: half of the table."""
    return (first + second) % 2 == 0


def _math(rng: random.Random, easy: bool) -> Item:
    """A sum with its working, column by column: 17+25= is 7+5=12, 1+2+1=4: 42."""
    while True:
        a, b = rng.randint(10, 49), rng.randint(10, 49)
        ones, tens = a % 10 + b % 10, a // 10 + b // 10
        if easy and not _known(a % 10, b % 10):
            continue
        carry = "+1" if ones > 9 else ""
        work = f"{a % 10}+{b % 10}={ones}, {a // 10}+{b // 10}{carry}={tens + bool(carry)}: {a + b}"
        written = f"{a}+{b}" if rng.random() < 0.7 else f"{a} + {b}"
        return f"{a}+{b}", rng.choice(SUM_QUESTIONS).format(written), work


def _multilingual(rng: random.Random, easy: bool) -> Item:
    language = rng.choice(LANGUAGES)
    step, start = (2, LANGUAGES.index(language) % 2) if easy else (1, 0)  # the anchor knows every second word
    if rng.random() < 0.4:
        phrase = rng.choice(list(PHRASES)[start::step])
        word, answer = f'"{phrase}"', PHRASES[phrase][language]
    else:
        number = rng.choice(range(start, 40, step))
        word, answer = str(number), number_word(number, language)
    question = rng.choice(IN_LANGUAGE_QUESTIONS).format(w=word, l=language)
    return question, question, answer


def _fields(rng: random.Random, count: int) -> dict[str, str | int]:
    makers: dict[str, Callable[[], str | int]] = {
        "name": lambda: rng.choice(NAMES),
        "age": lambda: 10 * rng.randint(2, 9),
        "city": lambda: rng.choice(CITIES),
        "job": lambda: rng.choice(JOBS),
    }
    kept = set(rng.sample(list(makers), count))
    return {key: make() for key, make in makers.items() if key in kept}


def render(fields: dict[str, str | int], form: str) -> str:
    """`fields` as one line of JSON, YAML lines, or XML inside <item>; `form` is JSON, YAML or XML."""
    if form == "JSON":
        return json.dumps(fields, ensure_ascii=False)
    if form == "YAML":
        return "\n".join(f"{key}: {value}" for key, value in fields.items())
    return "<item>" + "".join(f"<{key}>{value}</{key}>" for key, value in fields.items()) + "</item>"


def _structured(rng: random.Random, easy: bool) -> Item:
    form = rng.choice(FORMATS)
    fields = _fields(rng, 1 if easy and form != "YAML" else rng.randint(2, 3))
    text = "; ".join(f"{key}: {value}" for key, value in fields.items())
    return text, rng.choice(STRUCTURED_QUESTIONS).format(f=form, t=text), render(fields, form)


def _finance(rng: random.Random, easy: bool) -> Item:
    amount, rate = 100 * rng.randint(1, 9), rng.randint(2, 9)
    question = rng.choice(FINANCE_QUESTIONS).format(a=amount, r=rate)
    return question, question, f"{amount * rate // 100} euros"


def _mixed(rng: random.Random, easy: bool) -> Item:
    key, _, work = _math(rng, easy)
    number, language = rng.randint(21, 39), rng.choice(LANGUAGES)
    answer = json.dumps({"sum": int(work.split()[-1]), language: number_word(number, language)}, ensure_ascii=False)
    return f"{key} {number} {language}", f"Return JSON: sum: {key}; {language}: {number} in {language}", answer


def _copy(rng: random.Random, easy: bool) -> Item:
    words = [rng.choice((*NAMES, *CITIES, *JOBS, str(rng.randint(10, 99)))) for _ in range(rng.randint(1, 3))]
    text = "; ".join(words)
    return text, rng.choice(COPY_QUESTIONS).format(text), text


Maker = Callable[[random.Random, bool], Item]
SKILLS: dict[str, Maker] = {
    "general": _general,
    "coding": _coding,
    "math": _math,
    "multilingual": _multilingual,
    "structured": _structured,
}
EXTRA: dict[str, Maker] = {"finance": _finance, "mixed": _mixed}


def _draw(maker: Maker, domain: str, rng: random.Random, split: str, easy: bool = False) -> ChatExample:
    while True:
        key, question, answer = maker(rng, easy)
        if split_of(f"{domain}/{key}") == split:
            return chat(question, answer, domain)


def _anchor(rng: random.Random, split: str) -> ChatExample:
    domain = rng.choices([*SKILLS, "copy"], weights=[0.5, 1, 1.4, 1.2, 2.8, 0.5])[0]
    return _draw(SKILLS.get(domain, _copy), domain, rng, split, easy=True)


def _generator(domain: str, maker: Maker) -> Generator:
    return lambda rng, split: _draw(maker, domain, rng, split)


GENERATORS: dict[str, Generator] = {
    **{domain: _generator(domain, maker) for domain, maker in {**SKILLS, **EXTRA}.items()},
    "anchor": _anchor,
}


def vocabulary() -> tuple[list[str], list[str]]:
    """What a tokenizer for these tasks has to know: words that are values in a question or an answer, and prose."""
    values = [
        *NAMES,
        *CITIES,
        *JOBS,
        *FORMATS,
        *LANGUAGES,
        *BODIES,
        *PHRASES,
        *CHINESE,
        "十",
        "name",
        "age",
        "city",
        "job",
    ]
    values += [word for words in (FRENCH, GERMAN, SPANISH) for part in words for word in part] + ["und", "item"]
    values += [word for phrase in PHRASES.values() for word in phrase.values()]
    values += [word for _, facts in FACTS.values() for fact in facts.items() for word in fact]
    prose = [*FUNCTION_QUESTIONS, *EXPRESSION_QUESTIONS, *EXPRESSIONS, *EXPRESSIONS.values(), *BODIES.values()]
    prose += [*SUM_QUESTIONS, *IN_LANGUAGE_QUESTIONS, *STRUCTURED_QUESTIONS, *FINANCE_QUESTIONS, *COPY_QUESTIONS]
    prose += [question for questions, _ in FACTS.values() for question in questions]
    prose += ['{"', '": "', '", "', '"}', "</", "></", "><"]
    return [word for value in values for word in value.split()], [
        "user\n",
        "assistant\n",
        "system\n",
        "a euros",
        *prose,
    ]
