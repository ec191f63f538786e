"""Training some of a model's tensors with transformers' Trainer, quietly: packed rows, best step kept, resumable.

Whatever trains here (an expert, gates, a fused model's shared parts) passes through `train`: AdamW with warm-up and
cosine decay on rows packed into sequences in which none sees another, one bar with the held-out loss, and at the end
the tensors of the step at which that was least.
"""

import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging as transformers_logging

from fusion.checkpoint import read_json, write_json
from fusion.data import ChatExample
from fusion.errors import UserError
from fusion.evaluation.generate import answer_losses, unwrapped
from fusion.hardware import compute_dtype
from fusion.packing import answer_loss, pack, training_row
from fusion.progress import console, progress_bar
from fusion.sections.training import Steps

BEST = "best.safetensors"
QUIET: dict[str, Any] = {  # of TrainingArguments: no files, no lines, no bars of the Trainer's own
    "save_strategy": "no",
    "logging_strategy": "no",
    "report_to": [],
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
    "remove_unused_columns": False,
}

Batch = dict[str, torch.Tensor]
Loss = Callable[[Any, Batch], tuple[torch.Tensor, int]]  # (model, packed batch) -> summed loss, number of terms


@dataclass(frozen=True)
class Trained:
    """What the steps came to; losses in nats, tokens without padding."""

    best_step: int
    curve: list[tuple[int, float]]  # (step, held-out loss), step 0 first
    tokens: int


