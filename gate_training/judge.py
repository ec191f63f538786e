"""New gates beside those in place, on what neither was trained on: they stay out where they lose too much anywhere.

report = judge(recipe, folder, data, feedback, old, new)     # raises UserError where a domain loses
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fusion.data import ChatExample
from fusion.encoding import encode, load_tokenizer
from fusion.errors import UserError
from fusion.layers import Gates
from fusion.recipe import Recipe
from gate_training.compare import Losses, held_out_losses
from gate_training.examples import RoutingData
from gate_training.feedback import split
from gate_training.held_out import layer_reports

OLD, NEW = "old gates", "new gates"


@dataclass(frozen=True)
class Judgement:
    """Old gates beside new ones, {OLD: {domain: ...}, NEW: {domain: ...}}.

    `losses` are answer losses, in nats a token, on the domains' held-out examples; `routed` is the share of the tokens
    of feedback's questions, over all layers, whose first choice is their domain's expert.
    """

    losses: dict[str, Losses]
    routed: dict[str, dict[str, float]]
    questions: int  # of feedback, that `routed` is of
    held_out: bool  # whether none of these was trained on

    def as_dict(self) -> dict[str, Any]:
        """The judgement as plain data."""
        return asdict(self)

    def lost(self) -> dict[str, float]:
        """Nats a token that each domain loses by the new gates."""
        return {domain: loss - self.losses[OLD][domain] for domain, loss in self.losses[NEW].items()}


def judge(
    recipe: Recipe, folder: Path, data: RoutingData, feedback: Sequence[ChatExample], old: Gates, new: Gates
) -> Judgement:
    """Two sets of gates of the fused model in `folder`, on held-out examples and on questions of `feedback`.

    The questions are those that are held out, all of them where none is.
    Raises UserError where the new ones lose more than `gate_training.feedback_margin` on any domain.
    """
    named = {OLD: old, NEW: new}
    _, unseen = split(feedback)
    questions = unseen or list(feedback)
    losses = held_out_losses(folder, data, named)
    asked = _as_held_out(recipe, folder, data, questions)
    routed = {name: _routed(recipe, folder, asked, found) for name, found in named.items()} if questions else {}
    found = Judgement(losses, routed, len(questions), bool(unseen))
    worst, nats = max(found.lost().items(), key=lambda pair: pair[1])
    margin = recipe.gate_training.feedback_margin
    if nats > margin:
        before, after = losses[OLD][worst], losses[NEW][worst]
        raise UserError(
            f"the new gates lose {nats:.3f} nats an answer token on '{worst}' ({before:.3f} -> {after:.3f}), more than "
            f"gate_training.feedback_margin {margin:g}: the old ones stay, look for wrong domains in the feedback"
        )
    return found


def _as_held_out(recipe: Recipe, folder: Path, data: RoutingData, rows: Sequence[ChatExample]) -> RoutingData:
    tokenizer, settings = load_tokenizer(folder), recipe.gate_training
    return replace(
        data,
        held_out_examples=[],
        held_out=[encode(tokenizer, row, settings.max_length) for row in rows],
        held_out_labels=[recipe.expert_of(row.domain) for row in rows],
        domains=[row.domain for row in rows],
    )


def _routed(recipe: Recipe, folder: Path, data: RoutingData, gates: Gates) -> dict[str, float]:
    """Per domain the mean over layers of the share of its tokens that go to its expert."""
    reports = [report.accuracy_by_domain for report in layer_reports(recipe, folder, data, gates)]
    return {name: sum(report[name] for report in reports) / len(reports) for name in reports[0]}


def markdown(found: dict[str, Any]) -> str:
    """`Judgement.as_dict` as tables."""
    names = list(found["losses"][OLD])
    lines = ["| held-out answer loss, nats a token | " + " | ".join(names) + " |", "| --- " * (len(names) + 1) + "|"]
    for row in (OLD, NEW):
        lines.append(f"| {row} | " + " | ".join(f"{found['losses'][row][name]:.3f}" for name in names) + " |")
    if found["routed"]:
        names = list(found["routed"][OLD])
        kind = "held out" if found["held_out"] else "trained on: too few to hold any out"
        title = f"tokens of {found['questions']} questions of feedback ({kind}) at their expert"
        lines += ["", f"| {title} | " + " | ".join(names) + " |", "| --- " * (len(names) + 1) + "|"]
        for row in (OLD, NEW):
            lines.append(f"| {row} | " + " | ".join(f"{found['routed'][row][name]:.1%}" for name in names) + " |")
    return "\n".join([*lines, ""])
