"""Ridge against the direct solution, cross-entropy against ridge, both on awkward data."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from fusion.recipe import GateTraining
from gate_training.methods import TokenPass, cross_entropy, ridge
from gate_training.methods.ridge import TEMPERATURES, best_temperature

HIDDEN, EXPERTS = 12, 3
METHODS = {"ridge": ridge.fit, "cross-entropy": cross_entropy.fit}


def passes(x: torch.Tensor, labels: torch.Tensor, parts: int = 1) -> TokenPass:
    """The tokens in `parts` batches, afresh on every call."""

    def tokens() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        yield from zip(x.chunk(parts), labels.chunk(parts), strict=True)

    return tokens


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
    gate = ridge.fit(passes(x, labels, 5), EXPERTS, HIDDEN, GateTraining(ridge=strength))
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
    whole = METHODS[method](passes(x, labels, 1), EXPERTS, HIDDEN, GateTraining())
    halves = METHODS[method](passes(x, labels, 2), EXPERTS, HIDDEN, GateTraining())
    assert torch.allclose(whole, halves, rtol=1e-2, atol=1e-3 * float(whole.abs().max()))


@pytest.mark.parametrize("noise", [1.0, 3.0])
def test_cross_entropy_fits_better_than_ridge(noise: float) -> None:
    x, labels = toy(noise)
    settings = GateTraining()
    fitted = {name: loss(fit(passes(x, labels), EXPERTS, HIDDEN, settings), x, labels) for name, fit in METHODS.items()}
    assert fitted["cross-entropy"] < fitted["ridge"]


def test_cross_entropy_ends_at_the_optimum() -> None:
    x, labels = toy()
    settings = GateTraining(iterations=300)
    gate = cross_entropy.fit(passes(x, labels), EXPERTS, HIDDEN, settings).double()
    scale = x.double().square().mean(dim=0).sqrt()  # (hidden,)
    weight = (gate * scale).requires_grad_(True)
    total = F.cross_entropy((x.double() / scale) @ weight.T, labels)
    total = total + 0.5 * settings.ridge * weight.square().sum() / HIDDEN
    total.backward()
    assert weight.grad is not None
    assert weight.grad.abs().max() < 1e-3


@pytest.mark.parametrize("method", METHODS)
def test_separable_data_are_separated_by_a_finite_gate(method: str) -> None:
    x, labels = toy(noise=0.05)
    gate = METHODS[method](passes(x, labels, 3), EXPERTS, HIDDEN, GateTraining())
    assert gate.isfinite().all()
    assert ((x @ gate.T).argmax(dim=1) == labels).float().mean() > 0.99


@pytest.mark.parametrize("method", METHODS)
def test_duplicate_and_dead_features_stay_finite(method: str) -> None:
    x, labels = toy(noise=0.5)
    x[:, 1] = x[:, 0]
    x[:, 2] = 0
    gate = METHODS[method](passes(x, labels, 3), EXPERTS, HIDDEN, GateTraining())
    assert gate.shape == (EXPERTS, HIDDEN)
    assert gate.dtype == torch.float32
    assert gate.isfinite().all()
    assert ((x @ gate.T).argmax(dim=1) == labels).float().mean() > 0.9


def test_cross_entropy_does_not_mind_one_huge_feature() -> None:
    x, labels = toy(noise=0.5)
    x[:, 3] = 1e4  # as the massive activations of real models; ridge's penalty is relative to the mean and drowns
    gate = cross_entropy.fit(passes(x, labels, 3), EXPERTS, HIDDEN, GateTraining())
    assert gate.isfinite().all()
    assert ((x @ gate.T).argmax(dim=1) == labels).float().mean() > 0.9


@pytest.mark.parametrize("method", METHODS)
def test_an_expert_without_tokens_is_never_first(method: str) -> None:
    x, labels = toy(noise=0.3)
    kept = labels != 1
    gate = METHODS[method](passes(x[kept], labels[kept]), EXPERTS, HIDDEN, GateTraining())
    assert gate.isfinite().all()
    assert ((x[kept] @ gate.T).argmax(dim=1) == labels[kept]).float().mean() > 0.95


@pytest.mark.parametrize("method", METHODS)
def test_fewer_tokens_than_features(method: str) -> None:
    x, labels = toy(noise=0.3, count=6)
    gate = METHODS[method](passes(x, labels), EXPERTS, HIDDEN, GateTraining())
    assert gate.isfinite().all()
    assert ((x @ gate.T).argmax(dim=1) == labels).all()
