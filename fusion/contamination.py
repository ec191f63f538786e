"""Whether held-out questions are also in what was trained on: shared runs of words, as GPT-3's authors looked for them.

    check(trained_texts, {"gsm8k": questions}, words=13)

Runs that more than COMMON training rows have are a task's wording, not one row's, and tell nothing (arXiv:2005.14165,
appendix C, which leaves out the same).
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

from fusion.errors import UserError

COMMON = 10  # training rows
# a word is a run of letters and digits, or one character of a script without spaces
WORD = re.compile(r"[\u3040-\u30ff\u4e00-\u9fff\u0e00-\u0e7f]|[^\W\u3040-\u30ff\u4e00-\u9fff\u0e00-\u0e7f]+")


def runs(text: str, words: int) -> Iterator[str]:
    """All runs of `words` words; of a shorter text none."""
    found = WORD.findall(text.casefold())
    for begin in range(len(found) - words + 1):
        yield " ".join(found[begin : begin + words])


def shared_runs(trained: Iterable[str], held_out: Sequence[str], words: int) -> dict[int, str]:
    """{number of a held-out text: a run of words that it shares with a text that was trained on}."""
    wanted = {run for text in held_out for run in runs(text, words)}
    seen: Counter[str] = Counter()
    for text in trained:
        seen.update(wanted.intersection(runs(text, words)))
    telling = {run for run, rows in seen.items() if rows <= COMMON}
    found = {}
    for number, text in enumerate(held_out):
        if run := next((run for run in runs(text, words) if run in telling), None):
            found[number] = run
    return found


def check(trained: Sequence[str], held_out: Mapping[str, Sequence[str]], words: int) -> None:
    """Raises UserError, with an example, where held-out texts share runs of words with what was trained on."""
    said = []
    for name, texts in held_out.items():
        if found := shared_runs(trained, texts, words):
            number, run = next(iter(found.items()))
            said.append(f"{len(found)} of {len(texts)} held-out rows of '{name}' (row {number}: \"{run}\")")
    if said:
        raise UserError(
            f"what was trained on holds {words} words in a row of {'; '.join(said)}: take these out of the "
            "training data, name another split, or change evaluation.contamination_ngram"
        )
