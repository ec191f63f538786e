"""Extraction tasks for a real model: short Chinese and English texts to JSON, YAML or XML under a stated schema.

Every prompt says what is asked: the text, a line `Schema:` with the fields and their types, and the rules of the
answer (dates as YYYY-MM-DD, numbers bare, null for what the text leaves out, no other text). Print some:

    python -m fusion.tasks.extraction held_out 8
"""

import json
import random
import re
from collections.abc import Callable
from datetime import date, timedelta
from typing import Any
from xml.sax.saxutils import escape

import yaml

from fusion.data import ChatExample, chat, split_of
from fusion.errors import counted, run_main

DOMAIN = "structured"
FORMATS = ("json", "yaml", "xml")
# The README's example: never in training, often among the held-out items.
ZHANG_SAN = "张三"

# What the schema line's words ask for; a prompt states the rules that its schema needs.
RULES = {
    "en": {"date": "dates YYYY-MM-DD", "int": "bare numbers", "number": "bare numbers", "?": "? = null if absent"},
    "zh": {"date": "日期 YYYY-MM-DD", "int": "数字不带单位", "number": "数字不带单位", "?": "? = 没有则为 null"},
}
NOTHING_ELSE = {"en": "no other text", "zh": "不加其他文字"}
XML_RULES = {
    "en": "root <record>, list entries <item>, null = empty element",
    "zh": "根元素 <record>，列表项 <item>，null 为空元素",
}


def _words(text: str) -> list[str]:
    """Words or short phrases, separated by commas."""
    return [word.strip() for word in text.split(",")]


SURNAMES_ZH = "王李刘陈杨赵黄周吴徐孙胡朱高林何郭马罗梁宋郑谢韩唐冯于董萧程"
GIVEN_ZH = _words(
    "伟,芳,娜,敏,静,强,磊,洋,艳,勇,杰,娟,涛,明,超,秀英,建国,志强,晓梅,子涵,雨桐,浩然,欣怡,俊杰,思远,海燕,文博,佳琪"
)
FIRST_EN = _words(
    "Anna,Ben,Carla,David,Elena,Frank,Grace,Hugo,Irene,Jack,Karen,Liam,Maria,Noah,Olivia,Peter,Quinn,Rosa,Samuel,Tara,"
    "Ulrich,Vera,Walter,Xenia,Yusuf,Zoe"
)
LAST_EN = _words(
    "Adams,Baker,Chen,Diaz,Evans,Fischer,Garcia,Hughes,Ivanov,Jensen,Keller,Lopez,Moore,Novak,Owens,Parker,Rossi,"
    "Silva,Turner,Vogel,Weber,Young"
)
CITIES = {
    "zh": _words("北京,上海,广州,深圳,杭州,成都,武汉,西安,南京,重庆,苏州,青岛"),
    "en": _words("Berlin,Boston,Chicago,Dublin,Lisbon,London,Madrid,Oslo,Paris,Sydney,Toronto,Vienna"),
}
JOBS = {
    "zh": _words("软件工程师,医生,教师,会计,律师,厨师,设计师,护士,记者,司机,建筑师,产品经理"),
    "en": _words("accountant,architect,chef,dentist,journalist,lawyer,nurse,pilot,software engineer,teacher"),
}
TONGUES = {
    "zh": _words("英语,法语,德语,日语,俄语,西班牙语"),
    "en": _words("English,French,German,Japanese,Russian,Spanish"),
}
GOODS = {
    "zh": _words("键盘,鼠标,显示器,耳机,台灯,水杯,书包,打印纸,充电器,笔记本"),
    "en": _words("keyboard,mouse,monitor,headset,desk lamp,mug,backpack,notebook,charger,webcam"),
}
COLOURS = {"zh": _words("黑色,白色,红色,蓝色,绿色,银色"), "en": _words("black,white,red,blue,green,silver")}
TOPICS = {
    "zh": _words("预算评审,产品发布,季度总结,安全培训,招聘计划,系统迁移"),
    "en": _words("budget review,product launch,quarterly summary,safety training,hiring plan,system migration"),
}
ROOMS = {"zh": _words("301会议室,A座大厅,202会议室,东楼5层"), "en": _words("Room 301,Main Hall,Room 202,Lab 5")}
MONTHS = _words("January,February,March,April,May,June,July,August,September,October,November,December")

