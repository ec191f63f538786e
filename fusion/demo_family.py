"""The demo family's common start: a small tokenizer and a Qwen2 model trained from scratch on generated text.

    qwen-fusion branch configs/demo.yaml

calls `pretrain_anchor` where the recipe's anchor has a `pretrain` section, and then branches the experts from it.
Two to four million parameters each are enough to show routing, and minutes on two CPU cores are enough to train them.
"""

import math
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch.multiprocessing.spawn import ProcessExitedException, start_processes
from torch.nn.parallel import DistributedDataParallel
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from fusion.checkpoint import put_in_place, read_json, write_json
from fusion.data import load_examples
from fusion.encoding import QWEN2_SPLIT
from fusion.errors import UserError
from fusion.packing import answer_loss, pack, training_row
from fusion.progress import progress_bar
from fusion.sections.training import DEMO_ROPE_THETA, PretrainSettings
from fusion.tasks.demo import vocabulary
from fusion.workers import one_thread, worker_context

END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
PACKED = 256  # tokens a packed sequence
WARMUP = 0.05  # of the steps
RESULT, RENDEZVOUS = "pretrain.json", "rendezvous"
# A worker's models, until its process ends: what destroys one holds the GIL and waits for gloo's thread, which may wait
# for the GIL to drop its last all-reduce.
_KEPT: list[DistributedDataParallel] = []


def build_tokenizer(out: Path, vocab_size: int, max_length: int) -> PreTrainedTokenizerFast:
    """Saves to folder `out` a byte-level BPE tokenizer with Qwen2's splitting rule, special tokens and chat form.

    The values of the demo tasks come first in the merges, so that "Ann" is the same token in "name: Ann;" and in
    {"name": "Ann"}: that is what lets a model this small copy it. The template adds no system prompt of its own.
    """
    values, prose = vocabulary()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, IM_START, IM_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*values * 10 * len(prose), *prose], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=IM_END,
        pad_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        extra_special_tokens=[IM_START],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=max_length,
    )
    fast.save_pretrained(out)
    return fast


def anchor_config(settings: PretrainSettings, tokenizer: PreTrainedTokenizerFast) -> Qwen2Config:
    """The shape of the family: Qwen2 with tied embeddings; vLLM on CPUs takes no head_dim below 32."""
    return Qwen2Config(
        vocab_size=-(-len(tokenizer) // 64) * 64,  # a multiple that tensor parallelism divides
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.num_hidden_layers,
        num_attention_heads=settings.num_attention_heads,
        num_key_value_heads=settings.num_key_value_heads,
        max_position_embeddings=settings.max_position_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": DEMO_ROPE_THETA},
        tie_word_embeddings=True,
        initializer_range=0.04,
        dtype="float32",
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def pretrain_anchor(out: Path, settings: PretrainSettings) -> dict[str, Any]:
    """Trains a model from scratch on the answers of `settings.data` and writes its folder `out` when it is complete.

    `settings.workers` processes of one thread each share every batch (DistributedDataParallel over gloo). Returns the
    parameter count, the tokens trained (prompts included) and the mean loss of the last tenth of the steps in nats an
    answer token. The same settings give the same model on the same machine.
    """
    partial = out.with_name(f".{out.name}.pretrain")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    method = worker_context().get_start_method()
    tokenizer = build_tokenizer(partial, settings.vocab_size, settings.max_position_embeddings)
    examples = load_examples(settings.data, "anchor", settings.rows, settings.seed)
    rows = [training_row(tokenizer, example) for example in examples]
    try:
        start_processes(_pretrain_worker, (partial, settings, rows), settings.workers, start_method=method)
    except ProcessExitedException as error:
        raise UserError(f"a pretraining worker was killed ({error}), as a rule for want of memory") from error
    result = read_json(partial / RESULT)
    (partial / RENDEZVOUS).unlink(missing_ok=True)
    put_in_place(partial, out)
    return result


def _pretrain_worker(rank: int, partial: Path, settings: PretrainSettings, rows: list[dict[str, Any]]) -> None:
    """One of the processes: its share of every batch's rows, gradients averaged over all."""
    one_thread(bars=rank == 0)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    rendezvous = f"file://{(partial / RENDEZVOUS).absolute()}"
    torch.distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=settings.workers)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(partial)
    torch.manual_seed(settings.seed)
    model = Qwen2ForCausalLM(anchor_config(settings, tokenizer)).train()
    parallel = DistributedDataParallel(_AnswerLoss(model), gradient_as_bucket_view=True)
    _KEPT.append(parallel)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=0.01, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step / settings.steps))
    losses: list[float] = []
    trained = 0
    with progress_bar() as bar:
        task = bar.add_task("training the anchor", total=settings.steps, unit="step")
        for chosen in _batches(rows, settings):
            chosen.sort(key=lambda row: len(row["input_ids"]))  # the same work for each
            loss = parallel(pack(chosen[rank :: settings.workers], PACKED, tokenizer.pad_token_id))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            trained += sum(len(row["input_ids"]) for row in chosen)
            bar.update(task, advance=1, description=f"training the anchor, loss {losses[-1]:.3f}")
    if rank == 0:
        model.generation_config = GenerationConfig(
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=False
        )
        model.eval().save_pretrained(partial)
        last = losses[-max(1, len(losses) // 10) :]
        write_json(
            partial / RESULT, {"parameters": model.num_parameters(), "tokens": trained, "loss": sum(last) / len(last)}
        )
    torch.distributed.destroy_process_group()


def _rate(done: float) -> float:
    """Warm-up, then a cosine down to a twentieth; `done` is the share of the steps done."""
    return min(1.0, (done + 1e-3) / WARMUP) * (0.05 + 0.95 * (1 + math.cos(math.pi * done)) / 2)


def _batches(rows: list[dict[str, Any]], settings: PretrainSettings) -> Iterator[list[dict[str, Any]]]:
    rng = random.Random(settings.seed)
    order: list[int] = []
    for _ in range(settings.steps):
        if len(order) < settings.batch_rows:
            order = rng.sample(range(len(rows)), len(rows)) + order
        batch, order = order[-settings.batch_rows :], order[: -settings.batch_rows]
        yield [rows[i] for i in batch]


class _AnswerLoss(torch.nn.Module):
    """The mean loss of a packed batch's answer tokens, as the forward pass that DistributedDataParallel wraps."""

    def __init__(self, model: Qwen2ForCausalLM):
        super().__init__()
        self.model = model

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        loss, answers = answer_loss(self.model, batch)
        return loss / answers
