"""Refining gates on a tiny fused model: where the gradient comes from, and that nothing gets worse or lost."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from fusion.checkpoint import Checkpoint
from fusion.encoding import load_tokenizer
from fusion.layers import Gates, checkpoint_gates
from fusion.packing import answer_loss, pack, training_row
from fusion.recipe import Recipe
from fusion.router import train_routers
from fusion.sections.fusing import Loading, Refinement
from gate_training import refine as refining
from gate_training.compare import ANCHOR, LABELLED, OWN, held_out_losses, mean_loss
from gate_training.examples import routing_data, routing_examples
from gate_training.refine import load_balance, refine
from gate_training.report import markdown
from gate_training.trainer import train_gates
from tests.recipes import SETTINGS, make_recipe, with_settings

STEPS = {"steps": 6, "batch_rows": 4, "learning_rate": 1e-2, "warmup_steps": 0, "evaluate_every": 2, "max_length": 128}


@pytest.fixture
def recipe(tmp_path: Path, anchor: Path, anchored_experts: dict[str, Path], merged: Path) -> Recipe:
    """A recipe with its own copy of the fused checkpoint."""
    settings = {**SETTINGS, "method": "lm", "refinement": STEPS}
    recipe = make_recipe(tmp_path, anchor, anchored_experts, gate_training=settings)
    shutil.copytree(merged, recipe.fused)
    return recipe


def changed(recipe: Recipe, **steps: Any) -> Recipe:
    return with_settings(recipe, refinement=Refinement(**{**STEPS, **steps}))


def random_gates(recipe: Recipe) -> Gates:
    return checkpoint_gates(Checkpoint(recipe.fused))


def model_and_batch(recipe: Recipe) -> tuple[Any, dict[str, torch.Tensor]]:
    tokenizer = load_tokenizer(recipe.fused)
    rows = [training_row(tokenizer, row.example) for row in routing_examples(recipe, "train", 4)]
    return AutoModelForCausalLM.from_pretrained(recipe.fused, dtype=torch.float32), pack(rows, 128, 0)


def test_a_top_1_gate_has_a_gradient_through_the_trained_router_alone(recipe: Recipe) -> None:
    model, batch = model_and_batch(recipe)
    answer_loss(model.train(), batch)[0].backward()
    gates = [layer.mlp.gate for layer in model.model.layers]
    assert all(gate.weight.grad is None or float(gate.weight.grad.abs().max()) < 1e-5 for gate in gates)
    routers = train_routers(model, random_gates(recipe), torch.float32)
    answer_loss(model, batch)[0].backward()
    assert all(float(router.weight.grad.abs().max()) > 1e-3 for router in routers)  # type: ignore[union-attr]


@pytest.mark.parametrize("top_k", [1, 2])
def test_trained_routers_serve_as_transformers_own(recipe: Recipe, top_k: int) -> None:
    model, batch = model_and_batch(recipe)
    for layer in model.model.layers:
        layer.mlp.gate.top_k = top_k
    with torch.no_grad():
        expected, _ = answer_loss(model.eval(), batch)
        train_routers(model, random_gates(recipe), torch.float32)
        assert torch.allclose(answer_loss(model, batch)[0], expected, rtol=1e-5)
        assert torch.allclose(answer_loss(model.train(), batch)[0], expected, rtol=1e-5)


def test_the_gradient_is_that_of_the_softmax_mixture(recipe: Recipe) -> None:
    """Of a loss that is linear in the layer's output, through one router: gate by gate as autograd has it."""
    gate, x = torch.randn(3, 8), torch.randn(5, 8)
    values = torch.randn(5, 3)  # what each expert is worth to each token
    model, _ = model_and_batch(recipe)
    router = train_routers(model, {0: gate}, torch.float32)[0].train()
    _, weights, experts = router(x)
    (weights * values.gather(1, experts)).sum().backward()
    soft = gate.clone().requires_grad_()
    (torch.softmax(x @ soft.T, dim=1) * values).sum().backward()
    assert torch.allclose(router.weight.grad, soft.grad, atol=1e-6)  # type: ignore[arg-type]
    served = torch.nn.functional.one_hot((x @ gate.T).argmax(dim=1), 3).float()
    assert torch.allclose(weights, served, atol=1e-6)


def test_the_load_balance_loss_is_transformers_own_without_padding(recipe: Recipe) -> None:
    model, batch = model_and_batch(recipe)
    assert batch["position_ids"].shape[0] > 1
    routers = train_routers(model, random_gates(recipe), torch.float32)
    with torch.no_grad():
        answer_loss(model.eval(), batch)
        found = float(load_balance(routers, batch["position_ids"]))
        logits = [torch.softmax(router.logits, dim=1) for router in routers]
    starts = (batch["position_ids"] == 0) & (batch["position_ids"].roll(-1, 1) == 1)
    real = ((batch["position_ids"] > 0) | starts).flatten()
    assert int((~real).sum()) > 0
    chosen = torch.cat([torch.nn.functional.one_hot(p[real].argmax(1), 3).float() for p in logits]).mean(0)
    assert found == pytest.approx(float(3 * (chosen * torch.cat([p[real] for p in logits]).mean(0)).sum()), rel=1e-4)