Record = tuple[str, dict[str, Any], str]  # text, values, schema line
Words = dict[str, Any]


def _drawn(rng: random.Random, split: str, make: Callable[[], str]) -> str:
    """Draws names until one belongs to `split`: the hash of the name decides, so the splits share no subject."""
    while True:
        name = make()
        if ("held_out" if name == ZHANG_SAN else split_of(name)) == split:
            return name


def _person(rng: random.Random, split: str, lang: str) -> str:
    if lang == "zh":
        return _drawn(rng, split, lambda: rng.choice(SURNAMES_ZH) + rng.choice(GIVEN_ZH))
    return _drawn(rng, split, lambda: f"{rng.choice(FIRST_EN)} {rng.choice(LAST_EN)}")


def _code(rng: random.Random, split: str, prefix: str) -> str:
    return _drawn(rng, split, lambda: f"{prefix}-{rng.randint(100, 9999)}")


def _date(rng: random.Random, lang: str, first: int = 2019, last: int = 2026) -> tuple[str, str]:
    """A date as the text writes it, and in ISO form."""
    day = date(first, 1, 1) + timedelta(days=rng.randrange(365 * (last - first)))
    if lang == "zh":
        return f"{day.year}年{day.month}月{day.day}日", day.isoformat()
    month = MONTHS[day.month - 1]
    return rng.choice((f"{month} {day.day}, {day.year}", f"{day.day} {month} {day.year}")), day.isoformat()


def _money(rng: random.Random, lang: str, high: int = 9000) -> tuple[str, dict[str, Any]]:
    """An amount as the text writes it (thousands separated), and as number and currency code."""
    amount: float = rng.randint(12, high)
    if rng.random() < 0.3:
        amount = round(amount + rng.choice((0.5, 0.25, 0.99)), 2)
    currency = rng.choice(("CNY", "USD", "EUR"))
    written = f"{amount:,}"
    if lang == "zh":
        text = written + {"CNY": "元", "USD": "美元", "EUR": "欧元"}[currency]
    else:
        text = {"CNY": "{} yuan", "USD": "${}", "EUR": "€{}"}[currency].format(written)
    return text, {"amount": amount, "currency": currency}


def _listed(words: list[str], lang: str) -> str:
    if len(words) == 1:
        return words[0]
    return "、".join(words) if lang == "zh" else ", ".join(words[:-1]) + " and " + words[-1]


def _some(rng: random.Random, words: list[str], low: int = 1, high: int = 3) -> list[str]:
    return rng.sample(words, rng.randint(low, high))


def person(rng: random.Random, split: str, lang: str) -> Record:
    """Name, age, occupation, and a city that may be missing; in the held-out split often the README's example."""
    if split == "held_out" and lang == "zh" and rng.random() < 0.4:
        name, age, job = ZHANG_SAN, 28, "软件工程师"
        city: str | None = "上海"
    else:
        name, age, job = _person(rng, split, lang), rng.randint(19, 70), rng.choice(JOBS[lang])
        city = rng.choice((*CITIES[lang], None, None, None))
    if lang == "zh":
        text = f"{name}，{age}岁，{job}" + (f"，住在{city}。" if city else "。")
    else:
        text = f"{name}, {age} years old, works as {'an' if job[0] in 'aeiou' else 'a'} {job}" + (
            f" in {city}." if city else "."
        )
    return text, {"name": name, "age": age, "occupation": job, "city": city}, "name, age: int, occupation, city?"


def resident(rng: random.Random, split: str, lang: str) -> Record:
    """A nested address, a birthday, a list of languages, a height with its unit."""
    name, city = _person(rng, split, lang), rng.choice(CITIES[lang])
    born, born_iso = _date(rng, lang, 1960, 2005)
    tongues, street = _some(rng, TONGUES[lang]), rng.choice((True, False))
    height = rng.randint(150, 198)
    road = (f"人民路{rng.randint(1, 99)}号" if lang == "zh" else f"{rng.randint(1, 99)} Mill Road") if street else None
    if lang == "zh":
        text = f"{name}生于{born}，身高{height}厘米，会说{_listed(tongues, lang)}，地址：{city}{road or ''}。"
    else:
        where = f"{road}, {city}" if road else city
        text = f"{name}, born {born}, {height} cm tall, speaks {_listed(tongues, lang)}. Address: {where}."
    values = {
        "name": name,
        "born": born_iso,
        "height_cm": height,
        "languages": tongues,
        "address": {"city": city, "street": road},
    }
    return text, values, "name, born: date, height_cm: int, languages: [string], address: {city, street?}"


