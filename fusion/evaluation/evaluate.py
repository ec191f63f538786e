"""Evaluate: one table of anchor, own experts and the fused model under random, mergekit `hidden` and trained gates.

    qwen-fusion evaluate configs/demo.yaml
    qwen-fusion evaluate configs/demo.yaml --json -

Task scores and answer losses come from whole models, one in memory at a time; the routing from the layer stream. What
is found of a model is kept as it comes: an interrupted call goes on with the next one.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from fusion.checkpoint import Checkpoint, file_hash, read_json, weight_stamps
from fusion.contamination import check, trained_rows
from fusion.data import ChatExample, gate_rows, load_examples, trained_on
from fusion.drift import as_plain, moved_by_group
from fusion.encoding import encode_batches, load_tokenizer
from fusion.errors import UserError
from fusion.evaluation.answer_loss import answer_losses
from fusion.evaluation.baselines import expert_prompts, hidden_gates, random_gates
from fusion.evaluation.generate import answer_examples
from fusion.evaluation.intervals import difference, mean_interval, retained_share
from fusion.evaluation.scores import score
from fusion.layers import Gates, checkpoint_gates, forced, gated, gates_hash
from fusion.progress import console
from fusion.recipe import Recipe
from fusion.resumable import claim, noted, release
from fusion.router import place_gates
from fusion.sections.evaluation import Evaluation
from fusion.served import routed_weight
from fusion.sources import (
    ANCHORING_NOTE,
    ModelSource,
    anchor_source,
    anchored_expert,
    base_source,
    expert_source,
    load_model,
    original_source,
    own_source,
)

ROWS = ("anchor", "own_expert", "fused_random", "fused_hidden", "fused_trained")


@dataclass
class Figures:
    """One model on one domain's held-out rows: of each row its task score, and summed nats of its answer's tokens."""

    scores: list[float] = field(default_factory=list)
    nats: list[float] = field(default_factory=list)
    tokens: list[float] = field(default_factory=list)

    def first(self, count: int) -> float:
        """The loss of the first `count` rows, in nats a token."""
        return sum(self.nats[:count]) / max(1.0, sum(self.tokens[:count]))

    def as_dict(self) -> dict[str, Any]:
        """Means with 95% intervals."""
        score_, loss = mean_interval(self.scores), mean_interval(self.nats, self.tokens)
        return {
            "score": score_.value,
            "score_interval": score_.as_list(),
            "loss": loss.value,
            "loss_interval": loss.as_list(),
            "rows": len(self.scores),
        }


def evaluate(recipe: Recipe) -> dict[str, Any]:
    """All figures of the recipe's fused model as plain data (the form is in the README).

    Raises UserError where a model or data set is missing.
    """
    settings = recipe.evaluation
    folder, anchor = recipe.fused, anchor_source(recipe)
    experts = [own_source(recipe, expert) for expert in recipe.experts]
    checkpoint, tokenizer = Checkpoint(folder), load_tokenizer(folder)
    names = sorted(recipe.domains, key=recipe.expert_of)  # in the experts' order, as the pictures show them
    extra = _extra(recipe)
    held_out = _held_out(recipe, names)
    fitted_on = gate_rows(recipe)
    _leave_out_trained(recipe, held_out | extra)
    prompts = expert_prompts(recipe, fitted_on, tokenizer)
    gates = {
        "fused_random": random_gates(checkpoint.config, recipe.gate_training.seed),
        "fused_hidden": hidden_gates(checkpoint.config, base_source(recipe).folder, tokenizer, prompts),
        "fused_trained": checkpoint_gates(checkpoint),
    }

    figures: dict[str, dict[str, Figures]] = {row: {} for row in ROWS}
    scored = held_out | extra
    aside = recipe.folder / ".evaluation"
    claim(aside, _fingerprint([anchor, *experts, ModelSource("fused", folder)], gates, scored, settings))

    def score_of(source: ModelSource, wanted: dict[str, list[ChatExample]]) -> dict[str, Figures]:
        model = load_model(source, recipe.attn_implementation, recipe.loading)
        return _score_model(recipe, model, tokenizer, wanted, source.name)

    figures["anchor"] = _kept(aside / "anchor.json", lambda: score_of(anchor, scored))
    cross: dict[str, dict[str, float]] = {}
    for index, (expert, source) in enumerate(zip(recipe.experts, experts, strict=True)):
        own = {n: rows for n, rows in scored.items() if n in held_out and recipe.expert_of(n) == index}
        wanted = scored if settings.cross_domains else own
        same = source.folder == anchor.folder and source.adapter is None
        if same:
            found = {name: figures["anchor"][name] for name in wanted}
        else:
            found = _kept(aside / f"expert-{expert.name}.json", partial(score_of, source, wanted))
        figures["own_expert"].update({name: found[name] for name in own})
        cross[expert.name] = {name: mean_interval(f.scores).value for name, f in found.items()}
    fewer = {name: rows[: settings.baseline_rows] for name, rows in held_out.items()}
    fused = cache(lambda: load_model(ModelSource("fused", folder), recipe.attn_implementation, recipe.loading))

    def score_with(name: str) -> dict[str, Figures]:
        place_gates(fused(), gates[name])
        return _score_model(recipe, fused(), tokenizer, scored if name == "fused_trained" else fewer, name)

    for name in gates:
        figures[name] = _kept(aside / f"{name}.json", partial(score_with, name))
    fused.cache_clear()

    ways = _ways(recipe, figures, fewer, tokenizer, checkpoint)
    routing = _routing(recipe, held_out, tokenizer, checkpoint)
    domains = {name: _domain(figures, name, recipe, rows[0].score) for name, rows in held_out.items()}
    shares = [d["retained_share"] for d in domains.values() if d["retained_share"] is not None]
    release(aside)
    return {
        "recipe": recipe.name,
        "code": code_hash(),
        "domains": domains,
        "mean_retained_share": sum(shares) / len(shares) if shares else None,
        "worst_retained_share": min(shares) if shares else None,
        "mean_scores": _mean_scores(figures, fewer),
        "extra": {name: _extra_task(figures, name) for name in extra},
        "experts_by_domain": cross,
        "ways": ways,
        "moved": {e.name: as_plain(moved_by_group(anchor, original_source(recipe, e))) for e in recipe.experts},
        "moved_anchored": {
            e.name: as_plain(moved_by_group(anchor, expert_source(recipe, e))) for e in recipe.experts if e.anchor
        },
        "anchoring": {
            e.name: read_json(anchored_expert(recipe, e) / ANCHORING_NOTE) for e in recipe.experts if e.anchor
        },
        "routing": routing,
    }


def _ways(
    recipe: Recipe,
    figures: dict[str, dict[str, Figures]],
    rows: dict[str, list[ChatExample]],
    tokenizer: Any,
    checkpoint: Checkpoint,
) -> dict[str, dict[str, float]]:
    """Answer losses by domain of anchor, own expert and the fused model along other ways, on the baselines' rows.

    `labelled` is perfect routing, every token to its domain's expert; `top-1` and `top-2` are the trained gates.
    """
    domains = [name for name, examples in rows.items() for _ in examples]
    labels = [recipe.expert_of(name) for name in domains]
    batches = encode_batches(tokenizer, [row for examples in rows.values() for row in examples], labels)
    gates, served = checkpoint_gates(checkpoint), f"top-{checkpoint.config['num_experts_per_tok']}"
    known = {"anchor": "anchor", "own_expert": "own_expert", served: "fused_trained"}
    routes = {"labelled": forced(), "top-1": gated(gates, 1)}
    if len(recipe.experts) > 1:
        routes["top-2"] = gated(gates, 2)
    found: dict[str, dict[str, float]] = {}
    for way in ("anchor", "own_expert", *routes):
        if way in known:
            found[way] = {name: figures[known[way]][name].first(len(examples)) for name, examples in rows.items()}
        else:
            found[way] = answer_losses(checkpoint, batches, domains, routes[way], f"answer loss, {way}")
    return found


def _domain(figures: dict[str, dict[str, Figures]], name: str, recipe: Recipe, score_name: str) -> dict[str, Any]:
    """The table rows of one domain, with what the trained gates retained of the own expert's gain."""
    rows = {row: figures[row][name] for row in ROWS}
    anchor, own, fused = rows["anchor"], rows["own_expert"], rows["fused_trained"]
    share = retained_share(anchor.scores, fused.scores, own.scores)
    negative = [[-nats for nats in figure.nats] for figure in (anchor, fused, own)]
    by_loss = retained_share(*negative)
    own_mean = mean_interval(own.scores).value
    return {
        **{row: figure.as_dict() for row, figure in rows.items()},
        "expert": recipe.experts[recipe.expert_of(name)].name,
        "score_name": score_name,
        "retained_share": share.value if share else None,
        "retained_share_interval": share.as_list() if share else None,
        "retained_share_by_loss": by_loss.value if by_loss else None,
        "retained_share_by_loss_interval": by_loss.as_list() if by_loss else None,
        "share_of_own_score": mean_interval(fused.scores).value / own_mean if own_mean else None,
        "score_minus_own": difference(fused.scores, own.scores).__dict__,
        "loss_minus_own": difference(fused.nats, own.nats, own.tokens).__dict__,
    }


