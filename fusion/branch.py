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
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.utils import logging as transformers_logging

from fusion.architecture import MLP_PARTS, is_mlp, layer_of
from fusion.checkpoint import Checkpoint, put_in_place, read_json, write_json
from fusion.data import ChatExample
from fusion.drift import GROUPS, Moved, group_of, moved_by_group
from fusion.errors import UserError
from fusion.evaluation.generate import answer_examples, answer_losses, unwrapped
from fusion.evaluation.scores import score
from fusion.hardware import compute_dtype
from fusion.packing import answer_loss, pack, training_row
from fusion.progress import console, progress_bar
from fusion.recipe import BranchSettings
from fusion.sources import ModelSource
from fusion.teacher import Teacher

TRAINED = {"mlp": ("mlp",), "mlp+embeddings": ("mlp", "embeddings", "head")}  # groups of tensors; otherwise all
ATTENTION_PARTS = ("q_proj", "k_proj", "v_proj", "o_proj")
BEST, RESULT = "best.safetensors", "branch.json"
COPIED = (".json", ".jinja", ".txt", ".model")  # config, tokenizer, template


@dataclass(frozen=True)
class TrainResult:
    """What a branch cost and what it brought; losses in nats per held-out answer token, scores from 0 to 1."""

    loss_before: float
    loss_after: float
    score_before: float
    score_after: float
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
) -> TrainResult:
    """Trains the model in folder `start` on `train` and writes the expert to folder `out`, with `branch.json`.

    `layers` restricts what is trained in decoder layers to these. With a `teacher` the answers are learnt as it sees
    them. With `whole` an adapter is merged into the result. `notes` go into `branch.json`. `general` rows are mixed
    in until they are `settings.general_share` of all. The first `held_out_rows` of `held_out` pick the best step, the
    first `score_rows` judge the result. An interrupted call goes on from its last evaluation when it is made again.
    Raises UserError where a row is too long, a layer does not exist, or the expert scores no better than `start`.
    """
    began = time.monotonic()
    partial = out.with_name(f".{out.name}.branch")
    decisive = settings.model_copy(update={"allow_no_gain": False})
    _claim(partial, _fingerprint(start, train, held_out, general, decisive, layers, teacher))
    tokenizer = AutoTokenizer.from_pretrained(start)
    rows = _fitting(tokenizer, _mixed(train, general, settings), settings.max_length)
    if teacher is not None:
        teacher.teach(rows, partial / "teacher.safetensors", settings.batch_rows)
    model = trainable_model(start, settings, layers)
    judged, watched = held_out[: settings.score_rows], held_out[: settings.held_out_rows]
    score_name = judged[0].score if judged else ""

    before_file = partial / "before.json"
    if not before_file.is_file():
        write_json(before_file, judge(model, tokenizer, judged, watched, settings, "anchor"))
    before = read_json(before_file)

    progress = _Progress(
        partial, model, settings.evaluate_every, before["loss"], lambda: _mean_loss(model, tokenizer, watched, settings)
    )
    trainer = _BranchTrainer(
        model=model,
        args=_arguments(partial, settings, len(rows)),
        train_dataset=rows,
        data_collator=lambda batch: pack(batch, settings.max_length, tokenizer.pad_token_id or 0),
        callbacks=[progress, *([_Pull(model, settings.anchor_penalty)] if settings.anchor_penalty else [])],
    )
    progress.trainer = trainer
    trainer.remove_callback(PrinterCallback)
    with _quiet_trainer():
        trainer.train(resume_from_checkpoint=_last_checkpoint(partial))

    _restore(model, load_file(partial / BEST), torch.float32 if settings.lora_rank else _saved_dtype(start))
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
    result = TrainResult(
        loss_before=before["loss"],
        loss_after=after["loss"],
        score_before=before["score"],
        score_after=after["score"],
        score_name=score_name,
        best_step=progress.best_step,
        steps=settings.steps,
        tokens=trainer.tokens,
        seconds=round(time.monotonic() - began, 1),
        curve=progress.curve,
        moved=moved_by_group(ModelSource("anchor", start), made),
    )
    record = {**asdict(result), "settings": settings.model_dump(mode="json"), **(notes or {})}
    write_json(made.paths[-1] / RESULT, record)
    put_in_place(made.paths[-1], out)
    shutil.rmtree(partial, ignore_errors=True)
    return result


