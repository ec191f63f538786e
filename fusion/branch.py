"""Trains an expert from the anchor on one domain's rows: the "branch" of Branch-Train-Mix.

    qwen-fusion branch configs/qwen2.5-0.5b-two-experts.yaml

`trainable: mlp` makes an anchored expert, bit-identical to the anchor outside its MLPs; `mlp+embeddings` lets
embeddings and head move as well (as BAR does for new tokens), `all` every weight. `lora_rank` makes a PEFT adapter on
the linear maps among them. `anchor_penalty` holds what is trained outside the MLPs near the anchor.

transformers' Trainer does the steps: AdamW with warm-up and cosine decay, loss on answer tokens alone, rows packed into
sequences in which none sees another. The step with the best held-out loss is kept, and the expert is then judged by its
task score beside the anchor's.
"""

import hashlib
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from fusion import training
from fusion.architecture import MLP_PARTS, is_mlp, layer_of
from fusion.checkpoint import Checkpoint, put_in_place, weight_stamps, write_json
from fusion.data import ChatExample
from fusion.drift import GROUPS, Moved, group_of, moved_by_group
from fusion.errors import UserError
from fusion.evaluation.generate import answer_examples, answer_losses
from fusion.evaluation.intervals import difference
from fusion.evaluation.scores import score
from fusion.progress import console
from fusion.resumable import claim, noted, release
from fusion.sections.training import BranchSettings, HealSettings
from fusion.sources import ModelSource
from fusion.teacher import Teacher

TRAINED = {"mlp": ("mlp",), "mlp+embeddings": ("mlp", "embeddings", "head")}  # groups of tensors; otherwise all
ATTENTION_PARTS = ("q_proj", "k_proj", "v_proj", "o_proj")
RESULT = "branch.json"
COPIED = (".json", ".jinja", ".txt", ".model")  # config, tokenizer, template


@dataclass(frozen=True)
class TrainResult:
    """What a branch cost and what it brought; losses in nats per held-out answer token, scores from 0 to 1."""

    loss_before: float
    loss_after: float
    score_before: float
    score_after: float
    score_gain_interval: tuple[float, float]  # 95%, of score_after - score_before, paired by row
    score_name: str
    best_step: int
    steps: int
    tokens: int  # trained, prompts and answers, padding aside
    seconds: float
    curve: list[tuple[int, float]]  # (step, held-out loss)
    moved: dict[str, Moved]  # by group of tensors, against the start