def _extra_task(figures: dict[str, dict[str, Figures]], name: str) -> dict[str, Any]:
    """The columns that a task without an expert of its own has, and what fusing changed against the anchor."""
    fused, anchor = figures["fused_trained"][name], figures["anchor"][name]
    return {
        **{row: figures[row][name].as_dict() for row in ROWS if name in figures[row]},
        "score_minus_anchor": difference(fused.scores, anchor.scores).__dict__,
    }


def held_out_rows(recipe: Recipe, names: Sequence[str]) -> dict[str, list[ChatExample]]:
    """The rows that domains `names` are scored on, less those that an expert or the gates were trained on."""
    rows = _held_out(recipe, names)
    _leave_out_trained(recipe, rows)
    return rows


def _held_out(recipe: Recipe, names: Sequence[str]) -> dict[str, list[ChatExample]]:
    settings = recipe.evaluation
    return {n: load_examples(recipe.domains[n].held_out, n, settings.rows, settings.seed) for n in names}


def _extra(recipe: Recipe) -> dict[str, list[ChatExample]]:
    """The rows of evaluation.extra; optional sources that cannot be had are left out with a note."""
    found = {}
    for name, source in recipe.evaluation.extra.items():
        try:
            found[name] = load_examples(source, name, recipe.evaluation.rows, recipe.evaluation.seed)
        except UserError as error:
            if not source.optional:
                raise
            console.print(f"  left out: {error}", highlight=False, soft_wrap=True)
    return found


