"""Whether held-out questions are also in what was trained on: shared runs of words, as GPT-3's authors looked for them.

    contaminated = shared_runs(trained_texts, questions, words=13)

Wording that more than COMMON rows share, several held-out ones among them, is a task's, not one row's, and tells
nothing (arXiv:2005.14165, appendix C, leaves out the same); nor do numbers alone. Generated tasks are left out: a hash
decides the split of each of their items.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from fusion.data import ChatExample, general_count, load_examples
from fusion.errors import UserError
from fusion.recipe import Recipe
from fusion.sections.data import DataSource, general_domain

COMMON = 10  # rows
# a word is a run of letters, their marks and digits, or one character of a script without spaces
ALONE = r"\u3040-\u30ff\u4e00-\u9fff\u0e00-\u0e7f"
WORD = re.compile(rf"[{ALONE}]|(?:[^\W_{ALONE}]|[\u0300-\u036f\u0900-\u0dff])+")
SHORTEST = 5  # words of a text that is looked for as a whole, where it has no run of the length that is asked for


def shared_runs(trained: Sequence[str], held_out: Sequence[str], words: int) -> dict[int, str]:
    """{number of a held-out text: a run of words that it shares with a text that was trained on}.

    A shorter text, of SHORTEST words or more, is looked for as a whole.
    """
    texts, lessons = ([WORD.findall(text.casefold()) for text in given] for given in (held_out, dict.fromkeys(trained)))
    asked = Counter(run for text in dict.fromkeys(map(tuple, texts)) for run in set(_runs(text, words)))
    taught: Counter[str] = Counter()
    for lesson in lessons:
        taught.update(asked.keys() & set(_runs(lesson, words)))
    whole = [f" {' '.join(lesson)} " for lesson in lessons]

    def is_wording(run: str) -> bool:
        return asked[run] > 1 and max(taught[run], asked[run]) > COMMON

    found = {}
    for number, found_words in enumerate(texts):
        if SHORTEST <= len(found_words) < words:
            text = " ".join(found_words)
            if any(f" {text} " in lesson for lesson in whole):
                found[number] = text
            continue
        runs = list(_runs(found_words, words))
        wording = [False] * len(found_words)
        for begin, run in enumerate(runs):
            if is_wording(run):
                wording[begin : begin + words] = [True] * words
        for begin, run in enumerate(runs):
            own = [w for w, common in zip(found_words[begin:], wording[begin : begin + words]) if not common]  # noqa: B905
            if taught[run] and not is_wording(run) and 2 * sum(not word.isdecimal() for word in own) >= words:
                found[number] = run
                break
    return found


def _runs(text: Sequence[str], words: int) -> Iterator[str]:
    return (" ".join(text[begin : begin + words]) for begin in range(len(text) - words + 1))


def trained_rows(recipe: Recipe, generated: bool = True) -> list[ChatExample]:
    """All rows that the anchor, an expert, the gates or a healing learns from; without generated ones where said so.

    A generated pretraining corpus is left out always: its generator keeps the splits apart.
    """
    rows: list[ChatExample] = []

    def add(source: DataSource, name: str, count: int, seed: int) -> None:
        if source.parts and not generated:
            share = -(-count // len(source.parts))
            for part in source.parts:
                add(part, name, max(share, part.rows or 0), seed)
        elif generated or not source.generated:
            rows.extend(load_examples(source, name, count, seed))

    settings = recipe.gate_training
    for name, domain in recipe.domains.items():
        add(domain.train, name, settings.rows, settings.seed)
        if recipe.heal:
            add(domain.train, name, recipe.heal.rows, recipe.heal.seed)
    pretrain = recipe.anchor.pretrain
    if pretrain and not pretrain.data.generated:
        add(pretrain.data, "anchor", pretrain.rows, pretrain.seed)
    general = general_domain(recipe.domains)
    for expert in recipe.experts:
        for section in (expert.branch, expert.anchor):
            if section:
                add(section.data, expert.domain, section.rows, section.seed)
        if expert.branch and (count := general_count(expert.branch)):
            add(recipe.domains[general].train, general, count, expert.branch.seed)
    return rows


def check(
    recipe: Recipe, held_out: Mapping[str, Sequence[str]], trained: Sequence[str] | None = None
) -> dict[str, list[int]]:
    """The numbers of contaminated held-out texts, by the key in `held_out`; none where the recipe sets no n-gram.

    `trained` are the texts of `trained_texts`, for a caller who has them.

    Raises UserError, with an example, unless the recipe says that they are to be left out.
    """
    words = recipe.evaluation.contamination_ngram
    if words is None:
        return {}
    trained = trained_texts(recipe) if trained is None else trained
    found = {name: shared_runs(trained, texts, words) for name, texts in held_out.items()}
    said = [
        f"{len(runs)} of {len(held_out[name])} held-out rows of '{name}' (\"{next(iter(runs.values()))}\")"
        for name, runs in found.items()
        if runs
    ]
    if said and recipe.evaluation.contaminated == "refuse":
        where = recipe.at("evaluation", "contamination_ngram")
        raise UserError(
            f"{where}what was trained on shares {words} words in a row with {'; '.join(said)}: take these out of the "
            "training data, or set evaluation.contaminated to leave_out, which takes them out of what is measured"
        )
    return {name: list(runs) for name, runs in found.items() if runs}


def trained_texts(recipe: Recipe) -> list[str]:
    """The conversations of `trained_rows` that are not generated, as plain text, each once."""
    rows = trained_rows(recipe, generated=False)
    return list(dict.fromkeys(" ".join(message["content"] for message in row.messages) for row in rows))
