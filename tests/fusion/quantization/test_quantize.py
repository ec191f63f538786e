"""Quantise: what is refused, how llm-compressor's environment comes about, and tiny models through the real thing."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from fusion.architecture import GATES_FILE, MANIFEST
from fusion.checkpoint import Checkpoint, file_hash, read_json, write_json
from fusion.encoding import encode, load_tokenizer
from fusion.errors import UserError
from fusion.evaluation.answer_loss import answer_losses
from fusion.evaluation.evaluate import held_out_rows
from fusion.headers import tensor_places
from fusion.layers import checkpoint_gates, gated, make_batches
from fusion.merge import merge, record_gates
from fusion.quantization import environment, needs
from fusion.quantization.environment import NOTE, environment_folder, environment_python, wheel_options
from fusion.quantization.job import run_job
from fusion.quantization.layout import FROM_A_WEIGHT
from fusion.quantization.loss import lost, markdown
from fusion.quantization.needs import Need, check_room, group_size_of, needed
from fusion.quantization.quantize import check, quantize
from fusion.recipe import Recipe
from fusion.verify import verify
from tests.families import write_model
from tests.recipes import recipe_data

DOMAINS = ("general", "math", "coding")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """Three tiny experts in bfloat16, layer 2 of 0 to 2 dense, with other rows held out than trained on."""
    folder = tmp_path_factory.mktemp("quantize")
    anchor = write_model(folder / "anchor", seed=1)
    experts = {name: write_model(folder / name, seed=10 + i, anchor=anchor) for i, name in enumerate(DOMAINS)}
    for model in (anchor, *experts.values()):
        write_json(model / "config.json", {**read_json(model / "config.json"), "dtype": "bfloat16"})
        tensors = load_file(model / "model.safetensors")
        save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, model / "model.safetensors")
    data = recipe_data(folder, anchor, experts, routing={"top_k": 1, "moe_layers": [0, 1]})
    for name, domain in data["domains"].items():
        path = folder / f"{name}-held-out.jsonl"
        turns = [
            [{"role": "user", "content": f"{name}? {i}"}, {"role": "assistant", "content": f"{i} {name}"}]
            for i in range(3)
        ]
        path.write_text("\n".join(json.dumps({"messages": rows}) for rows in turns), encoding="utf-8")
        domain["held_out"] = {"path": str(path)}
    return Recipe.model_validate(data)


@pytest.fixture(scope="module")
def fused(recipe: Recipe) -> Path:
    """Their merge, its gates noted as trained."""
    folder = merge(recipe)
    record_gates(folder, "test", "data", 1, None)
    return folder


@pytest.fixture(scope="module")
def llm_compressor() -> Path:
    """The interpreter of the other environment; without it, the tests that need it are skipped."""
    try:
        return environment_python()
    except UserError as error:
        pytest.skip(str(error))


def test_what_cannot_be_quantised_is_refused(fused: Path, recipe: Recipe, anchor: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="int3 is unknown: use fp8 or w4a16"):
        quantize(fused, "int3")
    with pytest.raises(UserError, match=r"no fused model with its fusion\.json"):
        quantize(anchor, "fp8")
    with pytest.raises(UserError, match="lies in the checkpoint itself"):
        quantize(fused, "fp8", out=fused / "fp8")
    (tmp_path / "full").mkdir()
    with pytest.raises(UserError, match="exists and is no quantised model"):
        quantize(fused, "fp8", out=tmp_path / "full")
    done = shutil.copytree(fused, tmp_path / "done")
    write_json(done / "config.json", {**read_json(done / "config.json"), "quantization_config": {}})
    with pytest.raises(UserError, match="quantised already"):
        quantize(done, "fp8")
    other = recipe.model_dump(mode="json")
    other["experts"][0]["name"] = "else"
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(other), encoding="utf-8")
    with pytest.raises(UserError, match="the recipe's experts are else, math, coding, those of"):
        quantize(fused, "fp8", tmp_path / "other.yaml")


def test_untrained_gates_are_remarked_on(recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = merge(recipe, tmp_path / "untrained")
    check(folder, "fp8", tmp_path / "out")
    assert "are not trained yet" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("widths", "size"), [((3584, 18944), 128), ((896, 4864), 128), ((1536, 192), 64), ((64, 96), 32)]
)
def test_groups_are_as_large_as_every_width_allows(widths: tuple[int, int], size: int) -> None:
    hidden, intermediate = widths
    assert group_size_of({"hidden_size": hidden, "moe_intermediate_size": intermediate, "mlp_only_layers": []}) == size


def test_widths_that_no_group_divides_are_refused() -> None:
    config = {"hidden_size": 64, "moe_intermediate_size": 64, "intermediate_size": 72, "mlp_only_layers": []}
    assert group_size_of(config) == 64
    with pytest.raises(UserError, match=r"intermediate_size 72 is no multiple of 32.*use --scheme fp8"):
        group_size_of({**config, "mlp_only_layers": [0]})


def test_what_is_needed_follows_from_the_headers(fused: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    fp8, w4a16 = (needed(fused, scheme, 100) for scheme in ("fp8", "w4a16"))
    places = tensor_places(fused)
    stored = sum(place.nbytes for place in places.values())
    assert fp8.model == 2 * stored  # computed in float32 here
    assert fp8.gpu == w4a16.gpu == 0
    linear = 3 * (4 * 64 * 64) + (2 * 3 + 1) * 3 * 64 * 96  # attention, and the MLPs of two sparse layers and a dense
    assert fp8.disk == 2 * (stored - linear * 2 + linear)
    assert needed(fused, "w4a16", 200).memory - w4a16.memory == 100 * 2 * 64 * 4
    hessians = 4 * 64**2 + 3 * (2 * 64**2 + 96**2)  # of a sparse layer
    layer = 4 * sum(place.nbytes for name, place in places.items() if name.startswith("model.layers.0."))
    outside = 2 * sum(place.nbytes for name, place in places.items() if "layers" not in name)
    fixed = needs.PROGRAM_BYTES + needs.SHARD_BYTES + 100 * 2 * 64 * 4
    assert w4a16.memory == fixed + layer + outside + 4 * (hessians + 4 * 96**2)


def test_too_little_memory_or_disk_is_said_before_any_work(tmp_path: Path) -> None:
    fits = Need(memory=1, gpu=0, model=5, disk=1)
    assert check_room(fits, tmp_path / "new" / "out") > 5
    with pytest.raises(UserError, match=r"1000000\.0 GB of memory are needed .* use a machine with more"):
        check_room(replace(fits, memory=10**15), tmp_path)
    with pytest.raises(UserError, match=r"1000000\.00 GB are needed.*name another place with --out"):
        check_room(replace(fits, disk=10**15), tmp_path)


def test_an_environment_that_is_there_is_used_and_one_of_other_requirements_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = environment_folder(tmp_path)
    folder.mkdir()
    wanted = {"requirements": file_hash(environment.REQUIREMENTS), "python": sys.version.split()[0], "gpu": False}
    monkeypatch.setattr(environment, "_has_gpu", lambda: False)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    write_json(folder / NOTE, wanted)
    assert environment_python(tmp_path) == folder / "bin" / "python"
    write_json(folder / NOTE, {**wanted, "requirements": "others"})
    with pytest.raises(UserError, match="installed by uv, which is not here"):
        environment_python(tmp_path)
    assert (folder / NOTE).is_file()


def test_an_environment_that_cannot_be_made_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "requirements.txt").write_text("llmcompressor==0.0.0\n", encoding="utf-8")
    monkeypatch.setattr(environment, "REQUIREMENTS", tmp_path / "requirements.txt")
    with pytest.raises(UserError, match="environment cannot be made"):
        environment_python(tmp_path / "cache")
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


def test_torch_comes_from_where_make_setup_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "_has_gpu", lambda: False)
    monkeypatch.setenv("PIP_FIND_LINKS", "/wheels /more")
    assert wheel_options() == ["--find-links", "/wheels", "--find-links", "/more"]
    monkeypatch.delenv("PIP_FIND_LINKS")
    assert wheel_options() == ["--torch-backend", "cpu"]


def test_requirements_are_pinned_and_name_no_host() -> None:
    lines = environment.REQUIREMENTS.read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert all("==" in line for line in pins)
    assert not any("://" in line for line in lines)
    assert environment.pinned("llmcompressor") in environment_folder(Path("cache")).name


def test_a_job_that_fails_says_why(tmp_path: Path) -> None:
    python = tmp_path / "python"
    script = "#!/bin/sh\necho 'Traceback (most recent call last):' >&2\necho 'ValueError: no such layer' >&2\nexit 1\n"
    python.write_text(script, encoding="utf-8")
    python.chmod(0o755)
    with pytest.raises(UserError, match="llm-compressor failed: ValueError: no such layer"):
        run_job(python, {"do": "fp8"}, tmp_path / "work", "quantise")
    python.write_text("#!/bin/sh\nkill -9 $$\n", encoding="utf-8")
    with pytest.raises(UserError, match="ended by signal 9, most likely for want of memory"):
        run_job(python, {"do": "compare"}, tmp_path / "work", "compare")


def figure(**changes: float) -> dict[str, float]:
    """What the child says of a row of ten answer tokens."""
    return {"original": 2.0, "quantized": 3.0, "kl": 1.0, "mean_abs": 5.0, "max_abs": 2.0, "same": 9, "tokens": 10} | (
        changes
    )


def test_the_lost_share_is_the_rise_over_the_experts_gain() -> None:
    rows = [{"domain": "math"}, {"domain": "math"}, {"domain": "coding"}]
    figures = [figure(), figure(original=4.0, quantized=4.0, max_abs=7.0), figure(quantized=2.0)]
    known = {"anchor": {"loss": 1.3}, "own_expert": {"loss": 0.3}, "fused_trained": {"loss": 0.31}}
    evaluation = {"domains": {"math": {**known, "retained_share_by_loss": 0.98}, "coding": None}}
    found = lost(rows, figures, evaluation)
    math = found["domains"]["math"]
    assert math["original"] == pytest.approx(0.3)
    assert math["quantized"] == pytest.approx(0.35)
    assert math["retained_share_lost"] == found["mean_retained_share_lost"] == pytest.approx(0.05)
    assert (math["max_abs"], math["tokens"], math["rows"]) == (7.0, 20, 2)
    assert found["domains"]["coding"]["retained_share_lost"] is None
    assert found["all"]["same"] == pytest.approx(0.9)
    assert lost(rows, figures, None)["mean_retained_share_lost"] is None


def original_losses(recipe: Recipe, fused: Path) -> dict[str, float]:
    """Nats a token of the fused model by domain, by the layer stream."""
    tokenizer, checkpoint = load_tokenizer(fused), Checkpoint(fused)
    rows = [(name, encode(tokenizer, r)) for name, found in held_out_rows(recipe, DOMAINS).items() for r in found]
    batches = make_batches([row.ids for _, row in rows], [row.answer_start for _, row in rows], None, 4096)
    return answer_losses(checkpoint, batches, [name for name, _ in rows], gated(checkpoint_gates(checkpoint), 1))


def weights_alone_losses(recipe: Recipe, made: Path) -> dict[str, float]:
    """Nats a token of a quantised model by domain, by transformers here, which quantises no experts' activations."""
    pytest.importorskip("compressed_tensors")
    tokenizer, found = load_tokenizer(made), {}
    model = AutoModelForCausalLM.from_pretrained(made, dtype=torch.float32)
    for name, rows in held_out_rows(recipe, DOMAINS).items():
        nats, tokens = 0.0, 0
        for row in (encode(tokenizer, row) for row in rows):
            ids = torch.tensor([row.ids])
            with torch.no_grad():
                logits = model(ids).logits[0, row.answer_start - 1 : -1]
            nats += float(F.cross_entropy(logits, ids[0, row.answer_start :], reduction="sum"))
            tokens += len(row.ids) - row.answer_start
        found[name] = nats / tokens
    return found