def order(rng: random.Random, split: str, lang: str) -> Record:
    """An order with its lines, a date and a total in one of three currencies."""
    number, (day, iso), (cost, total) = _code(rng, split, "SO"), _date(rng, lang), _money(rng, lang)
    lines = [{"product": p, "quantity": rng.randint(1, 12)} for p in _some(rng, GOODS[lang], 1, 2)]
    if lang == "zh":
        goods = _listed([f"{x['product']}{x['quantity']}个" for x in lines], lang)
        text = f"订单{number}，{day}下单：{goods}，合计{cost}。"
    else:
        goods = _listed([f"{x['quantity']} x {x['product']}" for x in lines], lang)
        text = f"Order {number} of {day}: {goods}, {cost} in total."
    values = {"order_id": number, "date": iso, "items": lines, "total": total}
    return (
        text,
        values,
        "order_id, date: date, items: [{product, quantity: int}], total: {amount: number, currency: CNY|USD|EUR}",
    )


def meeting(rng: random.Random, split: str, lang: str) -> Record:
    """A meeting with its attendees, a time of day, and a place that may be missing."""
    topic, (day, iso) = rng.choice(TOPICS[lang]), _date(rng, lang, 2024, 2027)
    people = [_person(rng, split, lang)]
    people += [p for p in [_person(rng, split, lang)] if rng.random() < 0.6 and p not in people]
    hour, minute = rng.randint(8, 18), rng.choice((0, 15, 30, 45))
    place = rng.choice((*ROOMS[lang], None, None))
    if lang == "zh":
        clock = f"{'上午' if hour < 12 else '下午'}{hour if hour <= 12 else hour - 12}点" + (
            f"{minute}分" if minute else ""
        )
        text = f"{topic}会议：{day}{clock}" + (f"，{place}" if place else "") + f"，参加者{_listed(people, lang)}。"
    else:
        clock = f"{hour if hour <= 12 else hour - 12}:{minute:02d} {'am' if hour < 12 else 'pm'}"
        text = (
            f"Meeting on {topic}: {day}, {clock}" + (f", {place}" if place else "") + f", with {_listed(people, lang)}."
        )
    values = {"topic": topic, "date": iso, "start": f"{hour:02d}:{minute:02d}", "place": place, "attendees": people}
    return text, values, "topic, date: date, start: HH:MM (24h), place?, attendees: [string]"


def product(rng: random.Random, split: str, lang: str) -> Record:
    """A product with weight and price as number and unit, and a list of colours."""
    name = _code(rng, split, rng.choice(("Nova", "Orion", "Lumo", "Kite", "Vega")))
    unit, (cost, price), colours = rng.choice(("kg", "g")), _money(rng, lang, 4000), _some(rng, COLOURS[lang])
    weight: float = rng.randint(50, 950) if unit == "g" else rng.randint(11, 99) / 10
    if lang == "zh":
        measure = f"{weight}{'公斤' if unit == 'kg' else '克'}"
        text = f"{name}，重{measure}，售价{cost}，颜色：{_listed(colours, lang)}。"
    else:
        measure = f"{weight} {'kilograms' if unit == 'kg' else 'grams'}"
        text = f"The {name} weighs {measure}, costs {cost} and comes in {_listed(colours, lang)}."
    values = {"model": name, "weight": {"value": weight, "unit": unit}, "price": price, "colours": colours}
    schema = (
        "model, weight: {value: number, unit: kg|g}, price: {amount: number, currency: CNY|USD|EUR}, colours: [string]"
    )
    return text, values, schema