def _last_checkpoint(partial: Path) -> str | None:
    """The newest complete checkpoint (its trainer_state.json is written last); half-written ones are removed."""
    found = sorted(partial.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    complete = [path for path in found if (path / "trainer_state.json").is_file()]
    for path in found:
        if path not in complete:
            shutil.rmtree(path)
    return str(complete[-1]) if complete else None


def _fitting(tokenizer: Any, examples: Sequence[ChatExample], max_length: int) -> list[dict[str, Any]]:
    """The rows of at most `max_length` tokens; says how many were left out. UserError where that is most of them."""
    rows = [training_row(tokenizer, example) for example in examples]
    kept = [row for row in rows if len(row["input_ids"]) <= max_length]
    if 2 * len(kept) < len(rows) or not kept:
        raise UserError(
            f"{len(kept)} of {len(rows)} training rows have at most branch.max_length {max_length} tokens: "
            "raise it, or give other data"
        )
    if len(kept) < len(rows):
        console.print(f"  {len(rows) - len(kept)} rows over branch.max_length {max_length} left out", highlight=False)
    return kept


def _mixed(train: Sequence[ChatExample], general: Sequence[ChatExample], settings: BranchSettings) -> list[ChatExample]:
    share = settings.general_share
    if share and not general:
        raise UserError(f"branch.general_share is {share} but there are no general rows: give the general domain data")
    wanted = round(len(train) * share / (1 - share))
    if len(general) < wanted:
        console.print(f"  {len(general)} general rows are fewer than the {wanted} of branch.general_share {share}")
    return [*train, *general[:wanted]]


def trainable_model(start: Path, settings: BranchSettings, layers: Sequence[int] | None) -> Any:
    """The anchor in float32, with gradients only where the expert may differ from it."""
    gpu = torch.cuda.is_available()
    dtype = torch.bfloat16 if gpu and settings.lora_rank else torch.float32
    model = AutoModelForCausalLM.from_pretrained(
        start,
        dtype=dtype,
        attn_implementation="sdpa",  # keeps packed rows apart by their positions; flash-attn would want one sequence
        device_map="auto" if gpu else None,
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


def _arguments(partial: Path, settings: BranchSettings, rows: int) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(partial),
        max_steps=settings.steps,
        per_device_train_batch_size=min(settings.batch_rows, rows),
        gradient_accumulation_steps=settings.gradient_accumulation,
        learning_rate=settings.learning_rate,
        warmup_steps=settings.warmup_steps,
        lr_scheduler_type="cosine",
        weight_decay=0.0,
        max_grad_norm=1.0,
        bf16=compute_dtype() == torch.bfloat16,
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=torch.cuda.is_available(),
        gradient_checkpointing_kwargs={"use_reentrant": False},
        save_strategy="no",  # _Progress asks for it
        save_total_limit=1,
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        seed=settings.seed,
    )


class _BranchTrainer(Trainer):
    """Trainer whose head runs on answer tokens alone, and whose checkpoints hold the trained tensors alone."""

    tokens = 0  # trained so far, padding aside

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        positions = inputs["position_ids"]
        self.tokens += int((positions > 0).sum() + (positions == 1).sum())  # each row starts with one 0
        loss, answers = answer_loss(unwrapped(model), inputs)
        return loss / (num_items_in_batch if num_items_in_batch is not None else max(1, answers))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        save_file(_trained(self.model), folder / "trained.safetensors")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        _restore(self.model, load_file(Path(resume_from_checkpoint) / "trained.safetensors"))


class _Progress(TrainerCallback):
    """Shows the steps, measures the held-out loss every few of them, keeps the best step's tensors and the state."""

    trainer: _BranchTrainer

    def __init__(self, partial: Path, model: Any, every: int, loss_before: float, held_out_loss: Callable[[], float]):
        self.partial, self.model, self.every, self.held_out_loss = partial, model, every, held_out_loss
        self.bar = progress_bar()
        self.curve: list[tuple[int, float]] = [(0, loss_before)]
        self.best_step, self.best_loss = 0, math.inf

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        noted = self.partial / "curve.json"
        if state.global_step and noted.is_file():
            saved = read_json(noted)
            self.curve = [(step, loss) for step, loss in saved["curve"] if step <= state.global_step]
            self.best_step, self.best_loss = min(self.curve[1:], key=lambda point: point[1], default=(0, math.inf))
            self.trainer.tokens = saved["tokens"]
        self.bar.start()
        self.task = self.bar.add_task("training", total=state.max_steps, completed=state.global_step, unit="step")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.update(self.task, completed=state.global_step)
        if state.global_step % self.every and state.global_step < state.max_steps:
            return
        loss = round(self.held_out_loss(), 5)
        self.curve.append((state.global_step, loss))
        if loss < self.best_loss:
            self.best_step, self.best_loss = state.global_step, loss
            aside = self.partial / f"{BEST}.partial"
            save_file(_trained(self.model), aside)
            aside.replace(self.partial / BEST)
        write_json(self.partial / "curve.json", {"curve": self.curve, "tokens": self.trainer.tokens})
        self.bar.update(self.task, description=f"training, held-out loss {loss:.3f}")
        control.should_save = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.stop()


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


def _trained(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().contiguous() for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def _restore(model: Any, tensors: dict[str, torch.Tensor], dtype: torch.dtype = torch.float32) -> None:
    """Puts `tensors` into the model as `dtype` would hold them: what is judged is what is saved."""
    parameters = dict(model.named_parameters())
    for name, tensor in tensors.items():
        parameters[name].copy_(tensor.to(dtype))


def _mean_loss(model: Any, tokenizer: Any, rows: Sequence[ChatExample], settings: BranchSettings) -> float:
    return _per_token(answer_losses(model, tokenizer, rows, settings.batch_rows))


def _per_token(losses: Sequence[tuple[float, int]]) -> float:
    return sum(nats for nats, _ in losses) / max(1, sum(tokens for _, tokens in losses))


def judge(
    model: Any,
    tokenizer: Any,
    judged: Sequence[ChatExample],
    watched: Sequence[ChatExample],
    settings: BranchSettings,
    who: str,
) -> dict[str, float]:
    answers = answer_examples(model, tokenizer, judged, settings.max_new_tokens, 32, f"task score, {who}")
    scores = [score(answer.text, row) for answer, row in zip(answers, judged, strict=True)]
    losses = [(answer.nats, answer.tokens) for answer in answers[: len(watched)]]
    losses += answer_losses(model, tokenizer, watched[len(losses) :], settings.batch_rows)
    return {"score": sum(scores) / max(1, len(scores)), "loss": _per_token(losses)}


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
    weights = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(start.glob("*.safetensors"))]
    return hashlib.sha256(repr((config, weights, parts)).encode()).hexdigest()


def _claim(partial: Path, fingerprint: str) -> None:
    """Makes the aside folder this call's: what an earlier, different call left there is removed."""
    note = partial / "call.txt"
    if not note.is_file() or note.read_text(encoding="utf-8") != fingerprint:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        note.write_text(fingerprint, encoding="utf-8")


@contextmanager
def _quiet_trainer() -> Iterator[None]:
    """The trainer's own messages off: the bar and branch.json say what it did."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