def train_expert(
    start: Path,
    out: Path,
    train: Sequence[ChatExample],
    held_out: Sequence[ChatExample],
    settings: BranchSettings,
    layers: Sequence[int] | None = None,
    general: Sequence[ChatExample] = (),
    teacher: Teacher | None = None,
    whole: bool = False,
    notes: Mapping[str, Any] | None = None,
    limits: tuple[float, float] | None = None,
    watched: Sequence[ChatExample] = (),
    keep_start: bool = False,
) -> TrainResult:
    """Trains the model in folder `start` on `train` and writes the expert to folder `out`, with `branch.json`.

    `layers` restricts what is trained in decoder layers to these. With a `teacher` the answers are learnt as it sees
    them. With `whole` an adapter is merged into the result. `notes` go into `branch.json`. With `limits`, the losses of
    anchor and drifted expert, the bar says what of that gain is kept. `general` rows are mixed in until they are
    `settings.general_share` of all. `watched` rows, or the first `held_out_rows` of `held_out`, pick the best step, the
    first `score_rows` of `held_out` judge the result; with `keep_start` the start may be the best step. An interrupted
    call goes on from its last evaluation when it is made again. Raises UserError where most rows are too long, a
    layer does not exist, or the expert scores no better than `start`.
    """
    began = time.monotonic()
    partial = out.with_name(f".{out.name}.branch")
    section = "branch" if limits is None else "anchor"
    decisive = settings.model_copy(update={"allow_no_gain": False})
    claim(partial, _fingerprint(start, train, held_out, general, decisive, layers, teacher, watched))
    tokenizer = AutoTokenizer.from_pretrained(start)
    rows = training.fitting(tokenizer, _mixed(train, general, settings), settings.max_length, section)
    if teacher is not None:
        teacher.teach(rows, partial / "teacher.safetensors", settings.batch_rows)
    model = trainable_model(start, settings, layers)
    judged, watched = held_out[: settings.score_rows], watched or held_out[: settings.held_out_rows]
    score_name = judged[0].score if judged else ""

    before = noted(partial / "before.json", lambda: judge(model, tokenizer, judged, watched, settings, "start"))

    trained = training.train(
        model,
        rows,
        partial,
        settings,
        tokenizer.pad_token_id or 0,
        before["loss"],
        lambda: training.mean_loss(model, tokenizer, watched, settings.batch_rows),
        torch.float32 if settings.lora_rank else _saved_dtype(start),
        keep_start=keep_start,
        limits=limits,
        callbacks=[_Pull(model, settings.anchor_penalty)] if settings.anchor_penalty else [],
    )
    after = judge(model, tokenizer, judged, watched, settings, "expert")
    if after["score"] <= before["score"] and not settings.allow_no_gain:
        raise UserError(
            f"expert {out.name} scores {after['score']:.3f} on held-out {score_name}, no better than its "
            f"start's {before['score']:.3f} (loss {before['loss']:.3f} -> {after['loss']:.3f}): change its data or "
            "steps, or set branch.allow_no_gain"
        )
    if whole and settings.lora_rank:
        model = model.merge_and_unload()
        for name, parameter in model.named_parameters():
            parameter.requires_grad = ".mlp." in name
    made = _write(model, start, partial / "out")
    gain = difference(after["scores"], before["scores"])
    result = TrainResult(
        loss_before=before["loss"],
        loss_after=after["loss"],
        score_before=before["score"],
        score_after=after["score"],
        score_gain_interval=(gain.low, gain.high),
        score_name=score_name,
        best_step=trained.best_step,
        steps=settings.steps,
        tokens=trained.tokens,
        seconds=round(time.monotonic() - began, 1),
        curve=trained.curve,
        moved=moved_by_group(ModelSource("anchor", start), made),
    )
    record = {**asdict(result), "settings": settings.model_dump(mode="json"), **(notes or {})}
    write_json(made.paths[-1] / RESULT, record)
    put_in_place(made.paths[-1], out)
    release(partial)
    return result


def _mixed(train: Sequence[ChatExample], general: Sequence[ChatExample], settings: BranchSettings) -> list[ChatExample]:
    share = settings.general_share
    if share and not general:
        raise UserError(f"branch.general_share is {share} but there are no general rows: give the general domain data")
    wanted = round(len(train) * share / (1 - share))
    if len(general) < wanted:
        console.print(f"  {len(general)} general rows are fewer than the {wanted} of branch.general_share {share}")
    return [*train, *general[:wanted]]


def training_dtype(settings: BranchSettings) -> torch.dtype:
    """What the model is held in while it is trained: float32, but bfloat16 under an adapter on a GPU."""
    return torch.bfloat16 if torch.cuda.is_available() and settings.lora_rank else torch.float32


def trainable_model(
    start: Path, settings: BranchSettings, layers: Sequence[int] | None, dtype: torch.dtype | None = None
) -> Any:
    """The anchor in `dtype` (None: what it is trained in), with gradients only where the expert may differ from it."""
    model = AutoModelForCausalLM.from_pretrained(
        start,
        dtype=dtype or training_dtype(settings),
        attn_implementation="sdpa",  # keeps packed rows apart by their positions; flash-attn would want one sequence
        device_map="auto" if torch.cuda.is_available() else None,
        use_safetensors=True,
    )
    model.config.use_cache = False
    count = model.config.num_hidden_layers
    if layers is not None and not all(0 <= layer < count for layer in layers):
        raise UserError(f"routing.moe_layers {list(layers)} names a layer that {start} does not have: 0 to {count - 1}")
    if settings.lora_rank:
        from peft import LoraConfig, get_peft_model

        lora = LoraConfig(
            r=settings.lora_rank,
            lora_alpha=2 * settings.lora_rank,
            target_modules=list(MLP_PARTS if settings.trainable == "mlp" else MLP_PARTS + ATTENTION_PARTS),
            layers_to_transform=None if layers is None else list(layers),
            task_type="CAUSAL_LM",
        )
        return get_peft_model(model, lora)
    groups = TRAINED.get(settings.trainable, GROUPS)
    for name, parameter in model.named_parameters():
        layer = layer_of(name)  # None: embeddings, final norm and head lie in no layer
        within = layer is None or layers is None or layer in layers
        parameter.requires_grad = within and group_of(name) in groups
    return model


