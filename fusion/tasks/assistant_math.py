"""Grade-school word problems of `fusion/tasks/assistant.py`: number ranges, the arithmetic, two languages of text.

Problems carry prices, dates, names and units, like the texts of the extraction tasks, and are answered in short
steps. Look at them as chat rows:

    python -m fusion.tasks.assistant math train 8
"""

from collections.abc import Callable
from typing import NamedTuple

Numbers = dict[str, int]


class Problem(NamedTuple):
    """A word problem; `{n}` is a name, `{g}` a thing, the other blanks are numbers, `r` the result."""

    ranges: dict[str, tuple[int, int]]
    solve: Callable[..., Numbers]
    en: tuple[str, str]  # question, steps
    zh: tuple[str, str]


# fmt: off
PROBLEMS = (
    Problem({"a": (2, 12), "b": (3, 25), "c": (5, 60)}, lambda a, b, c: {"s": a * b, "p": a * b + c, "r": c},
        ("{n} buys {a} {g}s at ${b} each and pays with ${p}. How much change does {n} get back?",
         "The {g}s cost {a} × {b} = {s} dollars.\nThe change is {p} - {s} = {r} dollars."),
        ("{n}买了{a}个{g}，每个{b}元，付了{p}元。应找回多少元？",
         "{g}的总价：{a} × {b} = {s}（元）。\n找回：{p} - {s} = {r}（元）。")),
    Problem({"a": (12, 90), "b": (3, 40), "c": (2, 9)}, lambda a, b, c: {"s": a + b, "r": (a + b) * c},
        ("A shop sold {a} {g}s on Monday and {b} on Tuesday, each for ${c}. "
         "How much money did it take in over the two days?",
         "In two days it sold {a} + {b} = {s} {g}s.\nThe income is {s} × {c} = {r} dollars."),
        ("商店周一卖出{a}个{g}，周二卖出{b}个，每个{c}元。两天一共收入多少元？",
         "两天共卖出 {a} + {b} = {s}（个）。\n收入为 {s} × {c} = {r}（元）。")),
    Problem({"a": (2, 9), "b": (40, 110)}, lambda a, b: {"r": a * b},
        ("A train travels at {b} km per hour. How many kilometers does it cover in {a} hours?",
         "Distance is speed times time: {b} × {a} = {r} km."),
        ("一列火车每小时行驶{b}公里，{a}小时能行驶多少公里？", "路程 = 速度 × 时间 = {b} × {a} = {r}（公里）。")),
    Problem({"a": (3, 12), "b": (4, 30)}, lambda a, b: {"t": a * b, "r": b},
        ("{n} shares {t} candies equally among {a} friends. How many candies does each friend get?",
         "Divide the candies by the number of friends: {t} ÷ {a} = {r}."),
        ("{n}把{t}颗糖平均分给{a}个朋友，每人分到几颗？", "用总数除以人数：{t} ÷ {a} = {r}（颗）。")),
    Problem({"a": (20, 60), "b": (2, 12), "c": (2, 9)}, lambda a, b, c: {"s": b * c, "r": a + b * c},
        ("{n} has ${a} and saves ${b} every week. How much money will {n} have after {c} weeks?",
         "In {c} weeks {n} saves {b} × {c} = {s} dollars.\nTogether that makes {a} + {s} = {r} dollars."),
        ("{n}有{a}元，每周再存{b}元，{c}周后一共有多少元？",
         "{c}周共存 {b} × {c} = {s}（元）。\n一共有 {a} + {s} = {r}（元）。")),
    Problem({"a": (5, 40), "b": (3, 35)}, lambda a, b: {"r": 2 * (a + b)},
        ("A rectangular garden is {a} m long and {b} m wide. How many meters of fence go around it?",
         "The perimeter is 2 × (length + width).\n2 × ({a} + {b}) = {r} meters."),
        ("一个长方形花园长{a}米、宽{b}米，围一圈需要多少米篱笆？",
         "周长 = 2 ×（长 + 宽）= 2 × ({a} + {b}) = {r}（米）。")),
    Problem({"a": (5, 40), "b": (3, 35)}, lambda a, b: {"r": a * b},
        ("A room is {a} feet long and {b} feet wide. What is its area in square feet?",
         "The area is length times width: {a} × {b} = {r} square feet."),
        ("一个房间长{a}米、宽{b}米，面积是多少平方米？", "面积 = 长 × 宽 = {a} × {b} = {r}（平方米）。")),
    Problem({"a": (2, 18), "b": (1, 9)}, lambda a, b: {"t": a * 20, "p": b * 5, "s": a * b, "r": a * 20 - a * b},
        ("A {g} costs ${t} and is now {p}% off. What is the new price?",
         "The discount is {t} × {p}% = {s} dollars.\nThe new price is {t} - {s} = {r} dollars."),
        ("一个{g}原价{t}元，现在优惠{p}%，现价是多少元？",
         "优惠金额：{t} × {p}% = {s}（元）。\n现价：{t} - {s} = {r}（元）。")),
    Problem({"a": (6, 30), "b": (2, 5), "c": (3, 15)}, lambda a, b, c: {"s": a * b, "r": a * b + a + c, "t": a * b + a},
        ("{n} picked {a} apples. A friend picked {b} times as many, and a neighbor gave them {c} more. "
         "How many apples do they have altogether?",
         "The friend picked {a} × {b} = {s} apples.\nTogether they picked {a} + {s} = {t}.\n"
         "With the gift: {t} + {c} = {r}."),
        ("{n}摘了{a}个苹果，朋友摘的是{n}的{b}倍，邻居又送来{c}个。他们一共有多少个苹果？",
         "朋友摘了 {a} × {b} = {s}（个）。\n两人共 {a} + {s} = {t}（个）。\n加上送的：{t} + {c} = {r}（个）。")),
    Problem({"a": (3, 16), "b": (12, 40), "c": (2, 9)}, lambda a, b, c: {"t": a * b, "d": a * c, "r": a * (b - c)},
        ("A bus line has {a} buses with {b} passengers each. At the station, {c} people leave every bus. "
         "How many passengers remain in all?",
         "At first there are {a} × {b} = {t} passengers.\n{a} × {c} = {d} people leave.\nThat leaves {t} - {d} = {r}."),
        ("有{a}辆车，每辆坐{b}人。到站后每辆车下去{c}人，一共还剩多少人？",
         "原来共有 {a} × {b} = {t}（人）。\n下车 {a} × {c} = {d}（人）。\n还剩 {t} - {d} = {r}（人）。")),
    Problem({"a": (1, 14), "b": (3, 15)}, lambda a, b: {"r": a + b - 1},
        ("A workshop starts on March {a}, 2025 and lasts {b} days, the first day included. "
         "On which day of March does it end?",
         "Counting the first day, the last day is {a} + {b} - 1.\n{a} + {b} - 1 = {r}, so it ends on March {r}."),
        ("培训从2025年3月{a}日开始，连同第一天共{b}天。3月几日结束？",
         "第一天也算在内，所以最后一天是 {a} + {b} - 1 = {r}。\n培训在3月{r}日结束。")),
    Problem({"a": (24, 40), "b": (5, 20), "c": (3, 12)}, lambda a, b, c: {"m": a + b, "s": a + b + c, "d": b + c,
        "r": a + 2 * b + 2 * c},
        ("{n} is {b} years old and {n}'s mother is {m}. What will be the sum of their ages in {c} years?",
         "In {c} years they will be {b} + {c} = {d} and {m} + {c} = {s}.\nThe sum is {d} + {s} = {r}."),
        ("{n}今年{b}岁，妈妈{m}岁。{c}年后两人的年龄之和是多少？",
         "{c}年后两人分别是 {b} + {c} = {d} 岁和 {m} + {c} = {s} 岁。\n和为 {d} + {s} = {r}（岁）。")),
    Problem({"a": (3, 9), "b": (20, 45), "c": (5, 19)}, lambda a, b, c: {"s": b - c, "r": a * (b - c)},
        ("{n} earns ${b} an hour and pays ${c} of it in taxes. How many dollars are left after {a} hours of work?",
         "Each hour leaves {b} - {c} = {s} dollars.\nAfter {a} hours that is {a} × {s} = {r} dollars."),
        ("{n}每小时挣{b}元，其中要交税{c}元。工作{a}小时后剩多少元？",
         "每小时剩 {b} - {c} = {s}（元）。\n{a}小时共剩 {a} × {s} = {r}（元）。")),
    Problem({"a": (4, 9), "b": (10, 50), "c": (1, 8)}, lambda a, b, c: {"t": a * b, "r": a * b - c},
        ("A box holds {b} pencils. A school buys {a} boxes, but {c} pencils are broken. How many can be used?",
         "The boxes hold {a} × {b} = {t} pencils.\nWithout the broken ones: {t} - {c} = {r}."),
        ("一盒有{b}支铅笔，学校买了{a}盒，其中{c}支坏了。能用的有多少支？",
         "一共有 {a} × {b} = {t}（支）。\n去掉坏的：{t} - {c} = {r}（支）。")),
    Problem({"a": (2, 12), "b": (2, 25)}, lambda a, b: {"t": 4 * a * b, "s": 2 * a * b, "r": a * b},
        ("{n} reads a book of {t} pages. Half of it is read in the first week and half of the rest in the second. "
         "How many pages are left?",
         "After the first week {t} ÷ 2 = {s} pages are left.\nAfter the second week {s} ÷ 2 = {r} are left."),
        ("{n}读一本{t}页的书，第一周读了一半，第二周读了剩下的一半。还剩多少页？",
         "第一周后剩 {t} ÷ 2 = {s}（页）。\n第二周后剩 {s} ÷ 2 = {r}（页）。")),
    Problem({"a": (2, 9), "b": (2, 9), "c": (2, 12)}, lambda a, b, c: {"t": a * b, "s": a, "r": c},
        ("{b} workers assemble {t} {g}s in {c} days, all at the same pace. How many days does one worker need for {s}?",
         "One worker makes {t} ÷ {b} = {s} in {c} days.\nSo {s} {g}s take one worker {c} days."),
        ("{b}个工人{c}天组装{t}个{g}，速度相同。一个工人组装{s}个需要几天？",
         "一个工人{c}天组装 {t} ÷ {b} = {s}（个）。\n所以组装{s}个需要{c}天。")),
    Problem({"a": (70, 99), "b": (60, 99), "c": (0, 9)}, lambda a, b, c: {"d": (3 - (a + b) % 3) % 3 + 60 + 3 * c,
        "s": a + b + (3 - (a + b) % 3) % 3 + 60 + 3 * c, "r": (a + b + (3 - (a + b) % 3) % 3 + 60 + 3 * c) // 3},
        ("{n} scored {a}, {b} and {d} points in three tests. What is the average score?",
         "The sum is {a} + {b} + {d} = {s}.\nThe average is {s} ÷ 3 = {r}."),
        ("{n}三次考试得了{a}分、{b}分和{d}分，平均分是多少？",
         "总分：{a} + {b} + {d} = {s}。\n平均分：{s} ÷ 3 = {r}（分）。")),
    Problem({"a": (2, 8), "b": (50, 400)}, lambda a, b: {"t": a * 1000, "r": a * 1000 - b},
        ("A bag holds {a} kg of flour and {b} g are used. How many grams are left?",
         "{a} kg are {a} × 1000 = {t} g.\n{t} - {b} = {r} g are left."),
        ("一袋面粉重{a}千克，用掉{b}克，还剩多少克？", "{a} 千克 = {t} 克。\n还剩 {t} - {b} = {r}（克）。")),
    Problem({"a": (11, 89), "b": (11, 89), "c": (2, 9)}, lambda a, b, c: {"s": b * c, "r": a + b * c},
        ("Calculate {a} + {b} × {c}.", "Multiplication comes first: {b} × {c} = {s}.\nThen {a} + {s} = {r}."),
        ("计算 {a} + {b} × {c}。", "先算乘法：{b} × {c} = {s}。\n再算加法：{a} + {s} = {r}。")),
    Problem({"a": (2, 12), "b": (3, 40), "c": (2, 30)}, lambda a, b, c: {"t": a * b + c, "s": a * b, "r": b},
        ("Solve for x: {a}x + {c} = {t}.",
         "Subtract {c} from both sides: {a}x = {s}.\nDivide by {a}: x = {s} ÷ {a} = {r}."),
        ("解方程：{a}x + {c} = {t}。", "两边同时减去 {c}：{a}x = {s}。\n两边同时除以 {a}：x = {r}。")),
)
