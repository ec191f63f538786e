"""Answers for feedback that has none: the right expert gives its own, so that the gates learn where its tokens go.

    fill_answers(recipe, Path("runs/demo/.feedback/feedback.jsonl"))

The wrong expert's answer was left out; a question alone teaches the gates little about the tokens of its answer.
"""

from collections import defaultdict
from pathlib import Path

from fusion.checkpoint import write_lines
from fusion.encoding import load_tokenizer
from fusion.evaluation.generate import answer_examples
from fusion.recipe import Recipe
from fusion.sources import anchor_source, expert_source, load_model
from gate_training.feedback import checked, json_rows


def fill_answers(recipe: Recipe, file: Path) -> int:
    """Has each row without an answer answered by its domain's expert, one model in memory at a time; how many."""
    rows = json_rows(file)
    examples = [checked(row, recipe, f"{file}, line {number}") for number, row in enumerate(rows, 1)]
    empty: dict[int, list[int]] = defaultdict(list)
    for number, example in enumerate(examples):
        if not example.answer:
            empty[recipe.expert_of(example.domain)].append(number)
    settings, tokenizer = recipe.evaluation, load_tokenizer(anchor_source(recipe).folder)
    for index, numbers in empty.items():
        expert = recipe.experts[index]
        model = load_model(expert_source(recipe, expert), recipe.attn_implementation, recipe.loading)
        asked = [examples[number] for number in numbers]
        said = f"{expert.name}'s answers to feedback"
        found = answer_examples(model, tokenizer, asked, settings.max_new_tokens, settings.batch_rows, said)
        for number, answer in zip(numbers, found, strict=True):
            rows[number]["messages"][-1]["content"] = answer.text
            rows[number].setdefault("provenance", {})["answered_by"] = expert.name
    if empty:
        write_lines(file, rows)
    return sum(map(len, empty.values()))
