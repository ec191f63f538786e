"""Heals a merge of drifted experts: its attention, norms and gates learn, end to end, to serve every expert.

    qwen-fusion heal RECIPE      # with a `heal:` section, after merge and train-gates

The experts' MLPs, the embeddings and the head stay as they were merged; BTX (Sukhbaatar et al., 2024, arXiv:2403.07816)
trains attention and router that way. Each row is learnt as its own domain's expert sees it (forward KL to its likeliest
tokens at every answer token), attention through LoRA that is merged back, gates by the straight-through gradient of
fusion/router.py. The step with the least held-out answer loss is kept, the merge as it was being step 0. The files
that change are kept beside the fused model as the merge left them: `merge`, `train-gates`, and a recipe without the
section put them back.
"""

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fusion import training
from fusion.architecture import part_of
from fusion.branch import ATTENTION_PARTS, judge
from fusion.checkpoint import Checkpoint, weight_stamps
from fusion.data import ChatExample, choosing_rows, load_examples, trained_on
from fusion.encoding import load_tokenizer
from fusion.errors import UserError
from fusion.evaluation.intervals import share_of_gain
from fusion.healed import write_healed
from fusion.layers import checkpoint_gates
from fusion.merge import checkpoint_dtype
from fusion.recipe import Recipe
from fusion.resumable import claim, noted, release
from fusion.router import TrainedRouter, train_routers, trained_gates
from fusion.sections.training import HealSettings
from fusion.sources import ModelSource, anchor_source, load_model, own_source
from fusion.teacher import Teacher

ROWS = ("anchor", "own_expert", "merged", "merged_labelled", "healed", "healed_labelled")
HEALED_PARTS = ("attention", "norms")

Judged = dict[str, dict[str, float]]  # {domain: {"loss": nats a held-out answer token, "score": 0 to 1}}


@dataclass(frozen=True)
class HealResult:
    """What healing cost and brought: `figures` by row of ROWS and domain.

    `labelled` rows send every token to its domain's expert, the others go by the gates. Losses of `curve` are means
    over domains under the gates; `tokens` are trained ones, prompts and answers, padding aside.
    """

    figures: dict[str, Judged]
    best_step: int
    steps: int
    tokens: int
    seconds: float
    curve: list[tuple[int, float]]

    def retained_share(self, row: str) -> float | None:
        """(L_anchor - L_row) / (L_anchor - L_own) in the mean over the domains whose own expert gains anything."""
        anchor, own = self.figures["anchor"], self.figures["own_expert"]
        found = (
            share_of_gain(anchor[name]["loss"], figures["loss"], own[name]["loss"])
            for name, figures in self.figures[row].items()
        )
        shares = [share for share in found if share is not None]
        return sum(shares) / len(shares) if shares else None

    def as_dict(self) -> dict[str, Any]:
        """The result as plain data."""
        return {**asdict(self), "retained_share": {row: self.retained_share(row) for row in ROWS}}


def heal(recipe: Recipe, folder: Path, kept: Path) -> HealResult:
    """Heals the fused checkpoint in `folder`, whose files as merged go to folder `kept`; returns the figures.

    An interrupted call goes on when it is made again. Raises UserError where data are missing, or a part that is to
    be trained does not fit into memory.
    """
    began, settings = time.monotonic(), recipe.heal or HealSettings()
    train, held_out = _data(recipe, settings)
    partial = folder.with_name(f".{folder.name}.heal")
    claim(partial, _fingerprint(folder, train, held_out, settings, recipe.routing))
    tokenizer, saved = load_tokenizer(folder), getattr(torch, checkpoint_dtype(folder))
    rows = _taught(recipe, settings, train, tokenizer, partial)
    figures = noted(partial / "before.json", lambda: _dense_figures(recipe, settings, held_out, tokenizer))

    model, routers = _trainable(recipe, folder, settings, saved)
    experts = {name: recipe.expert_of(name) for name in recipe.domains}

    def judged(labelled: bool) -> Judged:
        return _judged(model, tokenizer, held_out, settings, routers, experts if labelled else {})

    merged = noted(partial / "merged.json", lambda: {"merged": judged(False), "merged_labelled": judged(True)})
    figures = {**figures, **merged}
    limits = (_mean(figures["anchor"]), _mean(figures["own_expert"]))

    def held_out_loss() -> float:
        watched = _watched(held_out, settings)
        return _mean({n: {"loss": training.mean_loss(model, tokenizer, r, settings.batch_rows)} for n, r in watched})

    model.train()
    before, pad = round(_mean(figures["merged"]), 5), tokenizer.pad_token_id or 0
    done = training.train(model, rows, partial, settings, pad, before, held_out_loss, keep_start=True, limits=limits)
    model = model.merge_and_unload()
    tensors = _healed_tensors(model, saved)
    training.restore(model, tensors)  # judged is what is saved
    gates = trained_gates(model, saved)
    figures |= {"healed": judged(False), "healed_labelled": judged(True)}
    seconds = round(time.monotonic() - began, 1)
    result = HealResult(figures, done.best_step, settings.steps, done.tokens, seconds, done.curve)
    note = {"parts": [*HEALED_PARTS, "gates"], "best_step": done.best_step, "tokens": done.tokens}
    write_healed(recipe, folder, kept, tensors, gates, note)
    release(partial)
    return result


