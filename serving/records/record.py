"""What is kept of a request and of the feedback on it, and what makes a request look misrouted.

    suspicions(record, {"math": "math", "coding": "general"})   # ["labelled math, served by coding"]

A request's domain is what the label channels say of its question; the experts' shares are what the gates did with it.
"""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

EXHAUSTED = 422  # the status of a request that the guard could not answer as it was asked
BY_DEFAULT = "default"  # the channel of a domain that nothing speaks for: the one that takes what no rule claims
MUDDLED = 0.85  # of the largest entropy that the experts' shares can have
WHOLE = "all"  # the layers together, beside early, middle and late
Shares = dict[str, dict[str, float]]  # group of layers -> expert -> its share of the tokens' routing weight


@dataclass(frozen=True)
class RoutingRecord:
    """One request: how it was answered, what the label channels say of it, which experts served it.

    `channels` are what each label channel says, {channel: {domain, evidence, confidence}}; `domain`, `channel` and
    `evidence` are of the one that decided. `shares` are of the answer's tokens, from the engine's own account
    (`engine`) or computed afterwards (`explain`). `asked` (the messages) and `answered` are kept only where the recipe
    says so, as the policy has left them.
    """

    request_id: str
    path: str
    status: int
    ms: float
    time: float = field(default_factory=time.time)  # seconds since 1970
    asker: str | None = None
    streamed: bool = False
    attempts: int = 0
    violations: list[str] = field(default_factory=list)
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    domain: str | None = None
    channel: str | None = None
    evidence: str | None = None
    channels: dict[str, dict[str, Any]] = field(default_factory=dict)
    shares: Shares = field(default_factory=dict)
    shares_source: Literal["engine", "explain"] | None = None
    asked: Any = None
    answered: str | None = None


@dataclass(frozen=True)
class Feedback:
    """What someone said of a request, or of a question that is labelled elsewhere, with the text where it is kept.

    `domain` is the right one, None where only a thumb was given; `routed` is what the record said by then.
    """

    request_id: str
    rating: Literal["up", "down"] | None = None
    domain: str | None = None
    comment: str = ""
    time: float = field(default_factory=time.time)
    asker: str | None = None
    messages: list[dict[str, str]] | None = None
    answer: str | None = None
    routed: dict[str, Any] = field(default_factory=dict)  # domain, channel, expert of the record


def storable(text: str) -> str:
    """The text as every database takes it: without NUL and without half a surrogate pair, which JSON may hold."""
    return text.encode("utf-8", "replace").decode().replace("\0", "\ufffd")


def top_expert(shares: Shares) -> str | None:
    """The expert with the largest share over all layers; None where nobody knows."""
    found = shares.get(WHOLE)
    return max(found, key=lambda name: found[name]) if found else None


def routed(record: RoutingRecord) -> dict[str, Any]:
    """How a request was routed, as feedback on it keeps it."""
    return {"domain": record.domain, "channel": record.channel, "expert": top_expert(record.shares)}


def entropy(shares: Shares) -> float | None:
    """The entropy of the experts' shares over all layers, of the largest there could be; None where nobody knows."""
    found = shares.get(WHOLE)
    if not found or len(found) < 2:
        return None
    return -sum(share * math.log(share) for share in found.values() if share > 0) / math.log(len(found))


def suspicions(record: RoutingRecord, expert_of: Mapping[str, str]) -> list[str]:
    """Why a request looks misrouted, in words; empty where it does not. `expert_of` names every domain's expert."""
    found = []
    expert = top_expert(record.shares)
    if record.domain and record.channel != BY_DEFAULT and expert and expert_of.get(record.domain, expert) != expert:
        found.append(f"labelled {record.domain}, served by {expert}")
    domains = {said["domain"] for said in record.channels.values()}
    if len(domains) > 1:
        found.append("label channels disagree: " + ", ".join(sorted(domains)))
    mixed = entropy(record.shares)
    if mixed is not None and mixed > MUDDLED:
        found.append(f"no expert stands out (entropy {mixed:.2f})")
    if record.status == EXHAUSTED and record.violations:
        found.append(f"no answer as asked in {record.attempts} attempts")
    return found