def assert_kept(original: Path, made: Path) -> None:
    """Whatever is no linear weight is what it was, nothing is empty, and shards, index and manifest say so."""
    before, after = Checkpoint(original), Checkpoint(made)
    places = tensor_places(made)
    assert all(place.nbytes for place in places.values())
    for name in before.weight_map:
        if not name.endswith("_proj.weight"):
            assert torch.equal(before.tensor(name), after.tensor(name)), name
    assert {p.name for p in made.glob("*.safetensors")} == {p.name for p in original.glob("*.safetensors")}
    for name, file in after.weight_map.items():
        assert file == before.weight_map[FROM_A_WEIGHT.sub(".weight", name)]
    manifest = read_json(made / MANIFEST)
    hashes = {**manifest["sha256"], GATES_FILE: manifest["gates"]["sha256"]}
    assert hashes == {path.name: file_hash(path) for path in made.glob("*.safetensors")}
    assert manifest["quantized"]["original"]["sha256"][GATES_FILE] == file_hash(original / GATES_FILE)
    assert manifest["gates"]["method"] == "test"
    assert not list(made.glob("work*"))


def assert_compared(result: dict[str, Any], recipe: Recipe, fused: Path) -> None:
    """The comparison ran on the model that was meant, and vLLM's compressed-tensors reads the other one."""
    losses = original_losses(recipe, fused)
    for name, domain in result["loss"]["domains"].items():
        assert domain["original"] == pytest.approx(losses[name], abs=1e-4)
        assert domain["quantized"] != domain["original"]
        assert domain["rows"] == 3
    assert 0 < result["loss"]["all"]["mean_abs"] < result["loss"]["all"]["max_abs"]
    assert result["loss"]["all"]["kl"] > 0
    assert result["read_by_vllm"]["understood"] in (True, None)
    assert result["bytes"]["quantized"] < result["bytes"]["original"]
    assert "KL" in markdown(result)


