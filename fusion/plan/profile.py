"""Hardware profiles: what a machine can hold and how fast it is, as far as a plan needs it.

    profile = load_profile("4x4090d", beside=Path("configs"))

A profile is a YAML file of the keys below, found by its name in `hardware/` beside the recipe or in ./configs/hardware,
or by its path. Sizes and peak rates are the makers' figures; disks and links are assumptions: copy the file, put your
own in, and name the copy.
"""

from pathlib import Path

from pydantic import Field

from fusion.errors import UserError
from fusion.recipe import Section
from fusion.recipe_file import load_section

GIB = 2**30
GB = 10**9


class HardwareProfile(Section):
    """One machine: `cards` alike, or none, where vLLM runs on the CPU and a card is the machine's memory."""

    name: str
    cards: int = Field(ge=0)
    memory_gib: float = Field(gt=0)  # of one card as CUDA reports it; of the machine without cards
    memory_gb_s: float = Field(gt=0)  # bandwidth of that memory
    bfloat16_tflops: float = Field(gt=0)  # of one card, dense
    fp8_tflops: float | None = Field(None, gt=0)  # None: no FP8 units
    native_bfloat16: bool = True  # a CPU without it is served float32
    link_gb_s: float = Field(gt=0)  # from the host's memory to a card
    disk_read_gb_s: float = Field(gt=0)
    disk_write_gb_s: float = Field(gt=0)

    @property
    def memory(self) -> int:
        """Bytes of one card."""
        return int(self.memory_gib * GIB)

    @property
    def batch(self) -> tuple[int, int]:
        """Tokens and sequences of one step by vLLM's defaults (engine/arg_utils.py, get_batch_defaults)."""
        if self.memory_gib >= 160:
            return 16384, 1024
        return (8192, 1024) if self.cards and self.memory_gib >= 70 else (2048, 256)


def load_profile(name: str, beside: Path) -> HardwareProfile:
    """The profile `name`, a file or one of the folder `hardware` of `beside` (the recipe's) and of ./configs.

    Raises UserError where there is none, with those there are, or where the file is wrong.
    """
    if Path(name).is_file():
        return load_section(HardwareProfile, Path(name), None, "configs/hardware/h200.yaml")
    folders = list(dict.fromkeys((beside / "hardware", Path("configs/hardware"))))
    for folder in folders:
        if (folder / f"{name}.yaml").is_file():
            return load_section(HardwareProfile, folder / f"{name}.yaml", None, "configs/hardware/h200.yaml")
    known = sorted({path.stem for folder in folders for path in folder.glob("*.yaml")})
    there = f"there are {', '.join(known)}" if known else f"{folders[0]} has none"
    raise UserError(f"no hardware profile is called '{name}': {there}, or name a YAML file")