def _leave_out_trained(recipe: Recipe, held_out: dict[str, list[ChatExample]]) -> None:
    """Takes out of the rows to be scored, with a note, those that an expert, the gates or a healing were trained on.

    Raises UserError where that leaves none, or where rows share more words with those than the recipe allows.
    """
    seen = trained_on(trained_rows(recipe))
    public = {n: [row.question for row in rows] for n, rows in held_out.items() if not _is_generated(recipe, n)}
    contaminated = check(recipe, public)
    for name, rows in held_out.items():
        numbers = set(contaminated.get(name, ()))
        kept = [row for number, row in enumerate(rows) if number not in numbers and not seen(row)]
        if not kept:
            raise UserError(f"every held-out row of '{name}' is also in the training data: use another split or file")
        if len(kept) < len(rows):
            console.print(f"  {len(rows) - len(kept)} rows of {name} left out: they were trained on", highlight=False)
            rows[:] = kept


def _is_generated(recipe: Recipe, name: str) -> bool:
    """Whether the rows of a domain, or of an extra task, are generated."""
    source = recipe.domains[name].held_out if name in recipe.domains else recipe.evaluation.extra[name]
    return all(part.generated for part in source.parts or (source,))


def _kept(note: Path, make: Callable[[], dict[str, Figures]]) -> dict[str, Figures]:
    """What `make` finds of a model, made once and kept in file `note`."""
    found = noted(note, lambda: {task: asdict(figures) for task, figures in make().items()})
    return {task: Figures(**figures) for task, figures in found.items()}


