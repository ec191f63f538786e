"""The background pass gives a request the shares that the engine would tell, the classifier's word, and its page."""

import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from fusion.checkpoint import Checkpoint
from fusion.encoding import load_tokenizer
from fusion.explain.explain import explain
from fusion.explain.page import page
from fusion.merge import merge
from fusion.recipe import Recipe
from serving.records.observer import Opinions, observe, observing
from serving.records.record import RoutingRecord
from serving.records.settings import recording, store_url
from serving.records.shares import shares_of
from serving.records.store import opened
from tests.recipes import make_recipe
from tests.serving.processes import all_gone, descendants

ASKED = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+2="}]
CHANNELS = {"rules": {"domain": "math", "evidence": "pattern: '1'", "confidence": 1.0}}
RECORD = RoutingRecord(
    "a",
    "/v1/chat/completions",
    200,
    1.0,
    domain="math",
    channel="rules",
    channels=CHANNELS,
    asked=ASKED,
    answered="3 4",
)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, anchor: Path, anchored_experts: dict[str, Path]) -> Recipe:
    folder = tmp_path_factory.mktemp("observed")
    serving = {"max_model_len": 256, "sampling": {"max_tokens": 32}}
    serving["guard"] = {"records": {"prompts": True, "explain_share": 1.0}}
    settings = {"rows": 4, "held_out_rows": 4, "labels": "combined"}
    made = make_recipe(folder, anchor, anchored_experts, serving=serving, gate_training=settings)
    merge(made)
    return made


def test_shares_are_those_of_explain_with_the_classifiers_word(recipe: Recipe) -> None:
    told = {"all": {"general": 1.0, "math": 0.0, "coding": 0.0}}
    with opened(store_url(recipe)) as store:
        known = replace(RECORD, request_id="b", shares=told, shares_source="engine")
        store.add([RECORD, known, replace(RECORD, request_id="c")], ["shares", "page", None])
        opinions = Opinions(recipe)
        assert observe(recipe, store, opinions) == 2 and observe(recipe, store, opinions) == 0
        first, second, third = (store.find(name) for name in "abc")
        drawn = store.page("b")
    assert first and second and third
    found = explain(Checkpoint(recipe.fused), load_tokenizer(recipe.fused), ASKED, "3 4")
    assert first.shares["all"] == pytest.approx(found.shares.answer, abs=1e-4) and first.shares_source == "explain"
    assert set(first.shares) == {"all", *(group.name for group in found.groups)}
    assert first.channels["rules"] == CHANNELS["rules"] and 0 < first.channels["classifier"]["confidence"] <= 1
    assert second.shares == told and second.shares_source == "engine"  # the engine knows better
    assert drawn is not None
    numbers = re.compile(r"\d+\.\d+(e-\d+)?")  # their last digits differ by what else is in a batch
    assert numbers.sub("", drawn) == numbers.sub("", page(found))
    assert third.shares == {}


def test_a_request_that_cannot_be_explained_costs_no_other(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    broken = replace(RECORD, request_id="e", asked=[{"role": "user"}])
    with opened(store_url(recipe)) as store:
        store.add([broken, replace(RECORD, request_id="f")], ["shares", "shares"])
        assert observe(recipe, store, Opinions(recipe)) == 2
        assert store.waiting(5) == []
        first, second = store.find("e"), store.find("f")
    assert first and not first.shares and second and second.shares
    assert "request e cannot be explained" in capsys.readouterr().err


@pytest.mark.parametrize("answer", ["3 4", "import os", "a story of a home"])
def test_the_engines_account_comes_to_the_shares_of_the_model_itself(recipe: Recipe, answer: str) -> None:
    """Routes by transformers' router logits, laid out and encoded as vLLM does: of every token but the last sampled."""
    from vllm.utils.serial_utils import numpy2base64

    found = explain(Checkpoint(recipe.fused), load_tokenizer(recipe.fused), ASKED, answer)
    prompt = sum(token.part != "answer" for token in found.tokens)
    ids = torch.tensor([[token.id for token in found.tokens]])
    model = AutoModelForCausalLM.from_pretrained(recipe.fused, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(ids, output_router_logits=True).router_logits  # of each sparse layer (tokens, experts)
    routes = np.zeros((ids.shape[1] - 1, model.config.num_hidden_layers, found.top_k), dtype=np.uint8)
    for layer, scores in zip(found.layers, logits, strict=True):
        routes[:, layer] = scores[:-1].topk(found.top_k).indices.numpy()
    told = recording(recipe, recipe.fused)
    assert told.sparse_layers == tuple(found.layers)
    shares = shares_of(numpy2base64(routes), told.experts, told.sparse_layers, prompt)
    spoken = routes[prompt:, found.layers]
    for number, name in enumerate(told.experts):
        assert shares["all"][name] == pytest.approx((spoken == number).mean(), abs=1e-4)
        assert found.shares.answer is not None  # with the end mark, which is one token more
        assert abs(shares["all"][name] - found.shares.answer[name]) <= 1 / len(spoken)
    assert set(shares) == {"all", *(group.name for group in found.groups)}


PROGRAM = """
import sys, time
from pathlib import Path
from fusion.recipe_file import load_recipe
from serving.records.observer import observing
with observing(load_recipe(Path(sys.argv[1]), []), Path(sys.argv[2])):
    print("ready", flush=True)
    time.sleep(600)
"""


def test_the_pass_runs_beside_the_server_and_ends_with_it(recipe: Recipe, tmp_path: Path) -> None:
    path, log = tmp_path / "recipe.yaml", tmp_path / "observer.log"
    path.write_text(recipe.model_dump_json(exclude_defaults=True), encoding="utf-8")
    with opened(store_url(recipe)) as store:
        server = subprocess.Popen([sys.executable, "-c", PROGRAM, str(path), str(log)], stdout=subprocess.PIPE)
        assert server.stdout is not None and server.stdout.readline() == b"ready\n"
        store.add([replace(RECORD, request_id="d")], ["shares"])
        until = time.monotonic() + 120
        while not (found := store.find("d")) or not found.shares:
            assert time.monotonic() < until, log.read_text()
            time.sleep(0.1)
        passes = descendants(server.pid)
        server.kill()
        server.wait()
        assert passes and all_gone(passes)
    with observing(recipe.model_copy(update={"serving": make_bare(recipe)}), tmp_path / "none.log"):
        assert not (tmp_path / "none.log").exists()  # nobody wants it


def make_bare(recipe: Recipe) -> object:
    return recipe.serving.model_copy(update={"guard": recipe.serving.guard.model_copy(update={"records": None})})
