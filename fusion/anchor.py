"""Leads a drifted expert back to the anchor: its MLPs learn behind the anchor's attention what the expert knew.

    qwen-fusion anchor configs/demo-drifted.yaml

Everything but the MLPs is the anchor's and stays so, which makes the result an anchored expert that a merge loses
nothing of. The training starts from the expert's own MLPs, the anchor's, or halfway, whichever has the least held-out
loss. How far the expert's MLPs get transported to behind the anchor's attention (fusion/transport.py), without any
training, is measured beside them: they lose least, but with their larger weights the training ends higher on the demo
family (notebooks/LOG.md), so they are a start where `start: transported` asks for them. The student follows the drifted
expert's (or another teacher's) distribution at every answer token (knowledge distillation: Hinton et al., 2015; forward
KL). rope_theta may differ, and the teacher's size; the vocabulary may not. With `anchor.method: text` it learns what a
teacher answers (fusion/sampled.py), and any chat model may teach.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from fusion.architecture import layer_of
from fusion.branch import RESULT, judge, train_expert, trainable_model, training_dtype, write_full
from fusion.checkpoint import Checkpoint, put_in_place, read_json, weight_stamps, write_json
from fusion.data import ChatExample
from fusion.drift import Moved, moved_by_group
from fusion.encoding import encode_batches
from fusion.errors import UserError
from fusion.evaluation.intervals import share_of_gain
from fusion.headers import write_index
from fusion.layers import Batch
from fusion.progress import console
from fusion.reader import Reader
from fusion.resumable import release
from fusion.sections.fusing import Loading
from fusion.sections.training import AnchoringSettings, BranchSettings, TrainingSettings
from fusion.shards import write_shards
from fusion.sources import ANCHORING_NOTE, ModelSource, load_model
from fusion.teacher import Teacher
from fusion.transport import transported

SHARES = {"expert": 1.0, "halfway": 0.5, "anchor": 0.0}  # of the expert in the first MLPs; `best` is one of these
STARTS = (*SHARES, "transported")
PREPARED = "prepared.json"  # in the aside folder, once what comes before the training is done
TRANSPORT_ROWS = 512  # training rows that the maps of fusion/transport.py are fitted on


@dataclass(frozen=True)
class AnchorResult:
    """What anchoring kept: losses in nats a held-out answer token and task scores of all concerned.

    `losses` and `scores` have the rows anchor, expert (the drifted one), teacher (where that is another model) and
    anchored; `starts` the loss of each start that was tried, before any training. `retained_share` is
    (L_anchor - L_anchored) / (L_anchor - L_own), own the teacher or the expert, None without a gain. `best_step` is 0
    where training has not made the start any better, and the start is the result.
    """

    losses: dict[str, float]
    scores: dict[str, float]
    score_name: str
    start: str
    starts: dict[str, float]
    best_step: int
    tokens: int
    seconds: float
    moved: dict[str, dict[str, Moved]]  # of the drifted expert and of the anchored one, by group of tensors

    @property
    def retained_share(self) -> float | None:
        """The share of the teacher's or the drifted expert's gain in loss over the anchor that is left."""
        return self._share(self.losses["anchored"])

    @property
    def starts_retained(self) -> dict[str, float | None]:
        """The same of every start: how far transport alone gets, for example."""
        return {name: self._share(loss) for name, loss in self.starts.items()}

    def _share(self, loss: float) -> float | None:
        return share_of_gain(self.losses["anchor"], loss, _own(self.losses))


def _own(losses: Mapping[str, float]) -> float:
    """The loss of whom the expert learns from."""
    return losses.get("teacher", losses["expert"])


def anchor_expert(
    anchor: ModelSource,
    expert: ModelSource,
    teacher: ModelSource | None,
    out: Path,
    train: Sequence[ChatExample],
    held_out: Sequence[ChatExample],
    settings: AnchoringSettings,
    layers: Sequence[int] | None = None,
    notes: Mapping[str, Any] | None = None,
    loading: Loading | None = None,
) -> AnchorResult:
    """Trains the MLPs of `layers` (None: all) and writes the anchored expert to folder `out`, with `anchoring.json`.

    Without a `teacher` the answers of `train` are learnt as they are. `notes` go into `anchoring.json`. `loading` says
    how whole models that are only asked are spread.
    An interrupted call goes on when it is made again. Raises UserError where the result scores no better than the
    anchor, or the teacher's vocabulary is another.
    """
    training = settings.model_dump(include=set(TrainingSettings.model_fields))
    # the gain over the start may be none: the one over the anchor is checked here
    as_branch = BranchSettings(**{**training, "trainable": "mlp", "allow_no_gain": True})
    partial = out.with_name(f".{out.name}.anchor")
    judged = {"anchor": anchor, "expert": expert}
    if teacher is not None and teacher.paths != expert.paths:
        judged["teacher"] = teacher
    prepared = _prepared(judged, partial, train, held_out, settings, as_branch, layers, loading)
    before = prepared["before"]
    limits = (before["anchor"]["loss"], _own({name: found["loss"] for name, found in before.items()}))
    learnt_from = None
    if teacher is not None:
        learnt_from = Teacher(teacher, settings.top_logits, anchor.folder, loading)
    start, done = partial / "start", partial / "done"
    trained = train_expert(
        start, done, train, held_out, as_branch, layers, (), learnt_from, whole=True, limits=limits, keep_start=True
    )
    result = AnchorResult(
        losses={**{name: found["loss"] for name, found in before.items()}, "anchored": trained.loss_after},
        scores={**{name: found["score"] for name, found in before.items()}, "anchored": trained.score_after},
        score_name=trained.score_name,
        start=prepared["start"],
        starts=prepared["starts"],
        best_step=trained.best_step,
        tokens=trained.tokens,
        seconds=trained.seconds,
        moved={
            "expert": moved_by_group(anchor, expert),
            "anchored": moved_by_group(anchor, ModelSource("anchored", done)),
        },
    )
    if result.scores["anchored"] <= result.scores["anchor"] and not settings.allow_no_gain:
        raise UserError(
            f"expert {expert.name} scores {result.scores['anchored']:.3f} on held-out {result.score_name} once "
            f"anchored, no better than the anchor's {result.scores['anchor']:.3f} (the drifted expert: "
            f"{result.scores['expert']:.3f}): change anchor.data or steps, or set anchor.allow_no_gain"
        )
    (done / RESULT).unlink()
    shares = {"retained_share": result.retained_share, "starts_retained": result.starts_retained}
    write_json(done / ANCHORING_NOTE, {**asdict(result), **shares, **(notes or {})})
    put_in_place(done, out)
    release(partial, PREPARED)
    return result


def _prepared(
    models: Mapping[str, ModelSource],
    partial: Path,
    train: Sequence[ChatExample],
    held_out: Sequence[ChatExample],
    settings: AnchoringSettings,
    as_branch: BranchSettings,
    layers: Sequence[int] | None,
    loading: Loading | None,
) -> dict[str, Any]:
    """What comes before the training, done once: `before`, what the models score and lose, and folder `start`.

    `start` names the row of STARTS that the folder holds, `starts` has the loss of each that was tried.
    """
    note = partial / PREPARED
    anchor, expert = models["anchor"], models["expert"]
    stamps = [weight_stamps(path) for source in models.values() for path in source.paths]
    texts = [(row.question, row.answer) for row in (*train[:TRANSPORT_ROWS], *held_out)]
    key = repr((models, stamps, settings.start, as_branch, layers, texts))
    if note.is_file() and (noted := read_json(note))["key"] == key:
        return dict(noted)
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "start").mkdir(parents=True)
    tokenizer = AutoTokenizer.from_pretrained(anchor.folder)
    judged, watched = held_out[: settings.score_rows], held_out[: settings.held_out_rows]
    before = {}
    for name, source in models.items():
        before[name] = judge(load_model(source, "sdpa", loading), tokenizer, judged, watched, as_branch, source.name)

    whole = as_branch.model_copy(update={"lora_rank": None})
    model = trainable_model(anchor.folder, whole, layers, training_dtype(as_branch))
    starts = {}
    for name in STARTS if settings.start == "best" else [settings.start]:
        if name == "transported":
            batches = encode_batches(tokenizer, train[:TRANSPORT_ROWS], max_length=settings.max_length)
            _transport(model, anchor, expert, batches, partial / name)
        _put(model, _mlps(name, anchor, expert, partial))
        starts[name] = judge(model, tokenizer, (), watched, as_branch, f"start {name}")["loss"]
    best = min(SHARES, key=starts.__getitem__) if settings.start == "best" else settings.start
    tried = ", ".join(f"{name} {loss:.3f}" for name, loss in starts.items())
    console.print(f"  {expert.name} starts from: {best} (held-out loss {tried})", highlight=False, soft_wrap=True)
    _put(model, _mlps(best, anchor, expert, partial))
    write_full(model, anchor.folder, partial / "start")
    shutil.rmtree(partial / "transported", ignore_errors=True)
    prepared = {"key": key, "before": before, "start": best, "starts": starts}
    write_json(note, prepared)
    return prepared


def _transport(model: Any, anchor: ModelSource, expert: ModelSource, batches: list[Batch], folder: Path) -> None:
    """Writes the transported MLPs of all layers that the model may change to `folder`, shard by shard."""
    ours = Reader(anchor)
    trained = [layer_of(name) for name, parameter in model.named_parameters() if parameter.requires_grad]
    folder.mkdir()
    moved = transported(ours, Reader(expert), batches, {layer for layer in trained if layer is not None})
    write_index(folder, write_shards(folder, "mlp", moved))
    write_json(folder / "config.json", ours.config)


def _mlps(start: str, anchor: ModelSource, expert: ModelSource, partial: Path) -> Callable[[str], torch.Tensor]:
    """The MLP tensors of a start, by name."""
    if start == "transported":
        return Checkpoint(partial / start).tensor
    ours, theirs, share = Reader(anchor), Reader(expert), SHARES[start]
    return lambda name: torch.lerp(ours.tensor(name).float(), theirs.tensor(name).float(), share)


@torch.no_grad()
def _put(model: Any, mlps: Callable[[str], torch.Tensor]) -> None:
    """Gives the MLPs that the model may change other weights."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.copy_(mlps(name))
