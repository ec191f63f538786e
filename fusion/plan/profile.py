"""Hardware profiles: what a machine can hold and how fast it is, as far as a plan needs it.

    profile = load_profile("4x4090d", beside=Path("configs"))

A profile is a YAML file of the keys below, found by its path, or by its name in `hardware/` beside the recipe, in
./configs/hardware, or among the shipped ones, wherever the command runs. Sizes and peak rates are the makers' figures;
disks and links are assumptions: copy the file, put your own in, and name the copy.
"""

from pathlib import Path

from pydantic import Field

from fusion.errors import UserError
from fusion.recipe_file import load_section
from fusion.sections.section import Section

SHIPPED = Path(__file__).parents[2] / "configs" / "hardware"  # of the repository, which is installed editable
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

    def batch(self, ways: int, max_model_len: int) -> tuple[int, int]:
        """Tokens and sequences of one step of vLLM's API server by its defaults (engine/arg_utils.py,
        get_batch_defaults, _set_default_max_num_seqs_and_batched_tokens_args).

        On the CPU both grow with the ways, and a step takes a whole sequence: prompts are not cut there
        (serving/engine.py, --no-enable-chunked-prefill).
        """
        if not self.cards:
            tokens, sequences = max(2048 * ways, max_model_len), 128 * ways
        elif self.memory_gib >= 160:
            tokens, sequences = 16384, 1024
        elif self.memory_gib >= 70 and "a100" not in self.name.lower():
            tokens, sequences = 8192, 1024
        else:
            tokens, sequences = 2048, 256
        tokens = min(tokens, sequences * max_model_len)
        return tokens, min(sequences, tokens)


def load_profile(name: str, beside: Path) -> HardwareProfile:
    """The profile `name`: a file, or one of `hardware` in `beside` (the recipe's folder), of ./configs/hardware, or of
    the shipped ones, in that order.

    Raises UserError where there is none, with those there are, or where the file is wrong.
    """
    if Path(name).is_file():
        return load_section(HardwareProfile, Path(name), None, "configs/hardware/h200.yaml")
    folders = list(dict.fromkeys((beside / "hardware", Path("configs/hardware"), SHIPPED)))
    for folder in folders:
        if (folder / f"{name}.yaml").is_file():
            return load_section(HardwareProfile, folder / f"{name}.yaml", None, "configs/hardware/h200.yaml")
    known = sorted({path.stem for folder in folders for path in folder.glob("*.yaml")})
    there = f"there are {', '.join(known)}" if known else f"{folders[0]} has none"  # installed without the repository
    raise UserError(f"no hardware profile is called '{name}': {there}, or name a YAML file")
