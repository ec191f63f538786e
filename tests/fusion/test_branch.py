"""The branch trainer on a model of a few thousand parameters: what it changes, what it leaves alone, how it goes on."""

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2ForCausalLM

from fusion import branch, training
from fusion.branch import train_expert
from fusion.data import ChatExample, chat
from fusion.drift import as_plain
from fusion.encoding import encode
from fusion.errors import UserError
from fusion.evaluation.generate import answer_losses
from fusion.packing import IGNORED, pack, training_row
from fusion.sections.data import DataSource
from fusion.sections.training import BranchSettings
from fusion.training import fitting
from tests.families import byte_tokenizer, config, write_model

SHARED = ("attention", "norms", "embeddings")
STILL = dict.fromkeys(SHARED, 0.0)
WORDS = ["sun", "moon", "tree", "lake", "wind", "rain", "fire", "bird"]


def rows(count: int, seed: int) -> list[ChatExample]:
    rng = random.Random(seed)
    return [chat(f"say {' '.join(rng.sample(WORDS, rng.randint(1, 3)))}", "moon tree", "copy") for _ in range(count)]


def settings(**changes) -> BranchSettings:
    base = {
        "data": DataSource(generated="demo.math"),
        "steps": 40,
        "batch_rows": 8,
        "max_length": 128,
        "warmup_steps": 2,
    }
    base |= {"learning_rate": 1e-2, "evaluate_every": 20, "held_out_rows": 8, "score_rows": 4, "max_new_tokens": 12}
    return BranchSettings(**(base | changes))


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def anchor(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("anchor") / "model"
    torch.manual_seed(0)
    Qwen2ForCausalLM(config(initializer_range=0.2)).to(request.param).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def changed(anchor: Path, expert: Path) -> set[str]:
    old, new = load_file(anchor / "model.safetensors"), load_file(expert / "model.safetensors")
    assert old.keys() == new.keys()
    assert {n: t.dtype for n, t in old.items()} == {n: t.dtype for n, t in new.items()}
    return {name for name in old if not torch.equal(old[name], new[name])}


def test_anchored_expert_differs_in_its_mlps_alone_and_learns(anchor: Path, tmp_path: Path):
    result = train_expert(anchor, tmp_path / "expert", rows(64, 0), rows(8, 1), settings())
    assert changed(anchor, tmp_path / "expert") == {
        f"model.layers.{layer}.mlp.{part}.weight" for layer in range(3) for part in branch.MLP_PARTS
    }
    assert (result.score_before, result.score_after) == (0.0, 1.0)
    assert result.score_gain_interval == (1.0, 1.0)
    assert result.loss_after < 1.0 < result.loss_before
    record = json.loads((tmp_path / "expert" / "branch.json").read_text())
    assert record["best_step"] == result.best_step and record["settings"]["steps"] == 40
    assert not list(tmp_path.glob(".*"))

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "expert", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "expert")
    pairs = answer_losses(model, tokenizer, rows(8, 1))
    assert sum(a for a, _ in pairs) / sum(b for _, b in pairs) == pytest.approx(result.loss_after, abs=1e-5)


def test_layers_restrict_what_is_trained(anchor: Path, tmp_path: Path):
    train_expert(anchor, tmp_path / "e", rows(16, 0), rows(4, 1), settings(steps=4, allow_no_gain=True), layers=(2,))
    assert changed(anchor, tmp_path / "e") == {f"model.layers.2.mlp.{part}.weight" for part in branch.MLP_PARTS}
    with pytest.raises(UserError, match="moe_layers"):
        train_expert(anchor, tmp_path / "f", rows(16, 0), rows(4, 1), settings(), layers=(3,))


def test_backward_stops_below_the_lowest_trained_layer(anchor: Path):
    model = branch.trainable_model(anchor, settings(), layers=(2,))
    states: list[bool] = []
    for layer in model.model.layers:
        layer.register_forward_hook(
            lambda _m, _i, out: states.append((out[0] if isinstance(out, tuple) else out).requires_grad)
        )
    model(input_ids=torch.tensor([[1, 2, 3]]))
    assert states == [False, False, True]


