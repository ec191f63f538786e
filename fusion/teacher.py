"""What a teacher makes of training rows: its likeliest next tokens at every answer token, kept as columns of the rows.

So teacher and student need not be in memory together, and a student of another size or another attention can learn
from it: only the vocabulary has to be the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.nn.utils.rnn import pad_sequence

from fusion.checkpoint import read_json
from fusion.errors import UserError
from fusion.packing import IGNORED, TEACHER_COLUMNS, answer_logits
from fusion.progress import track
from fusion.sections.fusing import Loading
from fusion.sources import ModelSource, load_model
from fusion.vocabulary import other_token, token_ids


@dataclass(frozen=True)
class Teacher:
    """A model whose `top_logits` likeliest tokens the student in folder `student` is to learn."""

    source: ModelSource
    top_logits: int
    student: Path
    loading: Loading | None = None

    @cached_property
    def vocabulary(self) -> int:
        """How many tokens the student has, padding included."""
        size: int = read_json(self.student / "config.json")["vocab_size"]
        return size

    def teach(self, rows: Sequence[dict[str, Any]], store: Path, batch_rows: int) -> None:
        """Gives every row `teacher_ids` and `teacher_logs`, `(answer tokens, k)`: tokens and log-probabilities.

        The file `store` keeps them for a call that is made again. Raises UserError where the teacher's vocabulary is
        another, or too small.
        """
        if not store.is_file():
            self._same_vocabulary()
            aside = store.with_name(f"{store.name}.partial")
            save_file(_columns(rows, self, batch_rows), aside)
            aside.replace(store)
        columns = load_file(store)
        counts = [sum(label != IGNORED for label in row["labels"]) for row in rows]
        for name in TEACHER_COLUMNS:
            for row, part in zip(rows, columns[name].split(counts), strict=True):
                row[name] = part

    def _same_vocabulary(self) -> None:
        folder, wanted = self.source.folder, "a teacher of logits needs the anchor's tokenizer, one of text any"
        size = read_json(folder / "config.json")["vocab_size"]
        if size < self.vocabulary:
            raise UserError(
                f"teacher {folder} has a vocabulary of {size} tokens, the anchor one of {self.vocabulary}: {wanted}"
            )
        token = other_token(token_ids(self.student), token_ids(folder))
        if token is not None:
            raise UserError(f"teacher {folder} gives {token!r} another id than the anchor: {wanted}")


@torch.no_grad()
def _columns(rows: Sequence[dict[str, Any]], teacher: Teacher, batch_rows: int) -> dict[str, torch.Tensor]:
    """The columns of all rows one after the other, `(answer tokens of all rows, k)`."""
    model = load_model(teacher.source, loading=teacher.loading)
    k = min(teacher.top_logits, teacher.vocabulary)
    ids: list[torch.Tensor] = []
    logs: list[torch.Tensor] = []
    for start in track(range(0, len(rows), batch_rows), f"answers as {teacher.source.name} sees them", unit="batches"):
        batch = {name: part.to(model.device) for name, part in _padded(rows[start : start + batch_rows]).items()}
        logits, _ = answer_logits(model, batch)
        top = torch.log_softmax(logits[:, : teacher.vocabulary], dim=1).topk(k, dim=1)  # padding cut off
        ids.append(top.indices.int().cpu())
        logs.append(top.values.half().cpu())
    return dict(zip(TEACHER_COLUMNS, (torch.cat(ids), torch.cat(logs)), strict=True))


def _padded(rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Rows as right-padded batch: under a causal mask no real token looks at the padding."""

    def laid_out(values: list[list[int]], filler: int) -> torch.Tensor:
        return pad_sequence([torch.tensor(row) for row in values], batch_first=True, padding_value=filler)

    ids = laid_out([row["input_ids"] for row in rows], 0)  # (rows, longest)
    labels = laid_out([row["labels"] for row in rows], IGNORED)
    return {"input_ids": ids, "labels": labels, "position_ids": torch.arange(ids.shape[1]).expand_as(ids)}
