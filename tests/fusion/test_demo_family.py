"""The demo's anchor: the same settings give the same bytes, another seed others, and nothing is left beside it."""

from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import AutoTokenizer

from fusion.checkpoint import file_hash
from fusion.demo_family import pretrain_anchor
from fusion.sections.data import DataSource
from fusion.sections.training import PretrainSettings


@pytest.fixture(scope="module")
def anchors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("anchors")
    for name, seed in (("first", 0), ("again", 0), ("other", 1)):
        settings = PretrainSettings(
            data=DataSource(generated="demo.anchor"),
            rows=64,
            steps=3,
            batch_rows=8,
            vocab_size=768,
            seed=seed,
            workers=2,
        )
        pretrain_anchor(folder / name, settings)
    return {path.name: path for path in folder.iterdir()}


def test_the_anchor_is_the_same_for_the_same_seed(anchors: dict[str, Path]) -> None:
    assert set(anchors) == {"first", "again", "other"}  # nothing half-written beside them
    files = {path.name for path in anchors["first"].iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "pretrain.json"} <= files
    for name in files:
        assert file_hash(anchors["first"] / name) == file_hash(anchors["again"] / name), name
    first, other = (load_file(anchors[name] / "model.safetensors") for name in ("first", "other"))
    assert any(not first[name].equal(other[name]) for name in first)


def test_its_tokenizer_has_qwens_chat_form_and_no_system_prompt(anchors: dict[str, Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(anchors["first"])
    question = [{"role": "user", "content": "1+1="}]
    text = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\n1+1=<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
