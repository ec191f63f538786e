"""How every peer trains gates, for the benchmark: the whole fused model in memory, transformers' Trainer, gates alone.

    python -m gate_training.peer configs/demo.yaml 1e-2

All but the gates is frozen; the loss is the language-model loss of the answers plus the cross-entropy of every layer's
router logits on the labels. Prints one JSON object: the seconds and held-out routing accuracy of every evaluation
(evaluations themselves not counted) and the process's peak memory.
"""

import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from fusion.errors import run_main
from fusion.hardware import peak_memory
from fusion.layers import Batch
from fusion.progress import quiet_libraries
from fusion.recipe import Recipe
from fusion.recipe_file import load_recipe
from fusion.training import QUIET
from gate_training.examples import routing_data

quiet_libraries()
BATCH_ROWS = 16
EPOCHS = 3
EVALUATE_EVERY = 5  # steps


@torch.no_grad()
def routing_accuracy(model: Any, batches: Sequence[Batch]) -> float:
    """The share of tokens that the model's own router logits send to their label's expert, mean over sparse layers."""
    right = total = 0
    for batch in batches:
        ids, mask = batch.ids.to(model.device), batch.real.long().to(model.device)
        logits = model(input_ids=ids, attention_mask=mask, output_router_logits=True).router_logits
        labels = batch.token_labels().to(model.device)
        for layer in logits:  # (rows x length, experts)
            right += int((layer[mask.flatten().bool()].argmax(dim=1) == labels).sum())
            total += len(labels)
    return right / total


class _GateTrainer(Trainer):
    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        labels = inputs.pop("experts")
        outputs = model(**inputs, output_router_logits=True)
        real = inputs["attention_mask"].flatten().bool()
        routed = [F.cross_entropy(layer[real].float(), labels.flatten()[real]) for layer in outputs.router_logits]
        loss: torch.Tensor = outputs.loss + torch.stack(routed).mean()
        return loss


class _Clock(TrainerCallback):
    def __init__(self, model: Any, held_out: Sequence[Batch]):
        self._model, self._held_out = model, held_out
        self.curve: list[tuple[float, float]] = []  # (seconds, accuracy)
        self._seconds = 0.0

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._since = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % EVALUATE_EVERY == 0 or state.global_step == state.max_steps:
            self._seconds += time.perf_counter() - self._since
            self.curve.append((self._seconds, routing_accuracy(self._model, self._held_out)))
            self._since = time.perf_counter()


def _collate(batches: list[Batch]) -> dict[str, torch.Tensor]:
    """Single-row batches, padded to the longest."""
    width = max(batch.ids.shape[1] for batch in batches)

    def padded(part: torch.Tensor, filler: int) -> torch.Tensor:
        return F.pad(part, (0, width - part.shape[1]), value=filler)

    ids = torch.cat([padded(batch.ids, 0) for batch in batches])  # (rows, width)
    answers = torch.cat([padded(torch.where(batch.answer, batch.ids, -100), -100) for batch in batches])
    real = torch.cat([padded(batch.real.long(), 0) for batch in batches])
    experts = torch.cat([batch.labels[:, None] for batch in batches]).expand(-1, width)
    return {"input_ids": ids, "labels": answers, "attention_mask": real, "experts": experts}


def train_gates(recipe: Recipe, learning_rate: float) -> dict[str, Any]:
    """Trains the gates of a copy in memory; the curve of (seconds, held-out accuracy), and peak memory in bytes."""
    settings = recipe.gate_training
    data = routing_data(recipe, recipe.fused)
    rows = replace(data, batch_tokens=1).train_batches()  # a row a batch
    held_out = data.held_out_batches()
    model = AutoModelForCausalLM.from_pretrained(recipe.fused, dtype=torch.float32, use_safetensors=True)
    torch.manual_seed(settings.seed)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.endswith("mlp.gate.weight")
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.02)
    clock = _Clock(model, held_out)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=BATCH_ROWS,
            num_train_epochs=EPOCHS,
            learning_rate=learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=5,
            seed=settings.seed,
            **QUIET,
        )
        trainer = _GateTrainer(
            model=model, args=arguments, train_dataset=rows, data_collator=_collate, callbacks=[clock]
        )
        trainer.train()
    return {"learning_rate": learning_rate, "curve": clock.curve, "peak_bytes": peak_memory()}


def main(path: str, learning_rate: str, *overrides: str) -> None:
    """Prints the figures of the recipe's gates as a peer trains them."""
    print(json.dumps(train_gates(load_recipe(Path(path), list(overrides)), float(learning_rate))))


if __name__ == "__main__":
    run_main(main)