def markdown(result: Mapping[str, Any]) -> str:
    """The figures of `HealResult.as_dict` as a Markdown table: loss and score by domain before and after."""
    figures, names = result["figures"], list(result["figures"]["anchor"])
    lines = [
        f"Attention, norms and gates trained on {result['tokens']:,} tokens in {result['seconds']:.0f} s, best step "
        f"{result['best_step']} of {result['steps']}; held-out answer loss in nats a token; task score (`labelled`: "
        "every token to its domain's expert).",
        "",
        "| | " + " | ".join(names) + " | share of the gain by loss |",
        "| --- " * (len(names) + 2) + "|",
    ]
    for row in ROWS:
        cells = [f"{figures[row][name]['loss']:.3f}; {figures[row][name]['score']:.3f}" for name in names]
        share = result["retained_share"][row]
        cells.append("" if share is None else f"{share:.3f}")
        lines.append(f"| {row.replace('_', ' ')} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _data(recipe: Recipe, settings: HealSettings) -> tuple[dict[str, list[ChatExample]], dict[str, list[ChatExample]]]:
    """Training and held-out rows by domain, no prompt in both."""
    train, held_out = {}, {}
    for name, domain in recipe.domains.items():
        train[name] = load_examples(domain.train, name, settings.rows, settings.seed)
    seen = trained_on([row for rows in train.values() for row in rows])
    count = max(settings.held_out_rows, settings.score_rows)
    for name in recipe.domains:
        rows = choosing_rows(recipe, name, count, settings.seed + 1)
        held_out[name] = [row for row in rows if not seen(row)]
        if not held_out[name]:
            raise UserError(f"every held-out row of '{name}' is also in the training data: use another split or file")
    return train, held_out


def _taught(
    recipe: Recipe, settings: HealSettings, train: dict[str, list[ChatExample]], tokenizer: Any, partial: Path
) -> list[dict[str, Any]]:
    """All training rows with what each one's own expert makes of it, one expert in memory at a time."""
    taught = []
    for index, expert in enumerate(recipe.experts):
        examples = [row for name, rows in train.items() if recipe.expert_of(name) == index for row in rows]
        rows = training.fitting(tokenizer, examples, settings.max_length, "heal")
        source = own_source(recipe, expert)
        teacher = Teacher(source, settings.top_logits, anchor_source(recipe).folder, recipe.loading)
        teacher.teach(rows, partial / f"teacher-{expert.name}.safetensors", settings.batch_rows)
        taught += rows
    return taught


def _dense_figures(
    recipe: Recipe, settings: HealSettings, held_out: dict[str, list[ChatExample]], tokenizer: Any
) -> dict[str, Judged]:
    """Anchor on all domains, every own expert on those that it serves."""
    own: Judged = {}
    for index, expert in enumerate(recipe.experts):
        rows = {name: found for name, found in held_out.items() if recipe.expert_of(name) == index}
        own |= _judged(load_model(own_source(recipe, expert), "sdpa", recipe.loading), tokenizer, rows, settings)
    anchor = _judged(load_model(anchor_source(recipe), "sdpa", recipe.loading), tokenizer, held_out, settings)
    return {"anchor": anchor, "own_expert": {name: own[name] for name in anchor}}


def _judged(
    model: Any,
    tokenizer: Any,
    held_out: dict[str, list[ChatExample]],
    settings: HealSettings,
    routers: Sequence[TrainedRouter] = (),
    experts: Mapping[str, int] | None = None,
) -> Judged:
    """Loss and score by domain; each domain's tokens to the expert that `experts` names, or by the gates."""
    found = {}
    try:
        for name, rows in held_out.items():
            for router in routers:
                router.forced = (experts or {}).get(name)
            judged, watched = rows[: settings.score_rows], rows[: settings.held_out_rows]
            figures = judge(model, tokenizer, judged, watched, settings, name)
            found[name] = {key: figures[key] for key in ("loss", "score")}
    finally:
        for router in routers:
            router.forced = None
    return found


def _watched(held_out: dict[str, list[ChatExample]], settings: HealSettings) -> list[tuple[str, list[ChatExample]]]:
    return [(name, rows[: settings.held_out_rows]) for name, rows in held_out.items()]


def _mean(found: Judged) -> float:
    """The mean loss over domains."""
    return sum(figures["loss"] for figures in found.values()) / len(found)


def _trainable(
    recipe: Recipe, folder: Path, settings: HealSettings, saved: torch.dtype
) -> tuple[Any, list[TrainedRouter]]:
    """The fused model with gradients in LoRA on its attention, in its norms and in its gates, all in float32."""
    from peft import LoraConfig, get_peft_model

    fused = load_model(ModelSource("fused", folder), "sdpa", recipe.loading)  # which keeps packed rows apart
    fused.config.use_cache = False
    for name, parameter in fused.named_parameters():
        if ".mlp." not in name and parameter.device.type == "meta":
            raise UserError(f"'{name}' is to be healed but offloaded: raise loading.max_memory until every layer fits")
    routers = train_routers(fused, checkpoint_gates(Checkpoint(folder)), saved)
    rank = settings.lora_rank
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(ATTENTION_PARTS), task_type="CAUSAL_LM")
    torch.manual_seed(settings.seed)
    model = get_peft_model(fused, lora)
    for name, module in fused.named_modules():
        if name.endswith("norm"):
            module.weight.data = module.weight.data.float()
            module.weight.requires_grad = True
            module.register_forward_hook(lambda _, args, out: out.to(args[0].dtype))
    for router in routers:
        router.weight.requires_grad = True
    return model, routers


def _healed_tensors(model: Any, saved: torch.dtype) -> dict[str, torch.Tensor]:
    """Attention and norms of the merged model, by the checkpoint's names, as `saved` holds them."""
    return {
        name: parameter.detach().to("cpu", saved).contiguous()
        for name, parameter in model.named_parameters()
        if ".mlp." not in name and part_of(name) in HEALED_PARTS
    }


def _fingerprint(folder: Path, *parts: Any) -> str:
    """A hash of all that decides the steps."""
    return hashlib.sha256(repr((weight_stamps(folder), parts)).encode()).hexdigest()
