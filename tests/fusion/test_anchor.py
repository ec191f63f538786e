"""Anchoring: the teacher's columns, the divergence, the start, and an expert that has the anchor's shared parts."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import kl_div
from transformers import AutoModelForCausalLM, AutoTokenizer

import fusion.anchor
from fusion import road
from fusion.anchor import SHARES, STARTS, AnchorResult, anchor_expert
from fusion.architecture import is_mlp
from fusion.branch import TrainResult, train_expert
from fusion.checkpoint import Checkpoint, read_json, write_json
from fusion.data import ChatExample, chat, load_examples
from fusion.encoding import encode_batches
from fusion.errors import UserError
from fusion.evaluation.generate import answer_losses
from fusion.packing import answer_logits, answer_loss, pack, training_row
from fusion.reader import Reader
from fusion.sections.data import DataSource
from fusion.sections.evaluation import Evaluation
from fusion.sections.training import AnchoringSettings
from fusion.sources import ModelSource
from fusion.teacher import Teacher
from fusion.transport import transported
from gate_training.compare import OWN, references
from gate_training.examples import routing_data
from tests.families import write_model
from tests.recipes import make_recipe


@pytest.fixture
def drifted(tmp_path: Path, anchor: Path) -> Path:
    return write_model(tmp_path / "drifted", seed=5, anchor=anchor, drift=True)


def rows(count: int, start: int) -> list[ChatExample]:
    return [chat(f"{i}+{i}=", f"{i} twice is {2 * i}", "math") for i in range(start, start + count)]


def settings(**changes: Any) -> AnchoringSettings:
    fields = {
        "method": "logits",
        "data": DataSource(generated="demo.math"),
        "steps": 12,
        "batch_rows": 4,
        "max_length": 128,
        "learning_rate": 3e-3,
        "warmup_steps": 0,
        "evaluate_every": 6,
        "held_out_rows": 4,
        "score_rows": 2,
        "max_new_tokens": 4,
        "allow_no_gain": True,
    }
    return AnchoringSettings(**{**fields, **changes})


def divergence(student: Path, teacher: Path, examples: list[ChatExample]) -> float:
    """Mean KL in nats of an answer token, from transformers' own full distributions."""
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    total = count = 0.0
    models = [AutoModelForCausalLM.from_pretrained(p, dtype=torch.float32).eval() for p in (student, teacher)]
    with torch.no_grad():
        for example in examples:
            row = training_row(tokenizer, example)
            start = row["labels"].index(next(label for label in row["labels"] if label >= 0))
            ours, theirs = (m(torch.tensor([row["input_ids"]])).logits[0, start - 1 : -1] for m in models)
            total += float(kl_div(ours.log_softmax(1), theirs.log_softmax(1), log_target=True, reduction="sum"))
            count += len(ours)
    return total / count


def columns(teacher: Path, k: int, tmp_path: Path, count: int = 5) -> tuple[list[dict[str, Any]], Any]:
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    encoded = [training_row(tokenizer, row) for row in rows(count, 7)]
    Teacher(ModelSource("teacher", teacher), k, teacher).teach(encoded, tmp_path / "columns.safetensors", 2)
    return encoded, AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32).eval()


def test_columns_are_the_teachers_likeliest_tokens(tmp_path: Path, drifted: Path) -> None:
    encoded, model = columns(drifted, 7, tmp_path)
    for row in encoded:
        with torch.no_grad():
            logits, labels = answer_logits(model, pack([row], 128, 0))
        logs, ids = logits.log_softmax(1).topk(7, dim=1)
        assert len(labels) == len(row["teacher_ids"])
        assert torch.equal(row["teacher_ids"].long(), ids)
        assert torch.allclose(row["teacher_logs"].float(), logs, atol=1e-2)


def test_packing_keeps_columns_with_their_tokens(tmp_path: Path, drifted: Path) -> None:
    encoded, model = columns(drifted, 5, tmp_path)
    packed = pack(encoded, 100, 0)
    assert packed["input_ids"].shape[0] > 1
    with torch.no_grad():
        logits, _ = answer_logits(model, packed)
    assert torch.equal(logits.argmax(1), packed["teacher_ids"][:, 0].long())


