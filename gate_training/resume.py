"""What a fit keeps of every layer, so that one that was interrupted goes on from there, bit for bit.

The hidden states after a layer, the gates and their reports, in `<output>/.gates`, written aside and renamed; the files
of the layer before go when the next are complete.
"""

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fusion.checkpoint import written_aside
from fusion.layers import Gates, LayerStream
from fusion.recipe import Section
from gate_training.held_out import Confidence, LayerReport

FOLDER = ".gates"


class LayerNotes:
    """The notes of one fit by one process: `parts` tell it from any other."""

    def __init__(self, folder: Path, parts: tuple[Any, ...], process: int):
        key = hashlib.sha256(json.dumps(parts, default=_plain, sort_keys=True).encode()).hexdigest()[:16]
        self._path = folder / FOLDER / f"{key}-{process}.safetensors"

    @staticmethod
    def forget(folder: Path) -> None:
        """Removes all notes."""
        shutil.rmtree(folder / FOLDER, ignore_errors=True)

    def keep(self, layer: int, stream: LayerStream, gates: Gates, reports: list[LayerReport]) -> None:
        """Notes that `layer` is done."""
        tensors = {"states": stream.states, **{f"gate.{index}": gate for index, gate in gates.items()}}
        said = {"layer": str(layer), "reports": json.dumps([dataclasses.asdict(report) for report in reports])}
        with written_aside(self._path) as aside:
            save_file(tensors, aside, said)

    def restore(self, stream: LayerStream) -> tuple[Gates, list[LayerReport]]:
        """Brings `stream` to where the notes end; the gates and reports so far, none where there are no notes."""
        if not self._path.is_file():
            return {}, []
        try:
            with safe_open(self._path, framework="pt") as file:
                said = file.metadata()
                gates = {int(n.removeprefix("gate.")): file.get_tensor(n) for n in file.offset_keys() if n != "states"}
                stream.resume(int(said["layer"]) + 1, file.get_tensor("states"))
        except SafetensorError:
            return {}, []
        return dict(sorted(gates.items())), [_report(row) for row in json.loads(said["reports"])]


def _report(row: dict[str, Any]) -> LayerReport:
    return LayerReport(**{**row, "calibration": [Confidence(**found) for found in row["calibration"]]})


def _plain(value: Any) -> Any:
    if isinstance(value, Section):
        return value.model_dump(mode="json")
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else str(value)
