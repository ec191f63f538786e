"""Feedback and misroutes as rows to train on: listed, written to a file, read from one.

    qwen-fusion feedback list RECIPE
    qwen-fusion feedback export RECIPE --misroutes      # OUTPUT/feedback.jsonl
    qwen-fusion feedback import RECIPE labelled.jsonl

A row is a chat row as any data set's, with its right domain and where that came from:
{"messages": [...], "domain": "math", "provenance": {"request_id": "...", "source": "feedback", ...}}. One question has
one row, the newest. An answer of the wrong expert is left out: the row ends with an empty one, which train-gates has
the right expert fill (gate_training/feedback_answers.py).
"""

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fusion.checkpoint import write_lines
from fusion.errors import UserError
from fusion.recipe import Recipe
from gate_training.feedback import checked, feedback_file, json_rows
from serving.records.record import Feedback, RoutingRecord, suspicions, top_expert
from serving.records.settings import store_url
from serving.records.store import opened

Row = dict[str, Any]
MISROUTES = 1000  # records that are looked through for misroutes, the newest


def rows_of(said: Iterable[Feedback]) -> list[Row]:
    """Rows of the feedback that names a domain, or that confirms one with a thumb up; `said` has the newest first."""
    rows = []
    for one in said:
        confirmed = one.routed.get("domain") if one.rating == "up" else None
        domain = one.domain or confirmed
        if domain is None or not one.messages:
            continue
        answer = one.answer if domain == one.routed.get("domain") else ""
        provenance = {
            "source": "feedback",
            "request_id": one.request_id,
            "time": one.time,
            "rating": one.rating,
            "comment": one.comment,
            **one.routed.get("provenance", {}),
        }
        rows.append(_row(one.messages, answer, domain, provenance, one.routed))
    return rows


def misrouted_rows(records: Iterable[RoutingRecord], expert_of: Mapping[str, str]) -> list[Row]:
    """Rows of requests that look misrouted, labelled by the channel that decided their domain."""
    rows = []
    for record in records:
        doubts = suspicions(record, expert_of)
        if doubts and record.asked and record.domain:
            routed = {"domain": record.domain, "channel": record.channel, "expert": top_expert(record.shares)}
            told = {"source": "misroute", "request_id": record.request_id, "time": record.time, "suspicions": doubts}
            rows.append(_row(record.asked, "", record.domain, told, routed))
    return rows


def _row(messages: Sequence[Mapping[str, str]], answer: str | None, domain: str, told: Row, routed: Row) -> Row:
    whole = [*messages, {"role": "assistant", "content": answer or ""}]
    return {"messages": whole, "domain": domain, "provenance": {**told, "routed": routed}}


def newest(rows: Iterable[Row]) -> list[Row]:
    """One row a question with what was said before it: the newest of them, of equals one that has an answer."""
    kept: dict[str, Row] = {}
    for row in sorted(
        rows, key=lambda row: (row.get("provenance", {}).get("time", 0.0), row["messages"][-1]["content"])
    ):
        kept[_question(row)] = row
    return list(kept.values())


def export(recipe: Recipe, out: Path, misroutes: bool = False) -> list[Row]:
    """Writes all feedback, that which gates have learnt from included, to `out`; returns the rows.

    With `misroutes` also requests that only look misrouted, where nobody has spoken. Raises UserError where the store
    cannot be read or there is nothing to write.
    """
    learnt = feedback_file(recipe)
    rows = _read(learnt, recipe) if learnt.is_file() else []
    with opened(store_url(recipe)) as store:
        rows += rows_of(store.feedback())
        if misroutes:
            expert_of = {name: recipe.experts[recipe.expert_of(name)].name for name in recipe.domains}
            known = set(map(_question, rows))
            found = misrouted_rows(store.recent(MISROUTES), expert_of)
            rows += [row for row in found if _question(row) not in known]
    kept = newest(row for row in rows if row["domain"] in recipe.domains)
    if not kept:
        raise UserError(
            "no feedback names a domain for a request whose text was kept: POST /v1/feedback with a 'domain', with "
            "serving.guard.records.prompts in the recipe"
        )
    write_lines(out, kept)
    return kept


def take_in(recipe: Recipe, file: Path) -> int:
    """Adds the rows of a file to the store as feedback; how many were not there yet.

    Raises UserError where a row is none, or of a domain that the recipe does not have.
    """
    rows = newest(_read(file, recipe))
    with opened(store_url(recipe)) as store:
        known = {(json.dumps(said.messages, sort_keys=True), said.domain) for said in store.feedback()}
        new = [_feedback(row) for row in rows if (_question(row), row["domain"]) not in known]
        store.add_feedback(new)
    return len(new)


def _feedback(row: Row) -> Feedback:
    told = row.get("provenance") or {}
    return Feedback(
        request_id=str(told.get("request_id") or "imported"),
        rating=told.get("rating"),
        domain=row["domain"],
        comment=str(told.get("comment") or ""),
        time=float(told.get("time") or time.time()),
        messages=row["messages"][:-1],
        answer=row["messages"][-1]["content"] or None,
        routed={**(told.get("routed") or {}), "provenance": {"imported": True}},
    )


def _read(file: Path, recipe: Recipe) -> list[Row]:
    rows = json_rows(file)
    for number, row in enumerate(rows, 1):
        checked(row, recipe, f"{file}, line {number}")
    return rows


def _question(row: Row) -> str:
    """What tells two rows apart: all that was said before the answer."""
    return json.dumps(row["messages"][:-1], sort_keys=True)


def listed(recipe: Recipe, limit: int) -> dict[str, Any]:
    """The newest feedback, and the newest requests that look misrouted, as plain data."""
    expert_of = {name: recipe.experts[recipe.expert_of(name)].name for name in recipe.domains}
    with opened(store_url(recipe)) as store:
        said = store.feedback(limit)
        records = store.recent(MISROUTES)
    doubtful = [(record, doubts) for record in records if (doubts := suspicions(record, expert_of))]
    return {
        "feedback": [
            {
                "time": one.time,
                "request_id": one.request_id,
                "rating": one.rating,
                "domain": one.domain,
                "routed": one.routed,
                "comment": one.comment,
                "text_kept": one.messages is not None,
            }
            for one in said
        ],
        "misroutes": [
            {"time": record.time, "request_id": record.request_id, "domain": record.domain, "suspicions": doubts}
            for record, doubts in doubtful[:limit]
        ],
    }


def markdown(found: Mapping[str, Any]) -> str:
    """`listed` as two tables."""
    lines = ["| when | request | thumb | right domain | routed | comment |", "| --- " * 6 + "|"]
    for row in found["feedback"]:
        routed = f"{row['routed'].get('domain') or '?'}, by {row['routed'].get('expert') or '?'}"
        cells = [
            _when(row["time"]),
            row["request_id"],
            row["rating"] or "",
            row["domain"] or "",
            routed,
            row["comment"],
        ]
        lines.append("| " + " | ".join(_cell(cell) for cell in cells) + " |")
    lines += ["", "| when | request | labelled | looks misrouted, because |", "| --- " * 4 + "|"]
    for row in found["misroutes"]:
        cells = [_when(row["time"]), row["request_id"], row["domain"] or "", "; ".join(row["suspicions"])]
        lines.append("| " + " | ".join(_cell(cell) for cell in cells) + " |")
    return "\n".join([*lines, ""])


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def _cell(text: str) -> str:
    return text.replace("\n", " ").replace("|", "\\|")