@pytest.mark.parametrize("k", [4, 10_000])
def test_the_loss_is_the_divergence(tmp_path: Path, anchor: Path, drifted: Path, k: int) -> None:
    """Exact with the whole vocabulary; with a few tokens and the rest as one it is at most that."""
    encoded, _ = columns(drifted, k, tmp_path)
    student = AutoModelForCausalLM.from_pretrained(anchor, dtype=torch.float32).eval()
    with torch.no_grad():
        loss, count = answer_loss(student, pack(encoded, 128, 0))
    exact = divergence(anchor, drifted, rows(5, 7))
    found = float(loss) / count
    assert found == pytest.approx(exact, rel=2e-3) if k > 1000 else 0 < found < exact


def test_a_teacher_costs_itself_nothing(tmp_path: Path, drifted: Path) -> None:
    encoded, model = columns(drifted, 6, tmp_path)
    with torch.no_grad():
        loss, count = answer_loss(model, pack(encoded, 128, 0))
    assert abs(float(loss)) / count < 1e-3


def test_a_teacher_with_another_vocabulary_is_refused(tmp_path: Path, drifted: Path) -> None:
    larger = shutil.copytree(drifted, tmp_path / "larger")
    config = read_json(larger / "config.json")
    write_json(larger / "config.json", {**config, "vocab_size": 10_000})
    other = shutil.copytree(drifted, tmp_path / "other")
    tokenizer = read_json(other / "tokenizer.json")
    vocabulary = tokenizer["model"]["vocab"]
    first, second = list(vocabulary)[:2]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    write_json(other / "tokenizer.json", tokenizer)
    for student, said in ((larger, "vocabulary of"), (other, "another id than the anchor")):
        with pytest.raises(UserError, match=said):
            Teacher(ModelSource("teacher", drifted), 4, student).teach([], tmp_path / "columns.safetensors", 2)
    assert not list(tmp_path.glob("columns*"))


