"""Chat examples as token ids: the chat template, then the answer and its end mark, as a served model sees them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusion.data import ChatExample, Message
from fusion.layers import Batch, make_batches

END = "<|im_end|>"
QWEN2_SPLIT = (  # how Qwen2's tokenizer cuts text before BPE
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Encoded:
    """Token ids of a conversation; the answer, with its end mark, starts at `answer_start`."""

    ids: list[int]
    answer_start: int


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a checkpoint folder."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def prompt_text(tokenizer: Any, messages: Sequence[Message]) -> str:
    """The conversation in the model's chat template, up to where the assistant begins."""
    text: str = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    return text


def encode(tokenizer: Any, example: ChatExample, max_length: int | None = None) -> Encoded:
    """Ids of prompt, answer and end mark; the end of what exceeds `max_length` is cut."""
    prompt = tokenizer(prompt_text(tokenizer, example.prompt), add_special_tokens=False)["input_ids"]
    answer = tokenizer(example.answer + END, add_special_tokens=False)["input_ids"]
    return Encoded((prompt + answer)[:max_length], min(len(prompt), max_length or len(prompt)))


def encode_batches(
    tokenizer: Any,
    examples: Sequence[ChatExample],
    labels: Sequence[int] | None = None,
    max_length: int | None = None,
    batch_tokens: int = 4096,
) -> list[Batch]:
    """Examples as batches for the layer stream, each row labelled with its expert where `labels` are given."""
    encoded = [encode(tokenizer, example, max_length) for example in examples]
    return make_batches([e.ids for e in encoded], [e.answer_start for e in encoded], labels, batch_tokens)
