"""Bounds from a profile's rates, computed by hand beside them."""

from pathlib import Path

import pytest

from fusion import reader, shards
from fusion.plan.budget import Weight, model_weights
from fusion.plan.estimates import PIECE, PIECES, estimate, merge_memory
from fusion.plan.models import describe_anchor
from fusion.sections.fusing import SharedParts
from fusion.sections.training import AnchoringSettings, HealSettings
from tests.fusion.plan.planned import FIVE, profile, shipped
from tests.recipes import make_recipe


def test_times_and_speeds_of_the_target() -> None:
    found = estimate(*shipped(), profile(disk_read_gb_s=3.0, disk_write_gb_s=2.0, link_gb_s=25.0))
    written = 60.858e9
    assert found.merge_writes == pytest.approx(written, rel=1e-4)
    shared = 822_212_608 + 2 * 544_997_376 + 204_288  # attention; embeddings and head; norms
    assert found.merge_reads - found.merge_writes == 2 * 2 * shared  # of the two that are anchored
    assert found.merge_s == pytest.approx(found.merge_reads / 3e9 + written / 2e9, rel=1e-4)
    assert found.load_s == pytest.approx(written / 3e9, rel=1e-4)  # the disk, not the link
    speeds = {row.weight_format: row for row in found.speeds}
    passed = 30.429e9 - 4 / 5 * 28.516e9 - 0.545e9  # without the idle experts and the table of embeddings
    assert speeds["bfloat16"].decode == pytest.approx(4 * 1008e9 / (2 * passed), rel=1e-3)
    assert speeds["bfloat16"].prefill == pytest.approx(4 * 147e12 / (2 * passed), rel=1e-3)
    assert speeds["fp8"].prefill == pytest.approx(2 * speeds["bfloat16"].prefill)
    assert speeds["w4a16"].prefill == speeds["bfloat16"].prefill  # weights alone are small
    assert speeds["w4a16"].decode > speeds["fp8"].decode > speeds["bfloat16"].decode


def test_two_experts_a_token_are_slower() -> None:
    one, two = (estimate(*shipped(FIVE, f"routing.top_k={k}"), profile()).speeds[0].decode for k in (1, 2))
    assert two < one


def test_the_disk_holds_what_every_step_leaves(tmp_path: Path, anchor: Path) -> None:
    recipe = make_recipe(tmp_path, anchor, {"general": anchor, "math": anchor})
    config = describe_anchor(recipe).config
    found = estimate(recipe, config, profile("cpu"))
    assert [row.step for row in found.disk] == ["merge"]  # the models are here already
    assert found.disk_bytes == found.merge_writes
    settings = AnchoringSettings(method="text", data={"generated": "demo.math"})
    anchored = recipe.experts[1].model_copy(update={"anchor": settings})
    more = estimate(recipe.model_copy(update={"experts": (recipe.experts[0], anchored)}), config, profile("cpu"))
    one = sum(weight.count for weight in model_weights(config)) * 4
    assert more.disk_bytes == found.disk_bytes + 2 * one  # what stays, and the start meanwhile


def test_an_adapter_costs_the_merge_a_whole_tensor(tmp_path: Path, anchor: Path) -> None:
    recipe = make_recipe(tmp_path, anchor, {"general": anchor, "math": anchor})
    weights = model_weights(describe_anchor(recipe).config)
    adapted = recipe.experts[1].model_copy(update={"adapter": "somewhere/adapter"})
    with_adapter = recipe.model_copy(update={"experts": (recipe.experts[0], adapted)})
    assert merge_memory(with_adapter, weights, 2) - merge_memory(recipe, weights, 2) == 2 * 4 * 64 * 96


def test_comparing_experts_with_the_anchor_costs_the_merge_one_piece(tmp_path: Path, anchor: Path) -> None:
    assert (PIECE, PIECES) == (reader.PIECE, shards.IN_FLIGHT + 1)
    recipe = make_recipe(tmp_path, anchor, {"general": anchor, "math": anchor, "coding": anchor})
    settings = AnchoringSettings(method="text", data={"generated": "demo.math"})
    anchored = [expert.model_copy(update={"anchor": settings}) for expert in recipe.experts]
    recipes = [recipe.model_copy(update={"experts": (*anchored[:n], *recipe.experts[n:])}) for n in range(3)]
    none, one, two = (merge_memory(each, [Weight("w", (2**13, 2**11), "attention")], 2) for each in recipes)
    assert one - none == 16 * 2**20
    assert two == one
    none, one, _ = (merge_memory(each, [Weight("w", (8, 4), "attention")], 2) for each in recipes)
    assert one - none == 8 * 4 * 2  # a piece is no larger than the largest tensor


def test_healing_and_shared_parts_take_their_disk(tmp_path: Path, anchor: Path) -> None:
    recipe = make_recipe(tmp_path, anchor, {"general": anchor, "math": anchor})
    config = describe_anchor(recipe).config
    made = recipe.model_copy(update={"heal": HealSettings(), "shared": SharedParts(method="mean")})
    rows = {row.step: row.stays for row in estimate(made, config, profile("cpu")).disk}
    dense = model_weights(config)
    mlps = sum(weight.count for weight in dense if weight.group == "dense_mlps") * 4
    one = sum(weight.count for weight in dense) * 4
    layers, hidden = config["num_hidden_layers"], config["hidden_size"]
    gates = layers * (2 + 1) * hidden * 4  # of two experts, and the shared expert's, which is always there
    assert list(rows) == ["shared parts", "merge", "heal"]
    assert rows["shared parts"] == one
    assert rows["heal"] == one - mlps + gates
    assert rows["merge"] == one + mlps + gates
