"""Everything a gate can be, side by side: the answer loss on held-out routing examples, domain by domain.

`labelled` sends every token to its label's expert: what perfect routing would give. `anchor` and `own expert` are the
models that the fused one is measured against; the gates' rows are the methods and mergekit's six modes, each with one
and with two experts a token.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from fusion.checkpoint import Checkpoint, read_json
from fusion.data import gate_rows
from fusion.encoding import load_tokenizer
from fusion.evaluation.answer_loss import answer_losses
from fusion.evaluation.baselines import embedding_gates, expert_prompts, hidden_gates, random_gates
from fusion.evaluation.intervals import share_of_gain
from fusion.layers import Gates, Route, forced, gated
from fusion.reader import Reader
from fusion.recipe import Recipe
from fusion.sources import anchor_source, base_source, expert_source, own_source
from gate_training.examples import RoutingData

LABELLED, ANCHOR, OWN = "labelled", "anchor", "own expert"
HIDDEN = "mergekit hidden, hidden_last"
MARGIN = 0.01  # nats; a retained share of less gain says nothing
Losses = dict[str, float]  # nats per held-out answer token by domain


def held_out_losses(
    folder: Path, data: RoutingData, gates: dict[str, Gates], top_k: int | None = None
) -> dict[str, Losses]:
    """The fused model's losses under each of `gates`, by name, with `top_k` (None: its own) experts a token."""
    checkpoint = Checkpoint(folder)
    k = top_k or checkpoint.config["num_experts_per_tok"]
    return {name: _losses(checkpoint, data, gated(found, k), f"{name}, top-{k}") for name, found in gates.items()}


def _losses(checkpoint: Checkpoint | Reader, data: RoutingData, route: Route, name: str) -> Losses:
    return answer_losses(checkpoint, data.held_out_batches(), data.domains, route, f"answer loss, {name}")


def references(recipe: Recipe, folder: Path, data: RoutingData) -> dict[str, Losses]:
    """The losses of ANCHOR, of OWN experts (as they were before any anchoring), and of perfect routing, LABELLED."""
    anchor = anchor_source(recipe)
    anchor_config = read_json(anchor.folder / "config.json")
    found = {ANCHOR: _losses(Reader(anchor), data, forced(0), ANCHOR)}
    own = dict(found[ANCHOR])
    for index, expert in enumerate(recipe.experts):
        source, served = own_source(recipe, expert), [n for n in own if recipe.expert_of(n) == index]
        if read_json(source.folder / "config.json").get("architectures") != anchor_config["architectures"]:
            source = expert_source(recipe, expert)  # a teacher of another architecture has no such layers to stream
        if served and (source.folder, source.adapter) != (anchor.folder, anchor.adapter):
            rows = [domain for domain in data.domains if domain in served]
            batches = data.held_out_batches({index})
            own |= answer_losses(Reader(source), batches, rows, forced(0), f"answer loss, {expert.name} alone")
    return {**found, OWN: own, LABELLED: _losses(Checkpoint(folder), data, forced(), LABELLED)}


def mergekit_gates(recipe: Recipe, folder: Path, modes: Sequence[str] | None = None) -> dict[str, Gates]:
    """mergekit's gates for the fused model in `folder`, by name; of `modes` alone where they are given."""
    settings, config, tokenizer = recipe.gate_training, Checkpoint(folder).config, load_tokenizer(folder)
    prompts, base = expert_prompts(recipe, gate_rows(recipe), tokenizer), base_source(recipe).folder
    made: dict[str, Callable[[], Gates]] = {
        "mergekit random": lambda: random_gates(config, settings.seed),
        "mergekit uniform_random": lambda: random_gates(config, settings.seed, uniform=True),
        "mergekit cheap_embed": lambda: embedding_gates(config, base, tokenizer, prompts),
        HIDDEN: lambda: hidden_gates(config, base, tokenizer, prompts),
        "mergekit hidden_avg": lambda: hidden_gates(config, base, tokenizer, prompts, average=True),
    }
    return {mode: made[mode]() for mode in modes or made}


def compared_name(gates: str, top_k: int) -> str:
    """What gates with `top_k` experts a token are called among all that is compared."""
    return f"{gates}, top-{top_k}"


def mean_loss(losses: Losses) -> float:
    """The mean over domains."""
    return sum(losses.values()) / len(losses)


def retained(losses: Losses, compared: dict[str, Losses]) -> Losses:
    """(anchor - fused) / (anchor - own expert) by domain, where the own expert is another model and gains by it."""
    shares = {
        name: share_of_gain(compared[ANCHOR][name], losses[name], own, MARGIN) for name, own in compared[OWN].items()
    }
    return {name: share for name, share in shares.items() if share is not None}