@pytest.mark.parametrize("lora_rank", [None, 4])
def test_an_anchored_expert_differs_from_the_anchor_in_its_mlps_alone(
    tmp_path: Path, anchor: Path, drifted: Path, lora_rank: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trained(*args: Any, **options: Any) -> TrainResult:  # the drifted model here is random: no reference is its own
        return train_expert(*args, **{**options, "keep_start": False})

    monkeypatch.setattr(fusion.anchor, "train_expert", trained)
    models = [ModelSource("anchor", anchor), ModelSource("expert", drifted), ModelSource("expert", drifted)]
    result = anchor_expert(
        *models,
        tmp_path / "out",
        rows(20, 0),
        rows(4, 50),
        settings(lora_rank=lora_rank, start="expert"),
        layers=[0, 2],
    )
    made, ours = Checkpoint(tmp_path / "out"), Checkpoint(anchor)
    changed = {name for name in ours.weight_map if not torch.equal(made.tensor(name), ours.tensor(name))}
    assert changed
    assert all(is_mlp(name) and ".layers.1." not in name for name in changed)
    assert result.start == "expert"
    grafted = write_grafted(tmp_path / "grafted", anchor, drifted)
    assert divergence(tmp_path / "out", drifted, rows(20, 0)) < divergence(grafted, drifted, rows(20, 0))
    noted = json.loads((tmp_path / "out" / "anchoring.json").read_text())
    assert set(noted["losses"]) == {"anchor", "expert", "anchored"}
    moved = {who: {g: row["distance"] for g, row in groups.items()} for who, groups in noted["moved"].items()}
    assert moved["anchored"]["attention"] == moved["anchored"]["embeddings"] == 0 < moved["expert"]["attention"]
    assert moved["anchored"]["mlp"] > 0
    assert not (tmp_path / ".out.anchor").exists()


@pytest.mark.parametrize(
    "teacher", [{"hidden_size": 96, "num_attention_heads": 3, "num_key_value_heads": 1}, {"rope_theta": 1e4}]
)
def test_a_teacher_of_another_size_or_rope_is_what_the_expert_is_measured_against(
    tmp_path: Path, anchor: Path, teacher: dict[str, Any]
) -> None:
    theta = teacher.pop("rope_theta", 1e6)
    rope = {"rope_type": "default", "rope_theta": theta}
    folder = write_model(tmp_path / "teacher", seed=9, rope_parameters=rope, num_hidden_layers=2, **teacher)
    gates = {"rows": 4, "held_out_rows": 6}
    recipe = make_recipe(tmp_path, anchor, {"general": anchor, "math": anchor}, gate_training=gates)
    source = rows_file(tmp_path, 20, 0)
    held_out = rows_file(tmp_path, 6, 50)
    section = settings(data=source, held_out=held_out, teacher=str(folder), steps=40, evaluate_every=20)
    expert = recipe.experts[1].model_copy(update={"anchor": section})
    evaluation = Evaluation(rows=6, max_new_tokens=2, batch_rows=8, hidden_prompts=2)
    domain = recipe.domains["math"].model_copy(update={"train": source, "held_out": held_out})
    general = recipe.domains["general"].model_copy(update={"held_out": rows_file(tmp_path, 4, 80)})
    recipe = recipe.model_copy(
        update={
            "experts": (recipe.experts[0], expert),
            "evaluation": evaluation,
            "domains": {"general": general, "math": domain},
        }
    )
    road.anchor(recipe)
    noted = read_json(recipe.folder / "anchored" / "math" / "anchoring.json")
    assert set(noted["losses"]) == {"anchor", "expert", "teacher", "anchored"}
    assert noted["losses"]["expert"] == pytest.approx(noted["losses"]["anchor"])  # it starts as the anchor
    made = recipe.folder / "anchored" / "math"
    assert divergence(made, folder, rows(20, 0)) < 0.7 * divergence(anchor, folder, rows(20, 0))
    road.merge(recipe)
    road.train_gates(recipe)
    result = road.evaluate(recipe)
    data = routing_data(recipe, recipe.fused)
    own = references(recipe, recipe.fused, data)[OWN]["math"]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    nats = answer_losses(model, tokenizer, load_examples(held_out, "math"))
    wanted = sum(loss for loss, _ in nats) / sum(count for _, count in nats)
    assert own == pytest.approx(wanted, rel=1e-4) != pytest.approx(noted["losses"]["anchor"], rel=1e-3)
    assert result["domains"]["math"]["own_expert"]["loss"] == pytest.approx(wanted, rel=1e-4)
    assert "| teacher |" in (recipe.folder / "evaluation.md").read_text()


def rows_file(folder: Path, count: int, start: int) -> DataSource:
    path = folder / f"rows-{start}.jsonl"
    chats = [{"messages": list(row.messages)} for row in rows(count, start)]
    path.write_text("\n".join(map(json.dumps, chats)), encoding="utf-8")
    return DataSource(path=str(path))


def write_grafted(folder: Path, anchor: Path, drifted: Path) -> Path:
    """The drifted expert's MLPs of layers 0 and 2 on the anchor's other parts."""
    model = AutoModelForCausalLM.from_pretrained(anchor, dtype=torch.float32)
    theirs = Checkpoint(drifted)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_mlp(name) and ".layers.1." not in name:
                parameter.copy_(theirs.tensor(name))
    model.save_pretrained(folder)
    return folder


def test_the_best_start_is_taken(tmp_path: Path, anchor: Path, drifted: Path) -> None:
    models = [ModelSource("anchor", anchor), ModelSource("expert", drifted), ModelSource("expert", drifted)]
    result = anchor_expert(*models, tmp_path / "out", rows(8, 0), rows(4, 50), settings(steps=1))
    assert set(result.starts) == set(STARTS)
    assert result.starts[result.start] == min(result.starts[name] for name in SHARES)
    assert result.starts["anchor"] == pytest.approx(result.losses["anchor"], rel=1e-3)
    assert set(read_json(tmp_path / "out" / "anchoring.json")["starts_retained"]) == set(STARTS)


def test_a_start_that_training_does_not_better_is_the_result(tmp_path: Path, anchor: Path, drifted: Path) -> None:
    models = [ModelSource("anchor", anchor), ModelSource("expert", drifted), ModelSource("expert", drifted)]
    wild = settings(steps=4, evaluate_every=2, learning_rate=3.0)
    result = anchor_expert(*models, tmp_path / "out", rows(8, 0), rows(4, 50), wild)
    assert result.best_step == 0
    assert result.losses["anchored"] == pytest.approx(result.starts[result.start], rel=1e-3)


def test_a_transported_start_is_written_in_the_layers_that_may_change(
    tmp_path: Path, anchor: Path, drifted: Path
) -> None:
    models = [ModelSource("anchor", anchor), ModelSource("expert", drifted), ModelSource("expert", drifted)]
    chosen = settings(steps=1, start="transported", learning_rate=1e-12)  # what is written is the start itself
    result = anchor_expert(*models, tmp_path / "out", rows(40, 0), rows(4, 60), chosen, layers=[0, 2])
    assert set(result.starts) == {"transported"}
    readers = [Reader(source) for source in models[:2]]
    batches = encode_batches(AutoTokenizer.from_pretrained(anchor), rows(40, 0), max_length=chosen.max_length)
    expected = dict(transported(*readers, batches, [0, 2]))
    made = Checkpoint(tmp_path / "out")
    for name in made.weight_map:
        wanted = expected.get(name, readers[0].tensor(name) if name in readers[0].names() else None)
        assert wanted is None or torch.allclose(made.tensor(name), wanted, atol=1e-6), name


def test_shares_of_the_gain_count_from_the_anchor() -> None:
    losses = {"anchor": 3.0, "expert": 1.0, "anchored": 1.5}
    starts = {"expert": 3.0, "transported": 2.0}
    result = AnchorResult(losses, {}, "", "transported", starts, 0, 0, 0.0, {})
    assert result.retained_share == 0.75
    assert result.starts_retained == {"expert": 0.0, "transported": 0.5}
    assert AnchorResult(losses | {"expert": 3.0}, {}, "", "expert", starts, 0, 0, 0.0, {}).retained_share is None


def test_an_expert_no_better_than_the_anchor_is_refused_and_nothing_is_left(
    tmp_path: Path, anchor: Path, drifted: Path
) -> None:
    models = [ModelSource("anchor", anchor), ModelSource("expert", drifted), ModelSource("expert", drifted)]
    with pytest.raises(UserError, match=r"no better than the anchor's .* set anchor.allow_no_gain"):
        anchor_expert(*models, tmp_path / "out", rows(8, 0), rows(4, 50), settings(steps=1, allow_no_gain=False))
    assert not (tmp_path / "out").exists()


def test_the_road_merges_the_anchored_expert_and_judges_it_by_the_drifted_one(
    tmp_path: Path, anchor: Path, drifted: Path
) -> None:
    recipe = make_recipe(tmp_path, anchor, {"general": anchor, "math": drifted})
    section = settings(data=recipe.domains["math"].train, held_out=recipe.domains["general"].train)
    expert = recipe.experts[1].model_copy(update={"anchor": section})
    recipe = recipe.model_copy(update={"experts": (recipe.experts[0], expert)})
    with pytest.raises(UserError, match="run `qwen-fusion anchor`"):
        road.merge(recipe)
    road.anchor(recipe)
    road.merge(recipe)
    manifest = read_json(recipe.fused / "fusion.json")
    assert [row["anchored"] for row in manifest["experts"]] == [True, True]
    first = load_file(recipe.fused / "expert-math.safetensors")
    made = Checkpoint(recipe.folder / "anchored" / "math")
    assert torch.equal(
        first["model.layers.0.mlp.experts.1.up_proj.weight"], made.tensor("model.layers.0.mlp.up_proj.weight")
    )
    stamp = (recipe.folder / "anchored" / "math" / "model.safetensors").stat().st_mtime_ns
    road.anchor(recipe)
    assert (recipe.folder / "anchored" / "math" / "model.safetensors").stat().st_mtime_ns == stamp