def train(
    model: Any,
    rows: Sequence[dict[str, Any]],
    partial: Path,
    settings: Steps,
    pad: int,
    loss_before: float,
    held_out_loss: Callable[[], float],
    saved_dtype: torch.dtype = torch.float32,
    loss: Loss = answer_loss,
    keep_start: bool = False,
    limits: tuple[float, float] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> Trained:
    """Trains the parameters of `model` that want a gradient and leaves them as the best step had them.

    They are rounded to `saved_dtype`. `rows` are those of `fusion.packing`, `pad` fills their sequences. With
    `keep_start` the start counts as step 0, so that the result is never worse than `loss_before`. With `limits`, the
    losses of anchor and own expert, the bar says what of that gain is kept. Folder `partial` holds what an interrupted
    call needs to go on when it is made again.
    """
    progress = _Progress(partial, model, settings.evaluate_every, loss_before, held_out_loss, keep_start, limits)
    trainer = _PackedTrainer(
        model=model,
        args=_arguments(partial, settings, len(rows)),
        train_dataset=rows,
        data_collator=lambda batch: pack(batch, settings.max_length, pad),
        callbacks=[progress, *callbacks],
    )
    trainer.answer_loss = loss
    progress.trainer = trainer
    trainer.remove_callback(PrinterCallback)
    with _quiet_trainer():
        trainer.train(resume_from_checkpoint=_last_checkpoint(partial))
    restore(model, load_file(partial / BEST), saved_dtype)
    return Trained(progress.best_step, progress.curve, trainer.tokens)


def fitting(tokenizer: Any, examples: Sequence[ChatExample], max_length: int, section: str) -> list[dict[str, Any]]:
    """The rows of at most `max_length` tokens; says how many were left out. UserError where that is most of them."""
    rows = [training_row(tokenizer, example) for example in examples]
    kept = [row for row in rows if len(row["input_ids"]) <= max_length]
    if 2 * len(kept) < len(rows) or not kept:
        raise UserError(
            f"{len(kept)} of {len(rows)} training rows have at most {section}.max_length {max_length} tokens: "
            "raise it, or give other data"
        )
    if len(kept) < len(rows):
        left_out = len(rows) - len(kept)
        console.print(f"  {left_out} rows over {section}.max_length {max_length} left out", highlight=False)
    return kept


def per_token(losses: Sequence[tuple[float, int]]) -> float:
    """The mean loss of (summed nats, tokens) pairs, in nats a token."""
    return sum(nats for nats, _ in losses) / max(1, sum(tokens for _, tokens in losses))


def mean_loss(model: Any, tokenizer: Any, rows: Sequence[ChatExample], batch_rows: int) -> float:
    """The whole model's loss over the rows' answers, in nats a token."""
    return per_token(answer_losses(model, tokenizer, rows, batch_rows))


def _last_checkpoint(partial: Path) -> str | None:
    """The newest complete checkpoint (its trainer_state.json is written last); half-written ones are removed."""
    found = sorted(partial.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    while found and not _whole_json(found[-1] / "trainer_state.json"):
        shutil.rmtree(found.pop())
    return str(found[-1]) if found else None


def _whole_json(path: Path) -> bool:
    try:
        read_json(path)
    except UserError:
        return False
    return True


def _arguments(partial: Path, settings: Steps, rows: int) -> TrainingArguments:
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
        save_total_limit=1,  # of checkpoints, which _Progress asks for
        seed=settings.seed,
        **QUIET,
    )


class _PackedTrainer(Trainer):
    """Trainer whose head runs on answer tokens alone, and whose checkpoints hold the trained tensors alone."""

    tokens = 0  # trained so far, padding aside
    answer_loss: Loss

    def compute_loss(
        self,
        model: Any,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        positions = inputs["position_ids"]
        self.tokens += int((positions > 0).sum() + (positions == 1).sum())  # each row starts with one 0
        loss, answers = self.answer_loss(unwrapped(model), inputs)
        return loss / (num_items_in_batch if num_items_in_batch is not None else max(1, answers))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        save_file(trained_tensors(self.model), folder / "trained.safetensors")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        restore(self.model, load_file(Path(resume_from_checkpoint) / "trained.safetensors"))


class _Progress(TrainerCallback):
    """Shows the steps, measures the held-out loss every few of them, keeps the best step's tensors and the state."""

    trainer: _PackedTrainer

    def __init__(
        self,
        partial: Path,
        model: Any,
        every: int,
        loss_before: float,
        held_out_loss: Callable[[], float],
        keep_start: bool,
        limits: tuple[float, float] | None,
    ):
        self.partial, self.model, self.every, self.held_out_loss = partial, model, every, held_out_loss
        self.bar, self.limits = progress_bar(), limits
        self.curve: list[tuple[int, float]] = [(0, loss_before)]
        self.first = 0 if keep_start else 1  # of the curve's points that may be the best
        self.best_step, self.best_loss = 0, loss_before if keep_start else math.inf

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        noted = self.partial / "curve.json"
        if state.global_step and noted.is_file():
            saved = read_json(noted)
            self.curve = [(step, loss) for step, loss in saved["curve"] if step <= state.global_step]
            candidates = self.curve[self.first :]
            self.best_step, self.best_loss = min(candidates, key=lambda point: point[1], default=(0, math.inf))
            self.trainer.tokens = saved["tokens"]
        elif self.first == 0:
            self._keep()
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
            self._keep()
        write_json(self.partial / "curve.json", {"curve": self.curve, "tokens": self.trainer.tokens})
        self.bar.update(self.task, description=f"training, {self._said(loss)}")
        control.should_save = True

    def _said(self, loss: float) -> str:
        anchor, own = self.limits or (0.0, 0.0)
        kept = f", {(anchor - loss) / (anchor - own):.2f} of the gain kept" if anchor > own else ""
        return f"held-out loss {loss:.3f}{kept}"

    def _keep(self) -> None:
        aside = self.partial / f"{BEST}.partial"
        save_file(trained_tensors(self.model), aside)
        aside.replace(self.partial / BEST)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.stop()


def trained_tensors(model: Any) -> dict[str, torch.Tensor]:
    """The parameters that want a gradient, by name."""
    return {name: p.detach().contiguous() for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def restore(model: Any, tensors: Batch, dtype: torch.dtype = torch.float32) -> None:
    """Puts `tensors` into the model as `dtype` would hold them: what is judged is what is saved."""
    parameters = dict(model.named_parameters())
    for name, tensor in tensors.items():
        parameters[name].copy_(tensor.to(dtype))


@contextmanager
def _quiet_trainer() -> Iterator[None]:
    """The trainer's own messages off: the bar and the record say what it did."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