def quantised(recipe: Recipe, fused: Path, scheme: str, out: Path) -> dict[str, Any]:
    """What `quantize` says of a checkpoint that is whole and compared with the original."""
    result = quantize(fused, scheme, out=out)
    assert_kept(fused, out)
    assert not verify(out).problems
    assert_compared(result, recipe, fused)
    return result


@pytest.mark.usefixtures("llm_compressor")
def test_fp8_quantises_linear_weights_alone_and_says_what_it_lost(recipe: Recipe, fused: Path, tmp_path: Path) -> None:
    result = quantised(recipe, fused, "fp8", tmp_path / "fp8")
    before, after = Checkpoint(fused), Checkpoint(tmp_path / "fp8")
    linear = [name for name in before.weight_map if name.endswith("_proj.weight")]
    assert len(linear) == 3 * 4 + (2 * 3 + 1) * 3
    for name in linear:
        weight, scale = after.tensor(name), after.tensor(f"{name}_scale")
        assert (weight.dtype, scale.dtype) == (torch.float8_e4m3fn, torch.bfloat16)
        assert scale.shape == (len(weight), 1)
        error = (weight.float() * scale.float() - before.tensor(name).float()).abs()
        # 3 bits of mantissa, or a subnormal, by a scale of 8 bits
        assert (error <= before.tensor(name).float().abs() / 15 + scale.float() / 500).all()
    assert read_json(tmp_path / "fp8" / "quantization.json") == json.loads(json.dumps(result))
    for name, loss in weights_alone_losses(recipe, tmp_path / "fp8").items():
        assert result["loss"]["domains"][name]["quantized"] == pytest.approx(loss, rel=0.05)
    assert "## Quantised" in (tmp_path / "fp8" / "README.md").read_text(encoding="utf-8")


