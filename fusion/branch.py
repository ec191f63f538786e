"""Trains an expert from the anchor on one domain's rows: the "branch" of Branch-Train-Mix.

    qwen-fusion branch configs/qwen2.5-0.5b-two-experts.yaml

`trainable: mlp` makes an anchored expert, bit-identical to the anchor outside its MLPs; `trainable: all` a drifted
one; `lora_rank` a PEFT adapter on the same parts. transformers' Trainer does the steps: AdamW with warm-up and cosine
decay, loss on answer tokens alone, rows packed into sequences in which none sees another. The step with the best
held-out loss is kept, and the expert is then judged by its task score beside the anchor's.
"""

import hashlib
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from fusion import training
from fusion.architecture import MLP_PARTS
from fusion.checkpoint import Checkpoint, put_in_place, read_json, write_json
from fusion.data import ChatExample
from fusion.errors import UserError
from fusion.evaluation.generate import answer_examples, answer_losses
from fusion.evaluation.scores import score
from fusion.progress import console
from fusion.recipe import BranchSettings, HealSettings
from fusion.teacher import Teacher

ATTENTION_PARTS = ("q_proj", "k_proj", "v_proj", "o_proj")
RESULT = "branch.json"
COPIED = (".json", ".jinja", ".txt", ".model")  # config, tokenizer, template


@dataclass(frozen=True)
class TrainResult:
    """What a branch cost and what it brought; losses in nats per held-out answer token, scores from 0 to 1."""

    loss_before: float
    loss_after: float
    score_before: float
    score_after: float
    score_name: str
    best_step: int
    steps: int
    tokens: int  # trained, prompts and answers, padding aside
    seconds: float
    curve: list[tuple[int, float]]  # (step, held-out loss)


def train_expert(
    start: Path,
    out: Path,
    train: Sequence[ChatExample],
    held_out: Sequence[ChatExample],
    settings: BranchSettings,
    layers: Sequence[int] | None = None,
    general: Sequence[ChatExample] = (),
    teacher: Teacher | None = None,
) -> TrainResult:
    """Trains the model in folder `start` on `train` and writes the expert to folder `out`, with `branch.json`.

    `layers` restricts what is trained to these decoder layers. With a `teacher` the answers are learnt as it sees
    them, and an adapter is merged into the result. `general` rows are mixed in until they are
    `settings.general_share` of all. The first `held_out_rows` of `held_out` pick the best step, the first
    `score_rows` judge the result. An interrupted call goes on from its last evaluation when it is made again.
    Raises UserError where a row is too long, a layer does not exist, or the expert scores no better than `start`.
    """
    began = time.monotonic()
    partial = out.with_name(f".{out.name}.branch")
    decisive = settings.model_copy(update={"allow_no_gain": False})
    training.claim(partial, _fingerprint(start, train, held_out, general, decisive, layers, teacher))
    tokenizer = AutoTokenizer.from_pretrained(start)
    rows = training.fitting(tokenizer, _mixed(train, general, settings), settings.max_length, "branch")
    if teacher is not None:
        teacher.teach(rows, partial / "teacher.safetensors", settings.batch_rows)
    model = trainable_model(start, settings, layers)
    judged, watched = held_out[: settings.score_rows], held_out[: settings.held_out_rows]

    before_file = partial / "before.json"
    if not before_file.is_file():
        write_json(before_file, judge(model, tokenizer, judged, watched, settings, "anchor"))
    before = read_json(before_file)

    trained = training.train(
        model,
        rows,
        partial,
        settings,
        tokenizer.pad_token_id or 0,
        before["loss"],
        lambda: _mean_loss(model, tokenizer, watched, settings),
        torch.float32 if settings.lora_rank else _saved_dtype(start),
    )
    after = judge(model, tokenizer, judged, watched, settings, "expert")
    result = TrainResult(
        loss_before=before["loss"],
        loss_after=after["loss"],
        score_before=before["score"],
        score_after=after["score"],
        score_name=judged[0].score if judged else "",
        best_step=trained.best_step,
        steps=settings.steps,
        tokens=trained.tokens,
        seconds=round(time.monotonic() - began, 1),
        curve=trained.curve,
    )
    if after["score"] <= before["score"] and not settings.allow_no_gain:
        raise UserError(
            f"expert {out.name} scores {after['score']:.3f} on held-out {result.score_name}, no better than its "
            f"start's {before['score']:.3f} (loss {before['loss']:.3f} -> {after['loss']:.3f}): change its data or "
            "steps, or set branch.allow_no_gain"
        )
    if teacher is not None and settings.lora_rank:
        model = model.merge_and_unload()
        for name, parameter in model.named_parameters():
            parameter.requires_grad = ".mlp." in name
    _write(model, start, out, partial, {**asdict(result), "settings": settings.model_dump(mode="json")})
    return result


