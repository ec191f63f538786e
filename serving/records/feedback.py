"""Feedback and misroutes as rows to train on: listed, written to a file, read from one.

    qwen-fusion feedback list RECIPE
    qwen-fusion feedback export RECIPE --misroutes      # OUTPUT/exported-feedback.jsonl
    qwen-fusion feedback import RECIPE labelled.jsonl
    qwen-fusion feedback remove RECIPE REQUEST_ID

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

from fusion.errors import UserError
from fusion.recipe import Recipe
from gate_training.feedback import checked, feedback_file, json_rows
from serving.records.record import BY_DEFAULT, Feedback, RoutingRecord, routed, storable, suspicions
from serving.records.recorder import question_of
from serving.records.settings import store_url
from serving.records.store import opened

Row = dict[str, Any]
SHOWN = 60  # characters of a cell
MISROUTES = 1000  # records that are looked through for misroutes, the newest


def rows_of(said: Iterable[Feedback], expert_of: Mapping[str, str]) -> list[Row]:
    """Rows of the feedback that names a domain, or confirms one with a thumb up; `said` has the newest first.

    A thumb up is for the expert that served, where it is known: its domain is right then. An answer is kept where the
    right expert has given it, or where whoever labelled the row has. `expert_of` names every domain's expert.
    """
    rows = []
    for one in said:
        expert = one.routed.get("expert")
        domain = one.domain or (_confirmed(one.routed, expert_of) if one.rating == "up" else None)
        if domain is None or not one.messages:
            continue
        right = expert is not None and expert == expert_of.get(domain)
        answer = one.answer if right or one.rating == "up" or one.routed.get("imported") else ""
        told = {"source": "feedback", "request_id": one.request_id, "time": one.time}
        told |= {"rating": one.rating, "comment": one.comment, **one.routed.get("provenance", {})}
        rows.append(_row(one.messages, answer, domain, told, one.routed))
    return rows


def _confirmed(as_routed: Mapping[str, Any], expert_of: Mapping[str, str]) -> str | None:
    """The domain that a thumb up confirms: of the expert that served, the labelled one where several are its."""
    expert, labelled = as_routed.get("expert"), as_routed.get("domain")
    if expert is None:
        return None if as_routed.get("channel") == BY_DEFAULT else labelled
    if expert_of.get(labelled or "") == expert:
        return labelled
    return next((domain for domain, name in expert_of.items() if name == expert), None)


def misrouted_rows(records: Iterable[RoutingRecord], expert_of: Mapping[str, str]) -> list[Row]:
    """Rows of requests that look misrouted, where all label channels that speak say the same domain."""
    rows = []
    for record in records:
        doubts, said = suspicions(record, expert_of), {one["domain"] for one in record.channels.values()}
        if doubts and record.asked and len(said) == 1:
            told = {"source": "misroute", "request_id": record.request_id, "time": record.time, "suspicions": doubts}
            rows.append(_row(record.asked, "", said.pop(), told, routed(record)))
    return rows


def _row(messages: Sequence[Mapping[str, str]], answer: str | None, domain: str, told: Row, as_routed: Row) -> Row:
    whole = [*messages, {"role": "assistant", "content": answer or ""}]
    return {"messages": whole, "domain": domain, "provenance": {**told, "routed": as_routed}}


def newest(rows: Iterable[Row]) -> list[Row]:
    """One row a question with what was said before it: the newest of them, of equals one that has an answer."""
    kept: dict[str, Row] = {}
    for row in sorted(rows, key=lambda row: (_time(row), row["messages"][-1]["content"])):
        kept[_question(row)] = row
    return list(kept.values())


def _provenance(row: Row) -> dict[str, Any]:
    told = row.get("provenance")
    return told if isinstance(told, dict) else {}


def _time(row: Row) -> float:
    when = _provenance(row).get("time")
    return float(when) if isinstance(when, int | float) else 0.0


def export(recipe: Recipe, out: Path, misroutes: bool = False) -> list[Row]:
    """Writes all feedback, that which gates have learnt from included, to `out`; returns the rows.

    With `misroutes` also requests that only look misrouted, where nobody has spoken. Raises UserError where the store
    cannot be read or there is nothing to write.
    """
    learnt = feedback_file(recipe)
    rows = _read(learnt, recipe) if learnt.is_file() else []
    with opened(store_url(recipe)) as store:
        rows += rows_of(store.feedback(), recipe.expert_names())
        if misroutes:
            known = set(map(_question, rows))
            found = misrouted_rows(store.recent(MISROUTES), recipe.expert_names())
            rows += [row for row in found if _question(row) not in known]
    kept = newest(row for row in rows if row["domain"] in recipe.domains)
    if not kept:
        raise UserError(
            "no feedback names a domain for a request whose text was kept: POST /v1/feedback with a 'domain', with "
            "serving.guard.records.prompts in the recipe"
        )
    from fusion.checkpoint import write_lines  # which imports torch

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
    """A row as feedback; of its provenance what is as it should be."""
    told, rating = _provenance(row), _provenance(row).get("rating")
    as_routed = told["routed"] if isinstance(told.get("routed"), dict) else {}
    known = {key: told[key] for key in ("source", "suspicions", "answered_by") if key in told}
    return Feedback(
        request_id=storable(str(told.get("request_id") or "imported"))[:128],
        rating=rating if rating in ("up", "down") else None,
        domain=row["domain"],
        comment=storable(str(told.get("comment") or "")),
        time=_time(row) or time.time(),
        messages=[{key: storable(text) for key, text in message.items()} for message in row["messages"][:-1]],
        answer=storable(row["messages"][-1]["content"]) or None,
        routed={**as_routed, "imported": True, "provenance": known},
    )


def _read(file: Path, recipe: Recipe) -> list[Row]:
    rows = json_rows(file)
    for number, row in enumerate(rows, 1):
        checked(row, recipe, f"{file}, line {number}")
    return rows


def _question(row: Row) -> str:
    """What tells two rows apart: all that was said before the answer."""
    return json.dumps(row["messages"][:-1], sort_keys=True)


def remove(recipe: Recipe, request_id: str) -> int:
    """Removes all feedback on a request; how much there was. Raises UserError where there is none.

    What gates have learnt from it they know: `rollback`, or delete feedback.jsonl and train again.
    """
    with opened(store_url(recipe)) as store:
        found = store.remove_feedback(request_id)
    if not found:
        raise UserError(f"there is no feedback on a request {request_id}: `qwen-fusion feedback list` shows the ids")
    return found


def listed(recipe: Recipe, limit: int) -> dict[str, Any]:
    """The newest feedback, and the newest requests that look misrouted, as plain data."""
    expert_of = recipe.expert_names()
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
                "question": question_of({"messages": one.messages}) if one.messages else None,
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
    lines = ["| when | request | thumb | right domain | routed | question | comment |", "| --- " * 7 + "|"]
    for row in found["feedback"]:
        as_routed = f"{row['routed'].get('domain') or '?'}, by {row['routed'].get('expert') or '?'}"
        cells = [
            _when(row["time"]),
            row["request_id"],
            row["rating"] or "",
            row["domain"] or "",
            as_routed,
            row["question"] or "not kept",
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
    text = text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
    return text.replace("\n", " ").replace("|", "\\|")
