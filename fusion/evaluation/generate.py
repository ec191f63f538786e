"""Greedy answers and answer losses of any causal language model, batched by length.

Used wherever a model is judged: a branch before and after its training, and the columns of the evaluation.

    python -m fusion.evaluation.generate MODEL "17+25="
"""

import sys
from collections.abc import Sequence
from typing import Any

import torch

from fusion.data import ChatExample, Message
from fusion.evaluation.scores import score
from fusion.progress import track


def _batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Indices in batches of like length, the longest first, so that a lack of memory shows at once."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


def _padded(rows: Sequence[Sequence[int]], value: int, left: bool) -> torch.Tensor:
    width = max(map(len, rows))
    filled = [[value] * (width - len(r)) + list(r) if left else list(r) + [value] * (width - len(r)) for r in rows]
    return torch.tensor(filled)  # (rows, width)


def prompt_ids(tokenizer: Any, prompt: list[Message]) -> list[int]:
    """Token ids of the messages under the chat template, up to where the answer begins."""
    return list(tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False))


def example_ids(tokenizer: Any, example: ChatExample) -> tuple[list[int], int]:
    """Token ids of the prompt, the answer and its end token, and how many of them are the prompt's."""
    prompt = prompt_ids(tokenizer, example.prompt)
    answer = tokenizer(example.answer, add_special_tokens=False)["input_ids"]
    return [*prompt, *answer, tokenizer.eos_token_id], len(prompt)


@torch.inference_mode()
def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[Message]],
    max_new_tokens: int = 256,
    batch_size: int = 16,
    description: str = "answers",
) -> list[str]:
    """Greedy answers to `prompts` (each a list of chat messages), in their order, without special tokens.

    Prompts of like length share a batch, padded on the left; a batch ends when all its answers have.
    """
    rows = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    answers = [""] * len(rows)
    was_training = model.training
    model.eval()
    for batch in track(_batches([len(r) for r in rows], batch_size), description, unit="batch"):
        chosen = [rows[i] for i in batch]
        ids = _padded(chosen, pad, left=True)  # (batch, longest prompt)
        mask = _padded([[1] * len(r) for r in chosen], 0, left=True)
        out = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            repetition_penalty=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=pad,
        )
        texts = tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
        for index, text in zip(batch, texts, strict=True):
            answers[index] = text
    model.train(was_training)
    return answers


def score_examples(
    model: Any,
    tokenizer: Any,
    examples: Sequence[ChatExample],
    max_new_tokens: int = 256,
    batch_size: int = 16,
    description: str = "task score",
) -> list[float]:
    """The task score (0 to 1) of the model's greedy answer to each example, in their order."""
    answers = generate(model, tokenizer, [e.prompt for e in examples], max_new_tokens, batch_size, description)
    return [score(answer, example) for answer, example in zip(answers, examples, strict=True)]


@torch.inference_mode()
def answer_losses(
    model: Any,
    tokenizer: Any,
    examples: Sequence[ChatExample],
    batch_size: int = 8,
    description: str = "answer loss",
) -> list[tuple[float, int]]:
    """Per example the summed loss in nats over its answer's tokens (the end token among them), and their number.

    The head runs on the answer's positions alone: at Qwen's vocabulary it costs as much as the layers do.
    """
    encoded = [example_ids(tokenizer, example) for example in examples]
    losses = [(0.0, 0)] * len(encoded)
    body, head = model.base_model if hasattr(model, "lm_head") else model.get_decoder(), model.get_output_embeddings()
    was_training = model.training
    model.eval()
    for batch in track(_batches([len(ids) for ids, _ in encoded], batch_size), description, unit="batch"):
        rows = [encoded[i][0] for i in batch]
        ids = _padded(rows, 0, left=False).to(model.device)  # (batch, longest row)
        mask = _padded([[1] * len(r) for r in rows], 0, left=False).to(model.device)
        states = body(input_ids=ids, attention_mask=mask).last_hidden_state  # (batch, longest row, hidden)
        for row, index in enumerate(batch):
            tokens, start = encoded[index]
            logits = head(states[row, start - 1 : len(tokens) - 1]).float()  # (answer tokens, vocabulary)
            wanted = ids[row, start : len(tokens)]
            loss = torch.nn.functional.cross_entropy(logits, wanted, reduction="sum")
            losses[index] = (float(loss), len(wanted))
    model.train(was_training)
    return losses


if __name__ == "__main__":
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path, question = sys.argv[1:3]
    print(
        *generate(
            AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32),
            AutoTokenizer.from_pretrained(path),
            [[{"role": "user", "content": question}]],
        )
    )