def test_how_far_it_moved_is_noted(anchor: Path, tmp_path: Path):
    result = train_expert(anchor, tmp_path / "e", rows(16, 0), rows(4, 1), settings(steps=4, allow_no_gain=True))
    noted = json.loads((tmp_path / "e" / "branch.json").read_text())["moved"]
    assert noted == as_plain(result.moved)
    assert noted["mlp"]["distance"] > 0 and {group: noted[group]["distance"] for group in SHARED} == STILL
    adapter = settings(steps=4, lora_rank=2, allow_no_gain=True)
    moved = train_expert(anchor, tmp_path / "a", rows(16, 0), rows(4, 1), adapter).moved
    assert moved["mlp"].distance > 0 and {group: moved[group].distance for group in SHARED} == STILL


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_and_head_move_and_nothing_else_beside_the_mlps(tmp_path: Path, tied: bool):
    start = write_model(tmp_path / "start", tie_word_embeddings=tied)
    chosen = settings(trainable="mlp+embeddings", steps=4, allow_no_gain=True)
    train_expert(start, tmp_path / "e", rows(16, 0), rows(4, 1), chosen, layers=(2,))
    mlps = {f"model.layers.2.mlp.{part}.weight" for part in branch.MLP_PARTS}  # embeddings lie in no layer
    ends = {"model.embed_tokens.weight"} | (set() if tied else {"lm_head.weight"})
    assert changed(start, tmp_path / "e") == mlps | ends


@pytest.mark.parametrize(
    "changes", [{"trainable": "mlp+embeddings"}, {"trainable": "all"}, {"trainable": "all", "lora_rank": 2}]
)
def test_an_endless_pull_keeps_shared_parts_at_the_anchor(tmp_path: Path, changes: dict):
    start = write_model(tmp_path / "start")
    moved = {}
    for penalty in (0.0, 300.0, 1e12):
        chosen = settings(steps=10, anchor_penalty=penalty, allow_no_gain=True, **changes)
        result = train_expert(start, tmp_path / f"{penalty}", rows(32, 0), rows(4, 1), chosen)
        moved[penalty] = sum(found.distance for group, found in result.moved.items() if group != "mlp")
        assert result.moved["mlp"].distance > 0.01
    assert moved[1e12] < 1e-6 < moved[300.0] < 0.3 * moved[0.0]


def test_no_weight_gets_further_than_the_pull_lets_it(tmp_path: Path):
    start = write_model(tmp_path / "start")
    chosen = settings(trainable="all", anchor_penalty=500.0, allow_no_gain=True)
    train_expert(start, tmp_path / "e", rows(32, 0), rows(4, 1), chosen)
    old, new = load_file(start / "model.safetensors"), load_file(tmp_path / "e" / "model.safetensors")
    furthest = max(float((new[name] - old[name]).abs().max()) for name in old if ".mlp." not in name)
    assert 0 < furthest < 1.5 / 500


def test_a_pulled_branch_goes_on_towards_the_anchor_it_began_at(tmp_path: Path, monkeypatch):
    anchor = write_model(tmp_path / "start")
    chosen = settings(trainable="all", anchor_penalty=100.0, allow_no_gain=True)
    whole = train_expert(anchor, tmp_path / "whole", rows(64, 0), rows(8, 1), chosen)
    interrupted(anchor, tmp_path / "cut", chosen, monkeypatch)
    assert train_expert(anchor, tmp_path / "cut", rows(64, 0), rows(8, 1), chosen).curve == whole.curve
    assert changed(tmp_path / "whole", tmp_path / "cut") == set()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"anchor_penalty": 1.0}, "trains nothing there"),
        ({"trainable": "mlp+embeddings", "lora_rank": 4}, "linear maps alone"),
    ],
)
def test_settings_that_do_nothing_are_refused(changes: dict, says: str):
    with pytest.raises(ValueError, match=says):
        settings(**changes)


def test_drifted_expert_changes_shared_parts_and_keeps_the_tie(anchor: Path, tmp_path: Path):
    train_expert(anchor, tmp_path / "e", rows(32, 0), rows(4, 1), settings(trainable="all", allow_no_gain=True))
    moved = changed(anchor, tmp_path / "e")
    assert {"model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"} <= moved
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "e")
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_lora_branch_is_an_adapter_of_the_anchor(anchor: Path, tmp_path: Path):
    from peft import PeftModel

    chosen = settings(lora_rank=4, learning_rate=3e-2, allow_no_gain=True)
    result = train_expert(anchor, tmp_path / "e", rows(64, 0), rows(8, 1), chosen)
    config = json.loads((tmp_path / "e" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(anchor)
    assert set(config["target_modules"]) == set(branch.MLP_PARTS)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(anchor, dtype=torch.float32), tmp_path / "e")
    pairs = answer_losses(model, AutoTokenizer.from_pretrained(anchor), rows(8, 1))
    assert sum(a for a, _ in pairs) / sum(b for _, b in pairs) == pytest.approx(result.loss_after, abs=1e-4)
    assert result.loss_after < result.loss_before


def test_no_gain_is_an_error_unless_allowed(anchor: Path, tmp_path: Path):
    few = settings(steps=1, learning_rate=1e-9)
    with pytest.raises(UserError, match="no better than its start"):
        train_expert(anchor, tmp_path / "e", rows(8, 0), rows(4, 1), few)
    assert not (tmp_path / "e").exists()
    again = few.model_copy(update={"allow_no_gain": True})
    assert train_expert(anchor, tmp_path / "e", rows(8, 0), rows(4, 1), again).score_after == 0.0


def interrupted(anchor: Path, out: Path, chosen: BranchSettings, monkeypatch) -> None:
    """A branch that dies in its second evaluation, at step 40 after that of step 20."""
    measured = training.mean_loss
    calls = 0

    def dies(*args):
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return measured(*args)

    monkeypatch.setattr(training, "mean_loss", dies)
    with pytest.raises(KeyboardInterrupt):
        train_expert(anchor, out, rows(64, 0), rows(8, 1), chosen)
    assert not out.exists()
    monkeypatch.setattr(training, "mean_loss", measured)


def test_interrupted_branch_goes_on_and_ends_the_same(anchor: Path, tmp_path: Path, monkeypatch):
    whole = train_expert(anchor, tmp_path / "whole", rows(64, 0), rows(8, 1), settings(allow_no_gain=True))
    interrupted(anchor, tmp_path / "cut", settings(allow_no_gain=True), monkeypatch)
    resumed = train_expert(anchor, tmp_path / "cut", rows(64, 0), rows(8, 1), settings(allow_no_gain=True))
    assert resumed.curve == whole.curve and resumed.tokens == whole.tokens
    assert changed(tmp_path / "whole", tmp_path / "cut") == set()


def test_general_rows_are_mixed_in_by_share(anchor: Path, tmp_path: Path):
    other = [chat("say", "lake", "general")] * 50
    mixed = branch._mixed(rows(30, 0), other, settings(general_share=0.25))
    assert len(mixed) == 40
    with pytest.raises(UserError, match="general_share"):
        branch._mixed(rows(30, 0), [], settings(general_share=0.25))


def test_packed_rows_do_not_see_each_other(anchor: Path):
    model = AutoModelForCausalLM.from_pretrained(anchor, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(anchor)
    encoded = [training_row(tokenizer, row) for row in rows(6, 3)]
    packed = pack(encoded, max_length=128, pad=0)
    assert packed["input_ids"].shape[0] < len(encoded)
    out = model(input_ids=packed["input_ids"], position_ids=packed["position_ids"], use_cache=False).logits
    starts = (packed["position_ids"] == 0) & (packed["position_ids"].roll(-1, dims=1) == 1)
    found = [(s, i, packed["input_ids"][s, i:].tolist()) for s, i in starts.nonzero().tolist()]
    assert len(found) == len(encoded)
    for row in encoded:
        ids = row["input_ids"]
        s, i = next((s, i) for s, i, tail in found if tail[: len(ids)] == ids)
        alone = model(input_ids=torch.tensor([ids])).logits[0]
        assert torch.allclose(out[s, i : i + len(ids)], alone, atol=1e-4)


def test_loss_counts_answers_and_their_end_alone(anchor: Path):
    tokenizer = AutoTokenizer.from_pretrained(anchor)
    row = rows(1, 0)[0]
    encoded = encode(tokenizer, row)
    ids, start = encoded.ids, encoded.answer_start
    labels = training_row(tokenizer, row)["labels"]
    assert labels == [IGNORED] * start + ids[start:]
    assert tokenizer.decode(ids[start:]) == row.answer + tokenizer.eos_token
    assert len(fitting(tokenizer, [row, row], 64, "branch")) == 2
    with pytest.raises(UserError, match="max_length"):
        fitting(tokenizer, [row], 4, "branch")