@pytest.mark.usefixtures("llm_compressor")
def test_w4a16_calibrates_every_expert_on_its_own_domain(recipe: Recipe, fused: Path, tmp_path: Path) -> None:
    result = quantised(recipe, fused, "w4a16", tmp_path / "w4a16")
    assert result["group_size"] == 32
    for row in result["calibration"].values():
        assert 0 < row["own_domain"] <= row["seen_at_least"]
        assert row["routed_at_least"] <= row["seen_at_least"]
    for name, loss in weights_alone_losses(recipe, tmp_path / "w4a16").items():
        # transformers multiplies the experts by their scales in bfloat16
        assert result["loss"]["domains"][name]["quantized"] == pytest.approx(loss, rel=1e-3)
    after = Checkpoint(tmp_path / "w4a16")
    name = "model.layers.1.mlp.experts.2.down_proj.weight"
    assert after.shape(f"{name}_packed") == (64, 96 * 4 // 32)
    assert after.shape(f"{name}_scale") == (64, 96 // 32)
    assert after.tensor(f"{name}_scale").dtype == torch.bfloat16


def test_a_model_that_llm_compressor_cannot_load_is_told_of(llm_compressor: Path, tmp_path: Path) -> None:
    job = {"do": "fp8", "model": str(tmp_path / "none"), "out": str(tmp_path / "out"), "ignore": []}
    with pytest.raises(UserError, match="llm-compressor failed: "):
        run_job(llm_compressor, job, tmp_path / "work", "quantise")
    assert not (tmp_path / "work" / "fp8.report").exists()
