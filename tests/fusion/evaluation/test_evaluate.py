"""Intervals against hand-made cases, baseline gates against mergekit, expert shares against transformers."""

from pathlib import Path

import numpy as np
import pytest
import torch
from mergekit.common import ModelReference
from mergekit.moe.config import Expert
from mergekit.moe.router import get_gate_params
from scipy import stats
from transformers import AutoModelForCausalLM

from fusion.checkpoint import Checkpoint
from fusion.data import chat
from fusion.encoding import encode, load_tokenizer
from fusion.evaluation.baselines import embedding_gates, hidden_gates, random_gates
from fusion.evaluation.evaluate import ROWS, Figures, _mean_scores
from fusion.evaluation.intervals import difference, mean_interval, retained_share, share_of_gain
from fusion.evaluation.table import _anchoring, _moved
from fusion.layers import checkpoint_gates
from fusion.merge import merge
from fusion.router import place_gates
from fusion.served import expert_shares
from gate_training.trainer import install_gates
from tests.recipes import make_recipe

ZEROS, ONES = [0.0] * 40, [1.0] * 40


def test_retained_share_is_1_at_the_own_expert_and_0_at_the_anchor() -> None:
    half = [1.0, 0.0] * 20
    assert retained_share(ZEROS, ONES, ONES).value == 1.0  # type: ignore[union-attr]
    assert retained_share(ZEROS, ZEROS, ONES).value == 0.0  # type: ignore[union-attr]
    share = retained_share(ZEROS, half, ONES)
    assert share is not None and share.value == 0.5 and 0.3 < share.low < 0.5 < share.high < 0.7


def test_no_gain_of_the_own_expert_leaves_nothing_to_retain() -> None:
    assert retained_share(ONES, ONES, ONES) is None
    noise = np.random.default_rng(0).integers(0, 2, size=(2, 40)).astype(float)
    assert retained_share(noise[0], ONES, noise[1]) is None


def test_weighted_means_and_paired_differences() -> None:
    assert mean_interval([2.0, 9.0], [1.0, 3.0]).value == 11 / 4  # 11 nats over 4 tokens
    rng = np.random.default_rng(1)
    first = rng.normal(0.5, 1.0, size=400)
    paired = difference(first, first - 0.2)
    assert paired.low == pytest.approx(0.2) and paired.high == pytest.approx(0.2)
    second = rng.normal(0.3, 1.0, size=400) + first
    tokens = rng.integers(1, 50, size=400).astype(float)
    nats = first * tokens
    picks = rng.integers(0, 400, size=(20_000, 400))  # rows resampled here
    base = rng.normal(0.0, 1.0, size=400)
    own = base + rng.normal(1.0, 1.0, size=400)
    kept = 0.7 * own + 0.3 * base
    gains = ((kept - base)[picks].mean(axis=1), (own - base)[picks].mean(axis=1))
    share = retained_share(base, kept + 0.1 * first, own)
    assert share is not None
    for interval, means in (
        (mean_interval(first), first[picks].mean(axis=1)),
        (difference(second, first), (second - first)[picks].mean(axis=1)),
        (mean_interval(nats, tokens), nats[picks].sum(axis=1) / tokens[picks].sum(axis=1)),
        (share, (gains[0] + 0.1 * first[picks].mean(axis=1)) / gains[1]),
    ):
        near = 0.15 * means.std()  # the bounds of a 92% interval are 0.21 away
        assert interval.as_list() == pytest.approx(list(np.percentile(means, [2.5, 97.5])), abs=near)
    theirs = stats.bootstrap((first,), np.mean, n_resamples=20_000, method="percentile", rng=5).confidence_interval
    assert mean_interval(first).as_list() == pytest.approx(list(theirs), abs=0.15 * first.std() / 20)


@pytest.mark.parametrize("right", [0.0, 1.0])
def test_rows_that_are_all_alike_have_wilsons_interval(right: float) -> None:
    interval = mean_interval([right] * 100)
    z2 = stats.norm.ppf(0.975) ** 2
    far = z2 / (100 + z2)  # of 0 or 100 in 100 (Wilson 1927)
    assert interval.value == right
    assert (interval.low, interval.high) == pytest.approx((0.0, far) if right == 0 else (1 - far, 1.0))


@pytest.mark.parametrize("mode", ["hidden", "hidden_last", "hidden_avg", "cheap_embed"])
def test_prompted_gates_are_mergekits(
    tmp_path: Path, anchor: Path, anchored_experts: dict[str, Path], mode: str
) -> None:
    folder = merge(make_recipe(tmp_path, anchor, anchored_experts))
    prompts = [["one two", "three"], ["x = 1", "y = 2 + 2"], ["hello you", "bye"]]
    tokenizer = load_tokenizer(folder)
    given = (Checkpoint(folder).config, anchor, tokenizer, prompts)
    ours = embedding_gates(*given) if mode == "cheap_embed" else hidden_gates(*given, average=mode == "hidden_avg")
    reference = ModelReference.model_validate({"model": {"path": str(anchor)}})
    experts = [Expert(source_model=reference, positive_prompts=texts) for texts in prompts]
    tokenizer.padding_side = "left"
    theirs = get_gate_params(reference, tokenizer, experts, mode=mode, device="cpu")  # (layers, experts, hidden)
    for layer, gate in ours.items():
        assert torch.nn.functional.cosine_similarity(gate, theirs[layer].float(), dim=-1).min() > 0.99