def contract(rng: random.Random, split: str, lang: str) -> Record:
    """A job with an employee inside, a start date, and an end date that is often missing."""
    name, job, (start, start_iso) = _person(rng, split, lang), rng.choice(JOBS[lang]), _date(rng, lang, 2017, 2022)
    end, end_iso = _date(rng, lang, 2023, 2026) if rng.random() < 0.5 else (None, None)
    pay = rng.randint(40, 300) * 100
    if lang == "zh":
        text = f"{name}，{job}，{start}入职" + (f"，{end}离职" if end else "") + f"，月薪{pay:,}元。"
    else:
        text = (
            f"{name} joined as {job} on {start}" + (f" and left on {end}" if end else "") + f", paid {pay:,} a month."
        )
    values = {"employee": {"name": name, "role": job}, "start": start_iso, "end": end_iso, "monthly_pay": pay}
    return text, values, "employee: {name, role}, start: date, end: date?, monthly_pay: int"


RECORDS = (person, resident, order, meeting, product, contract)


def json_schema(notation: str) -> dict[str, Any]:
    """The JSON Schema of a prompt's schema line, e.g. of `name, born: date?, tags: [string], address: {city}`."""
    return _typed("{" + notation + "}")


def _typed(kind: str) -> dict[str, Any]:
    if kind.endswith("?"):
        return {"anyOf": [_typed(kind[:-1]), {"type": "null"}]}
    if kind.startswith("["):
        return {"type": "array", "items": _typed(kind[1:-1])}
    if kind.startswith("{"):
        pairs = (re.fullmatch(r"(\w+)(?:: (.+)|(\??))", part) for part in _parts(kind[1:-1]))
        fields = {pair[1]: _typed(pair[2] or "string" + pair[3]) for pair in pairs if pair}
        return {"type": "object", "properties": fields, "required": list(fields), "additionalProperties": False}
    if "|" in kind:
        return {"enum": kind.split("|")}
    return {"type": {"int": "integer", "number": "number"}.get(kind, "string")}


def _parts(fields: str) -> list[str]:
    """The comma-separated parts of `fields`, commas inside brackets aside."""
    parts, depth = [""], 0
    for sign in fields:
        depth += (sign in "{[") - (sign in "}]")
        if sign == "," and not depth:
            parts.append("")
        else:
            parts[-1] += sign
    return [part.strip() for part in parts]


def render(value: dict[str, Any], form: str) -> str:
    """The record as the one answer that is taught: one-line JSON, block YAML, or one-line XML."""
    if form == "json":
        return json.dumps(value, ensure_ascii=False)
    if form == "yaml":
        return yaml.safe_dump(value, allow_unicode=True, sort_keys=False).strip()
    return _element("record", value)


def _element(tag: str, value: Any) -> str:
    if isinstance(value, dict):
        inner = "".join(_element(key, item) for key, item in value.items())
    elif isinstance(value, list):
        inner = "".join(_element("item", item) for item in value)
    elif value is None or isinstance(value, bool):
        inner = "" if value is None else str(value).lower()
    else:
        inner = escape(str(value))
    return f"<{tag}>{inner}</{tag}>"


def _rules(schema: str, lang: str, form: str) -> str:
    said = [rule for word, rule in RULES[lang].items() if word in schema.replace("_date", "")]
    said += [XML_RULES[lang]] * (form == "xml") + [NOTHING_ELSE[lang]]
    return "，".join(dict.fromkeys(said)) + "。" if lang == "zh" else "Rules: " + ", ".join(dict.fromkeys(said)) + "."


def structured(rng: random.Random, split: str) -> ChatExample:
    """One text with its record, in one of two languages and three formats."""
    lang, form = rng.choice(("zh", "en")), rng.choice(FORMATS)
    text, value, schema = rng.choice(RECORDS)(rng, split, lang)
    if text.startswith(ZHANG_SAN):
        form = "json"
    name = {"json": "JSON", "yaml": "YAML", "xml": "XML"}[form]
    ask = f"返回 {name}" if lang == "zh" else f" Return {name}."
    question = f"{text}{ask}\nSchema: {schema}\n{_rules(schema, lang, form)}"
    return chat(
        question,
        render(value, form),
        DOMAIN,
        score="exact_values",
        reference={"format": form, "value": value},
        schema=json_schema(schema) if form == "json" else None,
    )


GENERATORS = {"structured": structured}


def main(split: str = "held_out", rows: str = "8") -> None:
    """Prints some rows."""
    chance = random.Random(0)
    for _ in range(counted(rows)):
        row = structured(chance, split)
        print(row.question, row.answer, sep="\n-> ", end="\n\n")


if __name__ == "__main__":
    run_main(main)
