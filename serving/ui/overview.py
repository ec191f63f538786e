"""What the page shows, from records: traffic by domain and expert, latency, structured answers, what looks misrouted.

overview(store.recent(COUNTED, since), store.feedback(since=since), recording, minutes=60)
"""

import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from serving.records.record import WHOLE, Feedback, RoutingRecord, suspicions, top_expert
from serving.records.recorder import question_of
from serving.records.settings import Recording

COUNTED = 2000  # requests at most that are looked at, the newest
LISTED = 20  # requests of a list
QUESTION = 300  # characters that are shown of one


def overview(
    records: Sequence[RoutingRecord], said: Iterable[Feedback], recording: Recording, minutes: int
) -> dict[str, Any]:
    """The figures of `records` of the last `minutes`, and what was `said` of those that are listed, as plain data.

    Of both the newest come first. `limit` requests are counted at most.
    """
    now = time.time()
    ages = Counter(int((now - record.time) // 60) for record in records)
    structured = [record for record in records if record.attempts]
    doubted = [(record, suspicions(record, recording.expert_of)) for record in records]
    doubtful = [(record, found) for record, found in doubted if found]
    answers = _answers(said)
    return {
        "minutes": minutes,
        "requests": len(records),
        "limit": COUNTED,
        "per_minute": [ages[age] for age in range(minutes - 1, -1, -1)],  # the oldest first
        "domains": list(recording.domains),
        "experts": list(recording.experts),
        "by_domain": {name: _figures([r for r in records if r.domain == name]) for name in recording.domains},
        "all": _figures(records),
        "expert_shares": _mean_shares(records, recording.experts),
        "shares_known": sum(bool(record.shares) for record in records),
        "structured": {
            "requests": len(structured),
            "valid": sum(record.status == 200 for record in structured),
            "attempts": round(sum(r.attempts for r in structured) / len(structured), 3) if structured else None,
        },
        "errors": dict(Counter(str(record.status) for record in records if record.status >= 400)),
        "misroutes": len(doubtful),
        "doubtful": [_told(record, found, answers) for record, found in doubtful[:LISTED]],
        "recent": [_told(record, found, answers) for record, found in doubted[:LISTED]],
    }


def _figures(records: Sequence[RoutingRecord]) -> dict[str, Any]:
    """How many there are, and their latency in ms and tokens a second."""
    if not records:
        return {"requests": 0, "p50_ms": None, "p95_ms": None, "tokens_per_s": None}
    middle, high = np.percentile([record.ms for record in records], [50, 95])
    answered = [r for r in records if r.completion_tokens and r.ms]
    spent = sum(record.ms for record in answered) / 1000
    tokens = sum(record.completion_tokens or 0 for record in answered)
    return {
        "requests": len(records),
        "p50_ms": round(float(middle), 1),
        "p95_ms": round(float(high), 1),
        "tokens_per_s": round(tokens / spent, 1) if spent else None,
    }


def _mean_shares(records: Sequence[RoutingRecord], experts: Sequence[str]) -> dict[str, float]:
    """Each expert's share of the requests whose experts are known, every request counted alike."""
    known = [record.shares[WHOLE] for record in records if WHOLE in record.shares]
    if not known:
        return {}
    return {name: round(sum(shares.get(name, 0.0) for shares in known) / len(known), 4) for name in experts}


def _answers(said: Iterable[Feedback]) -> dict[str, dict[str, str]]:
    """Of each request the newest right domain and the newest rating that it was given."""
    found: dict[str, dict[str, str]] = {}
    for one in said:
        answer = found.setdefault(one.request_id, {})
        for key, value in (("domain", one.domain), ("rating", one.rating)):
            if value is not None:
                answer.setdefault(key, value)
    return found


def _told(record: RoutingRecord, found: list[str], answers: Mapping[str, dict[str, str]]) -> dict[str, Any]:
    """A request as it is listed."""
    return {
        "request_id": record.request_id,
        "time": record.time,
        "status": record.status,
        "ms": record.ms,
        "attempts": record.attempts,
        "domain": record.domain,
        "channel": record.channel,
        "evidence": record.evidence,
        "expert": top_expert(record.shares),
        "shares": record.shares.get(WHOLE, {}),
        "question": question_of({"messages": record.asked})[:QUESTION] if record.asked else None,
        "suspicions": found,
        "said": answers.get(record.request_id, {}),
    }