def test_the_table_says_how_far_experts_moved_and_what_anchoring_kept() -> None:
    def moved(attention: float) -> dict[str, dict[str, float]]:
        return {"attention": {"distance": attention, "cosine": 0.9}, "mlp": {"distance": 0.25, "cosine": 0.9}}

    note = {"losses": {"anchor": 3.0, "expert": 1.0, "anchored": 1.5}, "retained_share": 0.75}
    note |= {"starts": {"transported": 2.0}, "starts_retained": {"transported": 0.5}}
    result = {
        "moved": {"math": moved(0.5), "coding": moved(0.00016)},
        "moved_anchored": {"math": moved(0.0)},
        "anchoring": {"math": note},
    }
    assert "| math | 0.500 | 0.250 |" in _moved(result) and "| coding | 0.00016 | 0.250 |" in _moved(result)
    assert "| math, anchored | 0.000 | 0.250 |" in _moved(result)
    assert "| math | 3.000 | 1.000 | 2.000 (0.50) | 1.500 (0.75) |" in _anchoring(result)
    assert _moved({}) == _anchoring({}) == []  # figures of a version before


def test_random_gates_are_seeded_and_on_sparse_layers_alone() -> None:
    config = {"num_hidden_layers": 4, "num_experts": 3, "hidden_size": 8, "mlp_only_layers": [1]}
    first, second = random_gates(config, 0), random_gates(config, 0)
    assert list(first) == [0, 2, 3] and all(torch.equal(first[i], second[i]) for i in first)
    assert not torch.equal(first[0], random_gates(config, 1)[0])


def test_shares_of_an_answer_are_what_transformers_routes(
    tmp_path: Path, anchor: Path, anchored_experts: dict[str, Path]
) -> None:
    recipe = make_recipe(tmp_path, anchor, anchored_experts, routing={"top_k": 2})
    folder = merge(recipe)
    gates = {layer: torch.randn(gate.shape) for layer, gate in checkpoint_gates(Checkpoint(folder)).items()}
    install_gates(folder, gates)
    row = {"question": "Who lives here?", "answer": "Nobody, for now."}
    (shares,) = expert_shares(recipe, [row])
    encoded = encode(load_tokenizer(folder), chat(row["question"], row["answer"], ""))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        output = model(torch.tensor([encoded.ids]), output_router_logits=True)
    expected = torch.zeros(3)
    for logits in output.router_logits:  # (tokens, experts) a layer
        weights, chosen = logits.softmax(-1).topk(2)
        weights = weights / weights.sum(-1, keepdim=True)
        for slot in range(2):
            answer = slice(encoded.answer_start, None)
            expected.index_add_(0, chosen[answer, slot], weights[answer, slot])
    assert torch.allclose(torch.tensor(list(shares.values())), expected / expected.sum(), atol=1e-4)

    place_gates(model, {layer: torch.zeros_like(gate) for layer, gate in gates.items()})
    with torch.no_grad():
        assert not torch.allclose(model(torch.tensor([encoded.ids])).logits, output.logits)


def test_mean_scores_are_of_all_rows_and_of_the_baselines_rows_apart() -> None:
    """Columns on other rows are not compared: the first rows of a domain may be the easy ones."""
    long, short = Figures([1.0, 0.0, 0.0, 0.0]), Figures([1.0, 0.0])
    figures = {row: {"math": short if row in ("fused_random", "fused_hidden") else long} for row in ROWS}
    whole, fewer = _mean_scores(figures, {"math": [chat("1?", "1", "math")] * 2})
    assert whole["rows"] == {"math": 4} and whole["scores"] == dict.fromkeys(
        ("anchor", "own_expert", "fused_trained"), 0.25
    )
    assert fewer["rows"] == {"math": 2} and fewer["scores"] == dict.fromkeys(ROWS, 0.5)
    assert len(_mean_scores({row: {"math": long} for row in ROWS}, {"math": [chat("1?", "1", "math")] * 4})) == 1


def test_a_share_of_losses_is_of_a_gain() -> None:
    assert share_of_gain(2.0, 1.25, 1.0) == 0.75
    assert share_of_gain(2.0, 0.5, 1.0) == 1.5
    assert share_of_gain(2.0, 1.0, 2.0) is None and share_of_gain(2.0, 1.995, 1.99, least=0.02) is None