@pytest.mark.parametrize("learning_rate", [1e-2, 3.0])
def test_refining_never_worsens_the_held_out_loss(recipe: Recipe, learning_rate: float) -> None:
    recipe = changed(recipe, learning_rate=learning_rate)
    data = routing_data(recipe, recipe.fused)
    start = random_gates(recipe)
    gates, result = refine(recipe, recipe.fused, start, data)
    losses = held_out_losses(recipe.fused, data, {"start": start, "refined": gates})
    assert mean_loss(losses["start"]) == pytest.approx(result.loss_before, abs=1e-4)
    assert mean_loss(losses["refined"]) == pytest.approx(result.loss_after, abs=1e-4)
    assert result.loss_after <= result.loss_before
    if learning_rate < 1:
        assert result.best_step > 0 and result.loss_after < result.loss_before - 1e-3


def test_a_learning_rate_of_0_leaves_the_gates_as_they_are(recipe: Recipe) -> None:
    recipe = changed(recipe, learning_rate=0.0)
    start = random_gates(recipe)
    gates, result = refine(recipe, recipe.fused, start, routing_data(recipe, recipe.fused))
    assert all(torch.equal(gates[layer], start[layer]) for layer in start)
    assert result.loss_after == result.loss_before and result.best_step == 0


def test_a_step_down_the_load_balance_loss_spreads_the_tokens(recipe: Recipe) -> None:
    model, batch = model_and_batch(recipe)
    routers = train_routers(model.requires_grad_(False).train(), random_gates(recipe), torch.float32)

    def lean(router: torch.nn.Module, args: tuple[torch.Tensor]) -> None:
        """Most tokens to the first expert: its row becomes what all inputs have in common."""
        router.get_parameter("weight").data[0] = args[0].reshape(-1, 64).mean(dim=0)

    hooks = [router.register_forward_pre_hook(lean) for router in routers]
    answer_loss(model, batch)
    for hook in hooks:
        hook.remove()

    def balance() -> torch.Tensor:
        answer_loss(model, batch)
        return load_balance(routers, batch["position_ids"])

    before = balance()
    assert float(before) > 1.1  # 1 is even
    for router in routers:
        router.weight.requires_grad_()
    balance().backward()
    with torch.no_grad():
        for router in routers:
            assert router.weight.grad is not None
            router.weight -= 0.1 * router.weight.grad
        assert float(balance()) < float(before)


def test_interrupted_it_goes_on_and_ends_the_same(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    start, data = random_gates(recipe), routing_data(recipe, recipe.fused)
    whole, result = refine(recipe, recipe.fused, start, data)
    measured, calls = refining.domain_mean, 0

    def dies_in_the_third(*args: Any) -> float:
        nonlocal calls
        calls += 1
        if calls == 3:  # the start, steps 2 and 4
            raise KeyboardInterrupt
        return measured(*args)

    monkeypatch.setattr(refining, "domain_mean", dies_in_the_third)
    with pytest.raises(KeyboardInterrupt):
        refine(recipe, recipe.fused, start, data)
    monkeypatch.undo()
    resumed, again = refine(recipe, recipe.fused, start, data)
    assert again.curve == result.curve and again.tokens == result.tokens
    assert all(torch.equal(resumed[layer], whole[layer]) for layer in whole)
    assert not list(recipe.folder.glob(".*"))


def test_a_model_partly_on_disk_refines_to_the_same_gates(recipe: Recipe) -> None:
    start, data = random_gates(recipe), routing_data(recipe, recipe.fused)
    whole, _ = refine(recipe, recipe.fused, start, data)
    loading = Loading(device_map="auto", max_memory={"cpu": "500KB"})
    spread, _ = refine(recipe.model_copy(update={"loading": loading}), recipe.fused, start, data)
    assert all(torch.allclose(spread[layer], whole[layer], atol=1e-4) for layer in whole)


def test_lm_starts_from_cross_entropy_and_reports_both(recipe: Recipe) -> None:
    report = train_gates(recipe, recipe.fused)
    assert report.method == "lm"
    assert set(report.compared) == {"cross-entropy, top-1", "lm, top-1", ANCHOR, OWN, LABELLED}
    assert report.refined is not None
    assert mean_loss(report.compared["lm, top-1"]) == pytest.approx(report.refined["loss_after"], abs=1e-4)
    assert mean_loss(report.compared["lm, top-1"]) <= mean_loss(report.compared["cross-entropy, top-1"]) + 1e-5
    data = routing_data(recipe, recipe.fused)
    installed = held_out_losses(recipe.fused, data, {"installed": random_gates(recipe)})["installed"]
    assert installed == pytest.approx(report.compared["lm, top-1"], rel=1e-5)
    text = markdown(report)
    assert "Gates by `lm`" in text and f"-> {report.refined['loss_after']:.4f} at step" in text