class _Pull(TrainerCallback):
    """Pulls what is trained outside the MLPs back to the anchor's W0 after every step of the optimizer:

        W <- W0 + (W - W0) / (1 + learning rate x anchor_penalty)

    the proximal step of anchor_penalty / 2 x ||W - W0||^2 (L2-SP: Li et al., 2018, arXiv:1802.01483), decoupled from
    Adam's scaling as AdamW's weight decay is (Loshchilov and Hutter, 2019, arXiv:1711.05101). A step of Adam moves a
    weight by about the learning rate at most, so no weight gets further than about 1 / anchor_penalty. Of LoRA's B A
    it is B that shrinks.
    """

    def __init__(self, model: Any, penalty: float):
        self.penalty = penalty
        self.held = {
            parameter: parameter.detach().clone()
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and not is_mlp(name) and ".lora_A." not in name
        }

    @torch.no_grad()
    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        rate = kwargs["optimizer"].param_groups[0]["lr"]
        kept = 1 / (1 + rate * self.penalty)
        for parameter, old in self.held.items():
            parameter.copy_(torch.lerp(old.to(parameter.device), parameter, kept))


def judge(
    model: Any,
    tokenizer: Any,
    judged: Sequence[ChatExample],
    watched: Sequence[ChatExample],
    settings: BranchSettings | HealSettings,
    who: str,
) -> dict[str, Any]:
    """The task score of `judged`, from 0 to 1, the answer loss of `watched` in nats a token, and the rows' `scores`.

    Rows that both begin with are run once.
    """
    answers = answer_examples(model, tokenizer, judged, settings.max_new_tokens, 32, f"task score, {who}")
    scores = [score(answer.text, row) for answer, row in zip(answers, judged, strict=True)]
    alike = list(judged[: len(watched)]) == list(watched[: len(judged)])
    losses = [(answer.nats, answer.tokens) for answer in answers[: len(watched)]] if alike else []
    losses += answer_losses(model, tokenizer, watched[len(losses) :], settings.batch_rows)
    return {"score": sum(scores) / max(1, len(scores)), "loss": training.per_token(losses), "scores": scores}


def _saved_dtype(start: Path) -> torch.dtype:
    """The type in which the anchor holds its weights, and the expert will."""
    return Checkpoint(start).tensor("model.layers.0.mlp.down_proj.weight").dtype


def _write(model: Any, start: Path, folder: Path) -> ModelSource:
    """Writes the adapter, or the anchor's files with the trained tensors in the place of its own."""
    folder.mkdir(exist_ok=True)
    if not hasattr(model, "peft_config"):
        write_full(model, start, folder)
        return ModelSource("expert", folder)
    model.peft_config["default"].base_model_name_or_path = str(start)
    model.save_pretrained(str(folder))
    (folder / "README.md").unlink(missing_ok=True)
    return ModelSource("expert", start, folder)


def write_full(model: Any, start: Path, folder: Path) -> None:
    """Writes the weights that were trained, the others and the small files as they are in `start`, shard by shard."""
    checkpoint = Checkpoint(start)
    tied = dict(model.named_parameters(remove_duplicate=False))  # the head too, where it is the embedding
    for file in sorted(set(checkpoint.weight_map.values())):
        names = [name for name, where in checkpoint.weight_map.items() if where == file]
        tensors = {name: checkpoint.tensor(name) for name in names}
        for name in names:
            if name in tied and tied[name].requires_grad:
                tensors[name] = tied[name].detach().to("cpu", tensors[name].dtype).contiguous()
        save_file(tensors, folder / file, metadata={"format": "pt"})
    for path in sorted(start.iterdir()):
        if path.is_file() and path.suffix in COPIED and path.name not in (RESULT, "README.md"):
            shutil.copy(path, folder / path.name)


def _fingerprint(start: Path, *parts: Any) -> str:
    """A hash of all that decides the training, so that a changed call starts anew instead of going on."""
    config = (start / "config.json").read_text(encoding="utf-8")
    return hashlib.sha256(repr((config, weight_stamps(start), parts)).encode()).hexdigest()
