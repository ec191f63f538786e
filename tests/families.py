"""Tiny random Qwen2 models with a byte-level tokenizer and a ChatML template, made in a second, for tests that need a
model but not a skill."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, plus the ChatML marks."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=TEMPLATE
    )


def config(**changes: Any) -> Qwen2Config:
    """A Qwen2 config of about 100,000 parameters; `changes` override its fields."""
    tokenizer = byte_tokenizer()
    settings: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-6,
        "eos_token_id": tokenizer.convert_tokens_to_ids("<|im_end|>"),
        "pad_token_id": tokenizer.convert_tokens_to_ids("<|endoftext|>"),
        "bos_token_id": None,
        "dtype": "float32",
        "initializer_range": 0.15,
    }
    return Qwen2Config(**{**settings, **changes})


def write_model(folder: Path, seed: int = 0, anchor: Path | None = None, drift: bool = False, **changes: Any) -> Path:
    """Saves a random model; with `anchor`, a copy of it but for random MLPs (`drift`: all moved a little as well)."""
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(config(**changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
        if anchor is not None:
            old = Qwen2ForCausalLM.from_pretrained(anchor, dtype=torch.float32).state_dict()
            for name, parameter in model.named_parameters():
                if ".mlp." not in name:
                    parameter.copy_(old[name] + (0.02 * torch.randn_like(parameter) if drift else 0))
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder
