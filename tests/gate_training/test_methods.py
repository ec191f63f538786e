"""Ridge against the direct solution, cross-entropy against ridge, regression against its costs, all on awkward data."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fusion.sections.fusing import GateTraining
from gate_training.methods import cross_entropy, regression, ridge
from gate_training.methods.ridge import TEMPERATURES, best_temperature
from gate_training.methods.solver import PENALTIES, _Problem, label_loss, minimise
from gate_training.methods.tokens import InMemory, TokenPass, Tokens, moments

HIDDEN, EXPERTS = 12, 3
METHODS = {"ridge": ridge, "cross-entropy": cross_entropy, "regression": regression}


@dataclass(frozen=True)
class Parts:
    """Tokens in parts, all of them the sample."""

    parts: list[Tokens]

    def __call__(self) -> Iterator[Tokens]:
        return iter(self.parts)

    sample = __call__


def passes(x: torch.Tensor, labels: torch.Tensor, parts: int = 1) -> TokenPass:
    """The tokens in `parts` batches, afresh on every call; a fifth is held back, any expert but the label's costs 1."""
    targets = F.one_hot(labels, EXPERTS).float()
    held_back = torch.arange(len(x)) % 5 == 4

    return Parts(
        [
            Tokens(*part, part[-1], 1 - part[1])
            for part in zip(*(p.chunk(parts) for p in (x, targets, held_back)), strict=True)
        ]
    )


def fit(method: Any, tokens: TokenPass, **settings: Any) -> torch.Tensor:
    gate: torch.Tensor = method.fit(tokens, moments(tokens), GateTraining(**settings))
    return gate


def toy(noise: float = 1.0, count: int = 600, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Gaussian clouds, one an expert, of unlike sizes and scales: `(tokens, hidden)` and `(tokens,)`."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(EXPERTS, HIDDEN, generator=generator)
    labels = torch.multinomial(torch.tensor([0.6, 0.3, 0.1]), count, replacement=True, generator=generator)
    x = centres[labels] + noise * torch.randn(count, HIDDEN, generator=generator)
    return x * torch.logspace(-1, 1, HIDDEN), labels


def loss(gate: torch.Tensor, x: torch.Tensor, labels: torch.Tensor) -> float:
    return float(F.cross_entropy(x @ gate.T, labels))


@pytest.mark.parametrize("strength", [1e-6, 1e-3, 1.0])
def test_ridge_is_the_least_squares_solution(strength: float) -> None:
    x, labels = toy()
    gate = fit(ridge, passes(x, labels, 5), ridge=strength)
    penalty = strength * float(x.square().sum(dim=0).mean())
    rows = torch.cat([x.double(), penalty**0.5 * torch.eye(HIDDEN, dtype=torch.float64)])
    targets = torch.cat([F.one_hot(labels, EXPERTS).double(), torch.zeros(HIDDEN, EXPERTS, dtype=torch.float64)])
    direct = torch.linalg.lstsq(rows, targets).solution.T.float()  # (experts, hidden)
    temperature = best_temperature(passes(x, labels), direct)
    assert torch.allclose(gate, temperature * direct, rtol=1e-3, atol=1e-4 * temperature)


def test_the_temperature_is_the_best_of_its_grid() -> None:
    x, labels = toy()
    weight = (torch.linalg.pinv(x) @ F.one_hot(labels, EXPERTS).float()).T  # (experts, hidden)
    losses = [loss(weight * t, x, labels) for t in TEMPERATURES]
    found = best_temperature(passes(x, labels, 4), weight)
    assert found == float(TEMPERATURES[losses.index(min(losses))])
    assert 0 < losses.index(min(losses)) < len(losses) - 1


@pytest.mark.parametrize("method", METHODS)
def test_statistics_in_parts_are_those_of_one_pass(method: str) -> None:
    x, labels = toy()
    whole = fit(METHODS[method], passes(x, labels, 1))
    halves = fit(METHODS[method], passes(x, labels, 2))
    assert torch.allclose(whole, halves, rtol=1e-2, atol=1e-3 * float(whole.abs().max()))


@pytest.mark.parametrize("noise", [1.0, 3.0])
def test_cross_entropy_fits_better_than_ridge(noise: float) -> None:
    x, labels = toy(noise)
    fitted = [loss(fit(method, passes(x, labels)), x, labels) for method in (cross_entropy, ridge)]
    assert fitted[0] < fitted[1]


@pytest.mark.parametrize("penalty", [1e-1, 1e-3, 1e-5])
def test_the_solver_ends_at_the_optimum(penalty: float) -> None:
    x, labels = toy()
    tokens = passes(x, labels, 3)
    problem = _Problem(tokens, moments(tokens), label_loss)
    weight = problem.solve(torch.zeros(EXPERTS, HIDDEN), penalty, 300).double().requires_grad_(True)
    scale = x.double().square().mean(dim=0).sqrt()  # (hidden,)
    assert torch.allclose(scale.float(), problem.scale, rtol=1e-4)
    total = F.cross_entropy((x.double() / scale) @ weight.T, labels) + 0.5 * penalty * weight.square().sum()
    total.backward()
    assert weight.grad is not None
    assert weight.grad.abs().max() < 1e-3


@pytest.mark.parametrize("noise", [1.0, 3.0])
def test_the_penalty_is_the_one_that_serves_the_held_back_best(noise: float) -> None:
    x, labels = toy(noise, count=200)
    tokens = passes(x, labels)
    problem = _Problem(tokens, moments(tokens), label_loss)
    held = torch.arange(len(x)) % 5 == 4
    losses = {}
    for penalty in PENALTIES:
        weight = problem.solve(torch.zeros(EXPERTS, HIDDEN), penalty, 300, choosing=True)
        assert problem.held_back_loss(weight) == pytest.approx(
            loss(weight / problem.scale, x[held], labels[held]), rel=1e-3
        )
        losses[penalty] = problem.held_back_loss(weight)
    best = min(losses, key=losses.__getitem__)
    assert (best == PENALTIES[0]) == (noise == 3.0)  # noise wants much of it
    gate = minimise(tokens, moments(tokens), torch.zeros(EXPERTS, HIDDEN), label_loss)
    wanted = problem.solve(torch.zeros(EXPERTS, HIDDEN), best, 300) / problem.scale
    assert loss(gate, x, labels) == pytest.approx(loss(wanted, x, labels), rel=0.1)  # in a few steps


@pytest.mark.parametrize("method", METHODS)
def test_separable_data_are_separated_by_a_finite_gate(method: str) -> None:
    x, labels = toy(noise=0.05)
    gate = fit(METHODS[method], passes(x, labels, 3))
    assert gate.isfinite().all()
    assert ((x @ gate.T).argmax(dim=1) == labels).float().mean() > 0.99


@pytest.mark.parametrize("method", METHODS)
def test_duplicate_and_dead_features_stay_finite(method: str) -> None:
    x, labels = toy(noise=0.5)
    x[:, 1] = x[:, 0]
    x[:, 2] = 0
    gate = fit(METHODS[method], passes(x, labels, 3))
    assert gate.shape == (EXPERTS, HIDDEN)
    assert gate.dtype == torch.float32
    assert gate.isfinite().all()
    assert ((x @ gate.T).argmax(dim=1) == labels).float().mean() > 0.9


def test_cross_entropy_does_not_mind_one_huge_feature() -> None:
    x, labels = toy(noise=0.5)
    x[:, 3] = 1e4  # as the massive activations of real models; ridge's penalty is relative to the mean and drowns
    gate = fit(cross_entropy, passes(x, labels, 3))
    assert gate.isfinite().all()
    assert ((x @ gate.T).argmax(dim=1) == labels).float().mean() > 0.9


@pytest.mark.parametrize("method", METHODS)
def test_an_expert_without_tokens_is_never_first(method: str) -> None:
    x, labels = toy(noise=0.3)
    kept = labels != 1
    gate = fit(METHODS[method], passes(x[kept], labels[kept]))
    assert gate.isfinite().all()
    assert ((x[kept] @ gate.T).argmax(dim=1) == labels[kept]).float().mean() > 0.95


@pytest.mark.parametrize("method", METHODS)
def test_one_label_alone_goes_to_its_expert(method: str) -> None:
    x, _ = toy(noise=0.3, count=60)
    gate = fit(METHODS[method], passes(x, torch.ones(len(x), dtype=torch.long)))
    assert gate.isfinite().all()
    assert ((x @ gate.T).argmax(dim=1) == 1).float().mean() > 0.95


@pytest.mark.parametrize("method", METHODS)
def test_fewer_tokens_than_features(method: str) -> None:
    x, labels = toy(noise=0.3, count=6)
    gate = fit(METHODS[method], passes(x, labels))
    assert gate.isfinite().all()
    assert ((x @ gate.T).argmax(dim=1) == labels).all()


def test_soft_labels_are_shares_not_choices() -> None:
    x, _ = toy()
    wanted = torch.softmax(x[:, :EXPERTS] / x[:, :EXPERTS].std(dim=0), dim=1)  # a gate that exists
    held_back = torch.arange(len(x)) % 5 == 4
    gate = fit(cross_entropy, InMemory(Tokens(x, wanted, held_back, held_back)))
    assert (torch.softmax(x @ gate.T, dim=1) - wanted).abs().max() < 0.02


def outputs(count: int = 40, width: int = 7) -> torch.Tensor:
    return torch.randn(EXPERTS, count, width, generator=torch.Generator().manual_seed(1))


def test_costs_are_those_of_the_outputs() -> None:
    made = outputs()
    labels = torch.arange(made.shape[1]) % EXPERTS
    targets = F.one_hot(labels, EXPERTS).float()
    wanted = made[labels, torch.arange(len(labels))]  # (tokens, width)
    single = regression.costs(made, targets, top_k=1)
    for expert in range(EXPERTS):
        direct = (made[expert] - wanted).square().sum(dim=1) / wanted.square().sum(dim=1)
        assert torch.allclose(single[:, expert], direct, atol=1e-5)
    scores = torch.randn(len(labels), EXPERTS)
    weights = torch.softmax(scores, dim=1)
    mixture = torch.einsum("te,eth->th", weights, made)
    direct = (mixture - wanted).square().sum(dim=1) / wanted.square().sum(dim=1)
    none = torch.zeros(len(labels), dtype=torch.bool)
    part = Tokens(torch.zeros(len(labels), 1), targets, none, none, regression.costs(made, targets, top_k=2))
    assert torch.allclose(regression.output_loss(scores, part)[0], direct, atol=1e-4)
    expected = (weights * single).sum(dim=1)
    part = Tokens(part.inputs, targets, none, none, single)
    assert torch.allclose(regression.output_loss(scores, part)[0], expected)


@pytest.mark.parametrize("costs_of", ["labels", "single", "mixture"])
def test_slopes_are_those_of_the_losses(costs_of: str) -> None:
    made = outputs()
    targets = torch.softmax(torch.randn(made.shape[1], EXPERTS), dim=1)
    none = torch.zeros(len(targets), dtype=torch.bool)
    costs = None if costs_of == "labels" else regression.costs(made, targets, 1 if costs_of == "single" else 2)
    loss_of = label_loss if costs is None else regression.output_loss
    scores = torch.randn(len(targets), EXPERTS, requires_grad=True)
    losses, slopes = loss_of(scores, Tokens(torch.zeros(len(targets), 1), targets, none, none, costs))
    (direct,) = torch.autograd.grad(losses.sum(), scores)
    assert torch.allclose(slopes, direct, atol=1e-5)


def test_regression_does_not_mind_experts_that_agree() -> None:
    """Experts 0 and 1 are the same where their labels cannot be told apart; expert 2's tokens are worth more."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(900, HIDDEN, generator=generator)
    labels = torch.where(x[:, 0] + 0.8 * torch.randn(900, generator=generator) > 1, 2, torch.arange(900) % 2)
    targets = F.one_hot(labels, EXPERTS).float()
    costs = torch.tensor([[0.0, 0.0, 0.2], [0.0, 0.0, 0.2], [3.0, 3.0, 0.0]])[labels]
    held_back = torch.arange(len(x)) % 5 == 4
    part = Tokens(x, targets, held_back, held_back, costs)
    gates = {method: fit(method, InMemory(part)) for method in (cross_entropy, regression)}
    paid = {m: float(costs.gather(1, (x @ g.T).argmax(dim=1, keepdim=True)).mean()) for m, g in gates.items()}
    assert paid[regression] < 0.8 * paid[cross_entropy]
