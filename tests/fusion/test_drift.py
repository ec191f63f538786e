"""How far an expert has moved: exact where nothing did, the textbook's figures elsewhere, adapters included."""

from pathlib import Path

import pytest
import torch

from fusion.checkpoint import Checkpoint
from fusion.drift import GROUPS, Moved, as_plain, group_of, moved_by_group, sentence
from fusion.errors import UserError
from fusion.sources import ModelSource
from tests.families import write_model
from tests.fusion.plan.planning import change_tensors
from tests.fusion.test_adapter import write_adapter

SHARED = ("attention", "norms", "embeddings")


def test_a_copy_has_not_moved_and_the_anchor_is_not_read(tmp_path: Path, anchor: Path) -> None:
    copy = write_model(tmp_path / "copy", seed=1)  # as conftest makes the anchor
    still = {group: Moved(0.0, 1.0) for group in (*SHARED, "mlp")}
    assert moved_by_group(ModelSource("anchor", anchor), ModelSource("copy", copy)) == still
    assert moved_by_group(ModelSource("anchor", anchor), ModelSource("expert", anchor)) == still


def test_an_anchored_expert_has_moved_in_its_mlps_alone(anchor: Path, anchored_experts: dict[str, Path]) -> None:
    moved = moved_by_group(ModelSource("anchor", anchor), ModelSource("math", anchored_experts["math"]))
    assert all(moved[group] == Moved(0.0, 1.0) for group in SHARED)
    assert moved["mlp"].distance == pytest.approx(2**0.5, rel=0.05)  # other random MLPs of the same size
    assert abs(moved["mlp"].cosine) < 0.05
    assert sentence(moved).startswith("attention 0.000, norms 0.000, embeddings 0.000, mlp 1.4")


@pytest.mark.parametrize("pieces", [100, 2**24])
def test_a_drifted_expert_has_moved_by_the_norm_of_its_groups(
    anchor: Path, drifted_experts: dict[str, Path], pieces: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fusion.drift.PIECE", pieces)
    moved = moved_by_group(ModelSource("anchor", anchor), ModelSource("math", drifted_experts["math"]))
    assert list(moved) == [group for group in GROUPS if group != "head"]  # tied
    for group, found in moved.items():
        files = Checkpoint(anchor), Checkpoint(drifted_experts["math"])
        names = [name for name in files[0].weight_map if group_of(name) == group]
        old, new = (torch.cat([file.tensor(name).flatten() for name in names]).double() for file in files)
        assert found.distance == pytest.approx(float((new - old).norm() / old.norm()), rel=1e-5)
        assert found.cosine == pytest.approx(float(torch.cosine_similarity(old, new, dim=0)), rel=1e-5)
    assert as_plain(moved)["norms"]["distance"] > 0


def test_a_head_of_its_own_is_a_group(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "untied", tie_word_embeddings=False)
    other = write_model(tmp_path / "other", seed=2, tie_word_embeddings=False)
    moved = moved_by_group(ModelSource("anchor", folder), ModelSource("expert", other))
    assert list(moved) == list(GROUPS) and moved["head"].distance > 1


def test_an_adapter_moves_what_it_targets(tmp_path: Path, anchor: Path) -> None:
    write_adapter(tmp_path / "adapter", anchor, target_modules=["q_proj"])
    moved = moved_by_group(ModelSource("anchor", anchor), ModelSource("expert", anchor, tmp_path / "adapter"))
    assert moved["attention"].distance > 0
    assert all(moved[group].distance == 0 for group in ("norms", "embeddings", "mlp"))


def test_a_longer_vocabulary_is_compared_where_both_have_rows(tmp_path: Path, anchor: Path) -> None:
    wide = write_model(tmp_path / "wide", seed=1, vocab_size=300)
    moved = moved_by_group(ModelSource("anchor", anchor), ModelSource("wide", wide))
    ours, theirs = (Checkpoint(folder).tensor("model.embed_tokens.weight")[:259] for folder in (anchor, wide))
    assert moved["embeddings"].distance == pytest.approx(float((theirs - ours).norm() / ours.norm()), rel=1e-5)


def test_values_that_are_not_finite_are_refused(tmp_path: Path, anchor: Path, other: Path) -> None:
    change_tensors(other, lambda name, tensor: tensor / 0 if name == "model.norm.weight" else tensor)
    for pair in ((anchor, other), (other, anchor)):
        with pytest.raises(UserError, match=rf"model.norm.weight has 64 values that are not finite in {other}"):
            moved_by_group(*(ModelSource(str(number), folder) for number, folder in enumerate(pair)))


def test_numbers_whose_squares_overflow_are_compared_all_the_same(tmp_path: Path, anchor: Path, other: Path) -> None:
    change_tensors(other, lambda name, tensor: tensor * 1e25)
    moved = moved_by_group(ModelSource("anchor", anchor), ModelSource("other", other))
    assert moved["mlp"].distance == pytest.approx(1e25, rel=1e-5) and moved["mlp"].cosine == pytest.approx(1)


def test_another_shape_is_refused(tmp_path: Path, anchor: Path) -> None:
    wide = write_model(tmp_path / "wide", intermediate_size=128)
    with pytest.raises(UserError, match=r"mlp\.\w+\.weight is .*128.*name a model of the anchor's shape"):
        moved_by_group(ModelSource("anchor", anchor), ModelSource("wide", wide))
