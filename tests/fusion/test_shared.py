"""Shared parts: each method against its definition, the model they make, and what `auto` takes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from fusion import road
from fusion.architecture import is_mlp, part_of
from fusion.checkpoint import Checkpoint, read_json
from fusion.encoding import encode, encode_batches, load_tokenizer
from fusion.errors import UserError
from fusion.evaluation.answer_loss import answer_losses
from fusion.grafted import Grafted
from fusion.layers import LayerStream, forced
from fusion.reader import Reader
from fusion.recipe import Recipe
from fusion.recipe_file import load_recipe
from fusion.shared import SHRINK, TOLERANCE, _Experts, _parts, make_shared_parts, regmean
from fusion.sources import anchor_source, base_source, expert_sources, shared_parts
from tests.families import write_model
from tests.recipes import make_recipe, recipe_data

METHODS = ("mean", "multislerp", "karcher", "regmean")


def parts_by(recipe: Recipe, method: Any) -> dict[str, torch.Tensor]:
    return dict(_parts(_Experts(recipe), method))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("tied", [True, False])
def test_identical_experts_agree_on_what_they_have(tmp_path: Path, method: str, tied: bool) -> None:
    anchor = write_model(tmp_path / "anchor", seed=1, tie_word_embeddings=tied)
    expert = write_model(tmp_path / "expert", seed=2, tie_word_embeddings=tied)
    recipe = make_recipe(tmp_path, anchor, {"general": expert, "math": expert}, shared=method)
    theirs = Checkpoint(expert)
    found = parts_by(recipe, method)
    assert set(found) == {name for name in theirs.weight_map if not is_mlp(name)}
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, theirs.tensor(name), rtol=1e-4, atol=1e-5, msg=name)


def test_the_mean_has_weights(tmp_path: Path, anchor: Path, drifted_experts: dict[str, Path]) -> None:
    shared = {"method": "mean", "weights": {"math": 3.0}}
    recipe = make_recipe(tmp_path, anchor, {n: drifted_experts[n] for n in ("general", "math")}, shared=shared)
    one, other = (Checkpoint(drifted_experts[name]) for name in ("general", "math"))
    for name, tensor in parts_by(recipe, "mean").items():
        torch.testing.assert_close(tensor, 0.25 * one.tensor(name) + 0.75 * other.tensor(name))


def test_parts_follow_their_own_method(tmp_path: Path, anchor: Path, drifted_experts: dict[str, Path]) -> None:
    shared = {"method": "mean", "norms": "anchor", "attention": "multislerp"}
    recipe = make_recipe(tmp_path, anchor, drifted_experts, shared=shared)
    found, ours = parts_by(recipe, "mean"), Checkpoint(anchor)
    by_method = {method: parts_by(make_recipe(tmp_path, anchor, drifted_experts), method) for method in METHODS[:2]}
    for name, tensor in found.items():
        part = part_of(name)
        wanted = (
            ours.tensor(name) if part == "norms" else by_method["mean" if part == "embeddings" else "multislerp"][name]
        )
        assert torch.equal(tensor, wanted), name


@given(st.integers(0, 2**31 - 1))
def test_regmean_gives_each_map_its_own_inputs(seed: int) -> None:
    """Where the experts' inputs lie in different coordinates, every one of them is answered as before."""
    torch.manual_seed(seed)
    maps = [torch.randn(3, 6, dtype=torch.float64) for _ in range(2)]
    inputs = [torch.randn(50, 6, dtype=torch.float64) for _ in range(2)]
    inputs[0][:, 3:] = 0
    inputs[1][:, :3] = 0
    solution = regmean(maps, [x.T @ x for x in inputs], [1.0, 2.0])
    for matrix, x in zip(maps, inputs, strict=True):
        torch.testing.assert_close(x @ solution.T, x @ matrix.T, rtol=1e-4, atol=1e-4)


def test_regmean_minimises_what_it_says() -> None:
    """With its shrinking undone the solution is the least-squares one on all experts' inputs and outputs."""
    torch.manual_seed(0)
    maps = [torch.randn(4, 5, dtype=torch.float64) for _ in range(3)]
    inputs = [torch.randn(80, 5, dtype=torch.float64) for _ in range(3)]
    grams = []
    for x in inputs:
        gram = x.T @ x
        diagonal = gram.diagonal().clone()
        gram /= SHRINK
        gram.diagonal().copy_(diagonal)
        grams.append(gram)
    outputs = torch.cat([x @ matrix.T for x, matrix in zip(inputs, maps, strict=True)])
    wanted = torch.linalg.lstsq(torch.cat(inputs), outputs).solution.T
    torch.testing.assert_close(regmean(maps, grams, [1.0] * 3), wanted, rtol=1e-5, atol=1e-5)


