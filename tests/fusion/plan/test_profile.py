"""Hardware profiles: those that are shipped, one of one's own, and what is said of one that is not there."""

from pathlib import Path

import pytest

from fusion.errors import UserError
from fusion.plan.profile import load_profile
from tests.fusion.plan.planned import CONFIGS


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONFIGS / "hardware").glob("*.yaml")))
def test_every_shipped_profile_loads(name: str) -> None:
    profile = load_profile(name, CONFIGS)
    assert profile.memory == int(profile.memory_gib * 2**30)
    assert (profile.cards == 0) == (name == "cpu")


def test_a_profile_is_found_by_its_path(tmp_path: Path) -> None:
    text = (CONFIGS / "hardware" / "h200.yaml").read_text(encoding="utf-8")
    (tmp_path / "mine.yaml").write_text(text.replace("disk_read_gb_s: 5.0", "disk_read_gb_s: 1.5"), encoding="utf-8")
    assert load_profile(str(tmp_path / "mine.yaml"), CONFIGS).disk_read_gb_s == 1.5


def test_an_unknown_name_is_one_sentence_with_those_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="no hardware profile is called 'a100': there are 24gb, 4x4090d, cpu, h200"):
        load_profile("a100", CONFIGS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fusion.plan.profile.SHIPPED", tmp_path / "not installed")
    with pytest.raises(UserError, match="hardware has none"):
        load_profile("a100", tmp_path)


def test_shipped_profiles_are_found_from_anywhere_after_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_profile("cpu", tmp_path).name == "desktop CPU"
    text = (CONFIGS / "hardware" / "cpu.yaml").read_text(encoding="utf-8")
    for folder, name in ((Path("configs/hardware"), "below"), (Path("mine/hardware"), "beside")):
        folder.mkdir(parents=True)
        (folder / "cpu.yaml").write_text(text.replace("desktop CPU", name), encoding="utf-8")
        assert load_profile("cpu", tmp_path / "mine").name == name


def test_a_broken_profile_names_its_line(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("name: mine\ncards: -1\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"mine\.yaml, line 2: cards: "):
        load_profile(str(tmp_path / "mine.yaml"), CONFIGS)


def test_large_cards_take_larger_steps() -> None:
    h200 = load_profile("h200", CONFIGS)
    assert h200.batch(1, 32768) == (8192, 1024)
    assert load_profile("24gb", CONFIGS).batch(1, 32768) == (2048, 256)
    assert h200.model_copy(update={"memory_gib": 180.0}).batch(1, 32768) == (16384, 1024)
    assert h200.model_copy(update={"name": "A100 80 GB"}).batch(1, 32768) == (2048, 256)


@pytest.mark.parametrize(
    ("ways", "length", "batch"),
    [
        (1, 256, (2048, 128)),
        (2, 256, (4096, 256)),
        (1, 3000, (3000, 128)),  # a prompt is not cut
        (2, 3000, (4096, 256)),
        (1, 8, (1024, 128)),  # no more than its sequences hold
    ],
)
def test_on_a_cpu_the_step_grows_with_the_ways_and_takes_a_whole_prompt(
    ways: int, length: int, batch: tuple[int, int]
) -> None:
    assert load_profile("cpu", CONFIGS).batch(ways, length) == batch
