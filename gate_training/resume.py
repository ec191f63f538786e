"""What a fit keeps of every layer, so that one that was interrupted goes on from there, bit for bit.

The hidden states after a layer, the gates and their reports, in `<output>/.gates`, written aside and renamed. The notes
of the layer before go when those of all processes are complete, and a fit goes on from the last layer that all have.
"""

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fusion.checkpoint import written_aside
from fusion.layers import Gates, LayerStream
from fusion.sections.section import Section
from gate_training.held_out import Confidence, LayerReport

FOLDER = ".gates"


class LayerNotes:
    """The notes of one fit: `parts` tell it from any other."""

    def __init__(self, folder: Path, parts: tuple[Any, ...]):
        process = PartialState()
        told = json.dumps([process.num_processes, *parts], default=_plain, sort_keys=True)
        self._folder = folder / FOLDER
        self._stem = f"{hashlib.sha256(told.encode()).hexdigest()[:16]}-{process.process_index}"

    def _path(self, layer: int) -> Path:
        return self._folder / f"{self._stem}.{layer}.safetensors"

    @staticmethod
    def forget(folder: Path) -> None:
        """Removes all notes."""
        shutil.rmtree(folder / FOLDER, ignore_errors=True)

    def keep(self, layer: int, stream: LayerStream, gates: Gates, reports: list[LayerReport]) -> None:
        """Notes that `layer` is done."""
        tensors = {"states": stream.states, **{f"gate.{index}": gate for index, gate in gates.items()}}
        said = {"reports": json.dumps([dataclasses.asdict(report) for report in reports])}
        with written_aside(self._path(layer)) as aside:
            save_file(tensors, aside, said)
        PartialState().wait_for_everyone()
        self._path(layer - 1).unlink(missing_ok=True)

    def restore(self, stream: LayerStream) -> tuple[Gates, list[LayerReport]]:
        """Brings `stream` to where the notes end; the gates and reports so far, none where there are no notes."""
        mine = [int(path.name.split(".")[-2]) for path in self._folder.glob(f"{self._stem}.*.safetensors")]
        common = set.intersection(*map(set, gather_object([mine])))
        if not common:
            return {}, []
        layer = max(common)
        try:
            with safe_open(self._path(layer), framework="pt") as file:
                said, names = file.metadata(), [name for name in file.offset_keys() if name != "states"]
                gates = {int(name.removeprefix("gate.")): file.get_tensor(name) for name in names}
                stream.resume(layer + 1, file.get_tensor("states"))
        except SafetensorError:  # a broken disk: the file was complete when it was renamed
            return {}, []
        return dict(sorted(gates.items())), [_report(row) for row in json.loads(said["reports"])]


def _report(row: dict[str, Any]) -> LayerReport:
    return LayerReport(**{**row, "calibration": [Confidence(**found) for found in row["calibration"]]})


def _plain(value: Any) -> Any:
    if isinstance(value, Section):
        return value.model_dump(mode="json")
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else str(value)