def test_the_stream_sees_what_the_attention_sees(anchor: Path) -> None:
    """Against forward hooks on the whole model."""
    model = AutoModelForCausalLM.from_pretrained(anchor, dtype=torch.float32)
    seen: dict[tuple[int, str], torch.Tensor] = {}
    for index, layer in enumerate(model.model.layers):
        for name in ("q_proj", "o_proj"):
            keep = lambda _, args, key=(index, name): seen.__setitem__(key, args[0][0])  # noqa: E731
            getattr(layer.self_attn, name).register_forward_pre_hook(keep)
    recipe = load_recipe(Path("configs/demo.yaml"))
    from fusion.data import load_examples

    rows = load_examples(recipe.domains["math"].train, "math", 3)
    tokenizer = load_tokenizer(anchor)
    for row in rows:
        stream = LayerStream(Checkpoint(anchor), encode_batches(tokenizer, [row]))
        with torch.no_grad():
            model(torch.tensor([encode(tokenizer, row).ids]))
        for layer in stream:
            found: dict[str, torch.Tensor] = {}
            layer.attend(lambda name, batch, x, found=found: found.__setitem__(name, x))
            layer.mix(forced(0))
            for name, x in found.items():
                torch.testing.assert_close(x, seen[layer.index, name], rtol=1e-4, atol=1e-5)
            assert set(found) == {"q_proj", "o_proj"}


@pytest.mark.parametrize("method", ["anchor", "mean"])
def test_what_is_grafted_is_what_is_merged(
    tmp_path: Path, anchor: Path, drifted_experts: dict[str, Path], method: str
) -> None:
    recipe = make_recipe(tmp_path, anchor, drifted_experts, shared=method, routing={"moe_layers": [0, 2]})
    road.merge(recipe)
    experts = _Experts(recipe)
    readers = [Reader(source) for source in expert_sources(recipe)]
    batches, domains = experts.batches(list(recipe.domains), held_out=True)
    shared = Reader(base_source(recipe))
    grafted = Grafted(shared, Reader(anchor_source(recipe)), readers, [0, 2])
    found = answer_losses(grafted, batches, domains, forced())
    assert found == answer_losses(Checkpoint(recipe.fused), batches, domains, forced())


def test_auto_is_never_worse_than_the_anchor(tmp_path: Path, anchor: Path, drifted_experts: dict[str, Path]) -> None:
    recipe = make_recipe(tmp_path, anchor, drifted_experts, shared="auto")
    result = make_shared_parts(recipe, shared_parts(recipe))
    assert set(result.losses) == {"anchor", *METHODS}
    least = min(result.gap(method) for method in result.losses)
    assert least <= result.gap(result.method) <= least + TOLERANCE
    assert result.gap(result.method) <= result.gap("anchor")
    assert set(result.own) == set(recipe.domains)
    folder = shared_parts(recipe)
    assert result.method != "anchor"
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["unexpected_keys"] and not info["missing_keys"] and not info["mismatched_keys"]
    ours = Checkpoint(anchor)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, ours.tensor(name)) == is_mlp(name), name
    assert read_json(folder / "shared.json")["method"] == result.method
    assert not [path for path in folder.iterdir() if path.is_dir()]


def test_anchored_experts_keep_the_anchors_parts(
    tmp_path: Path, anchor: Path, anchored_experts: dict[str, Path]
) -> None:
    recipe = make_recipe(tmp_path, anchor, anchored_experts, shared="auto")
    road.merge(recipe)
    assert read_json(shared_parts(recipe) / "shared.json")["method"] == "anchor"
    assert {path.name for path in shared_parts(recipe).iterdir()} == {"shared.json"}
    assert base_source(recipe).folder == anchor
    assert read_json(recipe.fused / "fusion.json")["shared"] == "anchor"


def test_the_merge_takes_the_shared_parts_and_does_its_work_once(
    tmp_path: Path, anchor: Path, drifted_experts: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = make_recipe(tmp_path, anchor, drifted_experts, shared="mean")
    with pytest.raises(UserError, match="do not exist yet: run `qwen-fusion merge`"):
        base_source(recipe)
    road.merge(recipe)
    fused, shared = Checkpoint(recipe.fused), Checkpoint(shared_parts(recipe))
    for name in shared.weight_map:
        if not is_mlp(name):
            assert torch.equal(fused.tensor(name), shared.tensor(name))
    assert "made one by mean" in (recipe.fused / "README.md").read_text()
    capsys.readouterr()
    road.merge(recipe)
    assert capsys.readouterr().err.count("unchanged, skipped") == 2


def test_an_expert_with_another_rope_is_left_out_of_queries_and_keys(
    tmp_path: Path, anchor: Path, drifted_experts: dict[str, Path]
) -> None:
    rope = {"rope_type": "default", "rope_theta": 1e4}
    other = write_model(tmp_path / "other", seed=5, anchor=anchor, drift=True, rope_parameters=rope)
    experts = {"general": drifted_experts["general"], "math": other}
    for method in METHODS:
        recipe = make_recipe(tmp_path, anchor, experts, shared=method)
        found, alone = parts_by(recipe, method), Checkpoint(drifted_experts["general"])
        for name, tensor in found.items():
            if part_of(name) == "attention":
                rotated = ".q_proj." in name or ".k_proj." in name
                same = torch.allclose(tensor, alone.tensor(name), rtol=1e-4, atol=1e-5)
                assert same == rotated, (method, name)
    note = make_shared_parts(recipe, shared_parts(recipe)).sentence()
    assert "expert 'math' has rope_theta 10000, the anchor 1e+06: left out of q_proj and k_proj" in note


def test_weights_of_unknown_experts_are_refused(tmp_path: Path, anchor: Path) -> None:
    with pytest.raises(ValueError, match="the recipe has no expert 'physics'"):
        Recipe.model_validate(
            recipe_data(tmp_path, anchor, {"general": anchor, "math": anchor}, shared={"weights": {"physics": 2.0}})
        )