def _mixed(train: Sequence[ChatExample], general: Sequence[ChatExample], settings: BranchSettings) -> list[ChatExample]:
    share = settings.general_share
    if share and not general:
        raise UserError(f"branch.general_share is {share} but there are no general rows: give the general domain data")
    wanted = round(len(train) * share / (1 - share))
    if len(general) < wanted:
        console.print(f"  {len(general)} general rows are fewer than the {wanted} of branch.general_share {share}")
    return [*train, *general[:wanted]]


def trainable_model(start: Path, settings: BranchSettings, layers: Sequence[int] | None) -> Any:
    """The anchor in float32, with gradients only where the expert may differ from it."""
    gpu = torch.cuda.is_available()
    dtype = torch.bfloat16 if gpu and settings.lora_rank else torch.float32
    model = AutoModelForCausalLM.from_pretrained(
        start,
        dtype=dtype,
        attn_implementation="sdpa",  # keeps packed rows apart by their positions; flash-attn would want one sequence
        device_map="auto" if gpu else None,
        use_safetensors=True,
    )
    model.config.use_cache = False
    count = model.config.num_hidden_layers
    if layers is not None and not all(0 <= layer < count for layer in layers):
        raise UserError(f"routing.moe_layers {list(layers)} names a layer that {start} does not have: 0 to {count - 1}")
    mlp_alone = settings.trainable == "mlp"
    if settings.lora_rank:
        from peft import LoraConfig, get_peft_model

        lora = LoraConfig(
            r=settings.lora_rank,
            lora_alpha=2 * settings.lora_rank,
            target_modules=list(MLP_PARTS if mlp_alone else MLP_PARTS + ATTENTION_PARTS),
            layers_to_transform=None if layers is None else list(layers),
            task_type="CAUSAL_LM",
        )
        return get_peft_model(model, lora)
    within = None if layers is None else tuple(f"model.layers.{layer}." for layer in layers)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = (not mlp_alone or ".mlp." in name) and (within is None or name.startswith(within))
    return model


def _mean_loss(model: Any, tokenizer: Any, rows: Sequence[ChatExample], settings: BranchSettings) -> float:
    return training.per_token(answer_losses(model, tokenizer, rows, settings.batch_rows))


def judge(
    model: Any,
    tokenizer: Any,
    judged: Sequence[ChatExample],
    watched: Sequence[ChatExample],
    settings: BranchSettings | HealSettings,
    who: str,
) -> dict[str, float]:
    """The task score of `judged`, from 0 to 1, and the answer loss of `watched`, which begin alike, in nats a token."""
    answers = answer_examples(model, tokenizer, judged, settings.max_new_tokens, 32, f"task score, {who}")
    scores = [score(answer.text, row) for answer, row in zip(answers, judged, strict=True)]
    losses = [(answer.nats, answer.tokens) for answer in answers[: len(watched)]]
    losses += answer_losses(model, tokenizer, watched[len(losses) :], settings.batch_rows)
    return {"score": sum(scores) / max(1, len(scores)), "loss": training.per_token(losses)}


def _saved_dtype(start: Path) -> torch.dtype:
    """The type in which the anchor holds its weights, and the expert will."""
    return Checkpoint(start).tensor("model.layers.0.mlp.down_proj.weight").dtype


def _write(model: Any, start: Path, out: Path, partial: Path, record: dict[str, Any]) -> None:
    """Writes the adapter, or the anchor's files with the trained tensors in the place of its own."""
    folder = partial / "out"
    folder.mkdir(exist_ok=True)
    if hasattr(model, "peft_config"):
        model.peft_config["default"].base_model_name_or_path = str(start)
        model.save_pretrained(str(folder))
        (folder / "README.md").unlink(missing_ok=True)
    else:
        write_full(model, start, folder)
    write_json(folder / RESULT, record)
    put_in_place(folder, out)
    shutil.rmtree(partial, ignore_errors=True)


def write_full(model: Any, start: Path, folder: Path) -> None:
    checkpoint = Checkpoint(start)
    tied = dict(model.named_parameters(remove_duplicate=False))  # the head too, where it is the embedding
    for file in sorted(set(checkpoint.weight_map.values())):
        names = [name for name, where in checkpoint.weight_map.items() if where == file]
        tensors = {name: checkpoint.tensor(name) for name in names}
        for name in names:
            if name in tied and tied[name].requires_grad:
                tensors[name] = tied[name].detach().to("cpu", tensors[name].dtype).contiguous()
        save_file(tensors, folder / file, metadata={"format": "pt"})
    for path in sorted(start.iterdir()):
        if path.is_file() and path.suffix in COPIED and path.name not in (RESULT, "README.md"):
            shutil.copy(path, folder / path.name)


def _fingerprint(start: Path, *parts: Any) -> str:
    """A hash of all that decides the training, so that a changed call starts anew instead of going on."""
    config = (start / "config.json").read_text(encoding="utf-8")
    weights = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(start.glob("*.safetensors"))]
    return hashlib.sha256(repr((config, weights, parts)).encode()).hexdigest()