def _fingerprint(
    sources: Sequence[ModelSource],
    gates: Mapping[str, Gates],
    examples: dict[str, list[ChatExample]],
    settings: Evaluation,
) -> str:
    """A hash of all that decides the models' figures, so that a changed call starts anew instead of going on."""
    stamps = [weight_stamps(path) for source in sources for path in source.paths]
    hashes = {name: gates_hash(found) for name, found in gates.items()}
    return hashlib.sha256(repr((code_hash(), stamps, hashes, examples, settings)).encode()).hexdigest()


def _score_model(
    recipe: Recipe, model: Any, tokenizer: Any, examples: dict[str, list[ChatExample]], name: str
) -> dict[str, Figures]:
    """Greedy answers to the rows of all domains that have the same limit at once, scored."""
    settings = recipe.evaluation
    own = {task: source.max_new_tokens for task, source in settings.extra.items()}
    flat = [(task, row) for task, rows in examples.items() for row in rows]
    limits = [own.get(task) or settings.max_new_tokens for task, _ in flat]
    rows = [row for _, row in flat]
    figures = {task: Figures() for task in examples}
    answers = answer_examples(model, tokenizer, rows, limits, settings.batch_rows, f"answers of {name}")
    for (task, row), answer in zip(flat, answers, strict=True):
        found = figures[task]
        found.scores.append(score(answer.text, row))
        found.nats.append(answer.nats)
        found.tokens.append(answer.tokens)
    return figures


def _routing(
    recipe: Recipe, held_out: dict[str, list[ChatExample]], tokenizer: Any, checkpoint: Checkpoint
) -> dict[str, Any]:
    """The share of each domain's answer tokens, and of all its tokens, that the trained gates give to each expert."""
    flat = [(list(held_out).index(name), row) for name, rows in held_out.items() for row in rows]
    batches = encode_batches(
        tokenizer,
        [row for _, row in flat],
        max_length=recipe.gate_training.max_length,
        batch_tokens=recipe.gate_training.batch_tokens,
    )
    by_row = routed_weight(checkpoint, batches, len(recipe.experts), "routing")  # (2, rows, experts)
    weights = torch.zeros(2, len(held_out), len(recipe.experts))
    weights.index_add_(1, torch.tensor([domain for domain, _ in flat]), by_row)  # (2, domains, experts)
    shares = weights / weights.sum(dim=2, keepdim=True).clamp_min(1e-9)
    tables = [dict(zip(held_out, kind.tolist(), strict=True)) for kind in shares]
    names = [expert.name for expert in recipe.experts]
    return {"experts": names, "answer_tokens": tables[0], "all_tokens": tables[1]}


def _mean_scores(figures: dict[str, dict[str, Figures]], fewer: dict[str, list[ChatExample]]) -> list[dict[str, Any]]:
    """Means over domains of every column's score: those that have all rows, then all columns on the baselines' rows."""
    every = {name: len(figures["anchor"][name].scores) for name in fewer}
    first = {name: len(rows) for name, rows in fewer.items()}

    def mean(column: str, rows: dict[str, int]) -> float:
        return sum(sum(figures[column][name].scores[:count]) / count for name, count in rows.items()) / len(rows)

    def has(column: str, rows: dict[str, int]) -> bool:
        return all(len(figures[column][name].scores) >= count for name, count in rows.items())

    counts = [every] if every == first else [every, first]
    return [{"rows": rows, "scores": {c: mean(c, rows) for c in ROWS if has(c, rows)}} for rows in counts]


def code_hash() -> str:
    """A hash of the code that figures come from: all modules of fusion and gate_training."""
    root = Path(__file__).parents[2]
    files = [path for package in ("fusion", "gate_training") for path in sorted((root / package).rglob("*.py"))]
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.relative_to(root)} {file_hash(path)}\n".encode())
    return digest.hexdigest()


def result_path(recipe: Recipe) -> Path:
    """Where `evaluate` leaves its figures."""
    return recipe.folder / "evaluation.json"
