"""Transport: an expert that is the anchor stays it, one in another basis becomes it, and the maps are ridge maps."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from fusion.encoding import encode_batches, load_tokenizer
from fusion.layers import Batch
from fusion.reader import Reader
from fusion.sources import ModelSource
from fusion.transport import RidgeMap, transported
from tests.families import byte_tokenizer, write_model
from tests.fusion.test_anchor import divergence, rows


def batches(folder: Path, count: int = 24) -> list[Batch]:
    return encode_batches(load_tokenizer(folder), rows(count, 0), batch_tokens=300)


def written(folder: Path, anchor: Path, mlps: dict[str, torch.Tensor]) -> Path:
    """The anchor with other MLPs."""
    model = AutoModelForCausalLM.from_pretrained(anchor, dtype=torch.float32)
    unknown = model.load_state_dict(mlps, strict=False).unexpected_keys
    assert not unknown
    model.save_pretrained(folder)
    return folder


def logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        found: torch.Tensor = model(ids).logits
    return found


def with_plain_norms(folder: Path, model_folder: Path) -> Path:
    """The model with norms of weight one, which no rotation changes."""
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    ones = {name: torch.ones_like(tensor) for name, tensor in model.state_dict().items() if "norm" in name}
    model.load_state_dict(ones, strict=False)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def rotated(folder: Path, anchor: Path, seed: int) -> Path:
    """The same function in another basis of the hidden states; the norms' weights have to be one."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(anchor, dtype=torch.float32)
    rotation = torch.linalg.qr(torch.randn(64, 64, dtype=torch.float64))[0].float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(
                part in name for part in ("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj", "up_proj")
            ):
                parameter.copy_(parameter @ rotation.T)
            elif "o_proj" in name or "down_proj" in name:
                parameter.copy_(rotation @ parameter)
            elif "embed_tokens" in name or "lm_head" in name:
                parameter.copy_(parameter @ rotation.T)
    model.save_pretrained(folder)
    return folder


def test_the_anchor_itself_stays_as_it_is(anchor: Path) -> None:
    source = Reader(ModelSource("anchor", anchor))
    found = dict(transported(source, source, batches(anchor), range(3)))
    assert set(found) == {name for name in source.names() if ".mlp." in name}
    for name, tensor in found.items():
        assert torch.allclose(tensor, source.tensor(name), atol=1e-4), name


@pytest.mark.parametrize("tied", [True, False])
def test_an_expert_in_another_basis_becomes_the_same_function(
    tmp_path: Path, tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fusion.transport.RIDGE", 1e-7)
    monkeypatch.setattr("fusion.transport.BASIS_RIDGE", 1e-9)
    anchor = with_plain_norms(tmp_path / "anchor", write_model(tmp_path / "made", tie_word_embeddings=tied))
    expert = rotated(tmp_path / "expert", anchor, 1)
    token_ids = batches(anchor, 4)[0].ids
    expected = logits(anchor, token_ids)
    assert torch.allclose(logits(expert, token_ids), expected, atol=1e-3)  # the rotation is one
    ours, theirs = Reader(ModelSource("anchor", anchor)), Reader(ModelSource("expert", expert))
    grafted = {name: theirs.tensor(name) for name in theirs.names() if ".mlp." in name}
    apart = (logits(written(tmp_path / "grafted", anchor, grafted), token_ids) - expected).abs().mean()
    found = dict(transported(ours, theirs, batches(anchor), range(3)))
    near = (logits(written(tmp_path / "transported", anchor, found), token_ids) - expected).abs().mean()
    assert near < 0.02 * apart


def test_a_drifted_expert_comes_nearer_to_itself(
    tmp_path: Path, anchor: Path, drifted_experts: dict[str, Path]
) -> None:
    ours, theirs = (Reader(ModelSource("model", folder)) for folder in (anchor, drifted_experts["math"]))
    own = {name: theirs.tensor(name) for name in theirs.names() if ".mlp." in name}
    as_it_is = written(tmp_path / "grafted", anchor, own)
    moved = written(tmp_path / "moved", anchor, dict(transported(ours, theirs, batches(anchor, 60), range(3))))
    unseen = rows(10, 100)
    expert = drifted_experts["math"]
    assert divergence(moved, expert, unseen) < 0.7 * divergence(as_it_is, expert, unseen)


def test_layers_that_stay_dense_are_left_out(anchor: Path, drifted_experts: dict[str, Path]) -> None:
    ours, theirs = (Reader(ModelSource("model", folder)) for folder in (anchor, drifted_experts["math"]))
    found = dict(transported(ours, theirs, batches(anchor), [0, 2]))
    assert set(found) == {name for name in ours.names() if ".mlp." in name and ".layers.1." not in name}


@pytest.mark.parametrize("tokens", [10, 200])
def test_the_maps_are_ridge_maps(tokens: int) -> None:
    torch.manual_seed(0)
    x, y, prior = torch.randn(tokens, 8), torch.randn(tokens, 5), torch.randn(5, 8, dtype=torch.float64)
    found = RidgeMap()
    for half in (slice(0, 4), slice(4, None)):
        found.add(x[half], y[half])
    pull = 0.1 * float((x**2).sum() / 8)
    stacked = torch.cat([x.double(), pull**0.5 * torch.eye(8, dtype=torch.float64)])  # the pull as rows of its own
    wanted = torch.cat([y.double(), pull**0.5 * prior.T])
    assert torch.allclose(found.solve(prior, 0.1).T, torch.linalg.lstsq(stacked, wanted).solution, atol=1e-6)
    assert torch.allclose(found.solve(prior, 1e12), prior, atol=1e-6)
