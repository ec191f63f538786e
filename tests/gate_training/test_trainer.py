"""The trainer on a tiny fused model: what a gate is fitted on, what it routes, and what is written where."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from fusion import road
from fusion.architecture import GATES_FILE, gate_tensor
from fusion.checkpoint import Checkpoint, file_hash, read_json
from fusion.encoding import encode, encode_batches, load_tokenizer
from fusion.errors import UserError
from fusion.layers import Gates, LayerStream, checkpoint_gates, gated
from fusion.merge import merge
from fusion.recipe import Recipe
from fusion.router import place_gates
from gate_training import trainer
from gate_training.compare import ANCHOR, LABELLED, OWN, held_out_losses, mean_loss, mergekit_gates, retained
from gate_training.examples import expert_labels, routing_data, routing_examples
from gate_training.labelling.likelihood import token_targets
from gate_training.layer_tokens import LayerTokens, label_targets, token_marks
from gate_training.methods import ridge
from gate_training.methods.regression import costs
from gate_training.methods.tokens import Moments, TokenPass, Tokens, moments
from gate_training.report import markdown
from gate_training.trainer import METHODS, THRESHOLDS, fit_gates, install_gates, train_gates
from tests.recipes import SETTINGS, make_recipe, with_settings


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: file_hash(path) for path in folder.iterdir()}


def gate_inputs(
    folder: Path, rows: list[list[int]], dtype: torch.dtype = torch.float32, gates: Gates | None = None
) -> list[dict[int, torch.Tensor]]:
    """transformers' own output of post_attention_layernorm by layer, `(length, hidden)`, for each row alone."""
    loaded = {} if dtype == torch.float32 else {"experts_implementation": "eager"}  # the other ones know no float64
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **loaded).eval()
    place_gates(model, gates or {})
    seen: dict[int, torch.Tensor] = {}

    def keep(layer: int) -> Callable[..., None]:
        def hook(module: torch.nn.Module, inputs: object, output: torch.Tensor) -> None:
            seen[layer] = output[0].clone()

        return hook

    for index, layer in enumerate(model.model.layers):
        layer.post_attention_layernorm.register_forward_hook(keep(index))
    found = []
    with torch.no_grad():
        for row in rows:
            model(torch.tensor([row]))
            found.append(dict(seen))
    return found


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("moe_layers", [None, [0, 2]])
def test_gates_are_fitted_on_what_transformers_will_feed_them(
    tmp_path: Path,
    anchor: Path,
    anchored_experts: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    top_k: int,
    moe_layers: list[int] | None,
) -> None:
    routing = {"top_k": top_k, "moe_layers": moe_layers}
    recipe = make_recipe(tmp_path, anchor, anchored_experts, gate_training=SETTINGS, routing=routing)
    folder = merge(recipe)
    fitted_on: list[tuple[torch.Tensor, torch.Tensor]] = []

    def watched(tokens: TokenPass, *rest: object) -> torch.Tensor:
        parts = list(tokens())
        fitted_on.append((torch.cat([p.inputs for p in parts]), torch.cat([p.targets.argmax(1) for p in parts])))
        return ridge.fit(tokens, *rest)  # type: ignore[arg-type]

    monkeypatch.setitem(trainer.METHODS, "cross-entropy", watched)
    train = routing_examples(recipe, "train", 4)
    gates, _ = fit_gates(recipe, folder, routing_data(recipe, folder), "cross-entropy")
    install_gates(folder, gates)  # earlier layers now route by their trained gates, as when served

    layers = moe_layers or [0, 1, 2]
    assert list(gates) == layers
    tokenizer = load_tokenizer(folder)
    examples = [example.example for example in train]
    rows = [encode(tokenizer, example).ids for example in examples]
    expected = gate_inputs(folder, rows)
    labels = expert_labels(recipe, train)
    batches = encode_batches(tokenizer, examples, labels, batch_tokens=SETTINGS["batch_tokens"])
    assert len(batches) > 3
    order = [row for batch in batches for row in batch.rows.tolist()]
    for layer, (x, y) in zip(layers, fitted_on, strict=True):
        assert torch.allclose(x, torch.cat([expected[row][layer] for row in order]), atol=1e-4)
        assert y.tolist() == [labels[row] for row in order for _ in rows[row]]


def test_streamed_gates_are_those_of_the_whole_model(recipe: Recipe, folder: Path) -> None:
    """In float64, but for what transformers' own norm rounds to float32 inside."""
    data, checkpoint = routing_data(recipe, folder), Checkpoint(folder)
    batches = data.train_batches()
    stream = LayerStream(checkpoint, batches, dtype=torch.float64)
    targets = label_targets(batches, 3).double()
    tokens = LayerTokens(stream, batches, targets, torch.cat(token_marks(batches, stream.hidden)))
    sums: dict[int, Moments] = {}
    gates: Gates = {}
    for layer in stream:
        layer.attend()
        tokens.reach(layer)
        sums[layer.index] = moments(tokens)
        gates[layer.index] = ridge.solution(sums[layer.index], 1e-3)
        layer.mix(gated(gates, 1))  # later layers see what the fitted gates have picked

    expected = gate_inputs(folder, [row.ids for row in data.train], torch.float64, gates)
    whole = torch.cat([torch.full((len(row.ids),), k) for row, k in zip(data.train, data.train_labels, strict=True)])
    for index, gate in gates.items():
        x = torch.cat([row[index] for row in expected])
        assert x.dtype == torch.float64
        wanted = Moments(x.T @ x, x.T @ torch.nn.functional.one_hot(whole, 3).double(), len(x))
        pairs = [(sums[index].gram, wanted.gram), (sums[index].cross, wanted.cross)]
        for found, direct in (*pairs, (gate, ridge.solution(wanted, 1e-3))):
            assert float((found - direct).norm() / direct.norm()) < 1e-8


def test_the_prompt_is_the_chat_template_and_the_answer_ends_with_its_mark(recipe: Recipe, folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    example = routing_examples(recipe, "train", 1)[0].example
    encoded = encode(tokenizer, example)
    text = f"<|im_start|>user\n{example.question}<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(encoded.ids[: encoded.answer_start]) == text
    assert tokenizer.decode(encoded.ids[encoded.answer_start :]) == f"{example.answer}<|im_end|>"
    cut = encode(tokenizer, example, max_length=10)
    assert (cut.ids, cut.answer_start) == (encoded.ids[:10], 10)


def test_the_report_measures_what_the_installed_gates_do(recipe: Recipe, folder: Path) -> None:
    report = train_gates(recipe, folder)
    tokenizer = load_tokenizer(folder)
    held_out = routing_examples(recipe, "held_out", 3)
    encoded = [encode(tokenizer, example.example) for example in held_out]
    inputs = gate_inputs(folder, [row.ids for row in encoded])
    labels = expert_labels(recipe, held_out)
    assert report.held_out_tokens == sum(len(row.ids) for row in encoded)
    train = routing_examples(recipe, "train", 4)
    assert report.tokens == sum(len(encode(tokenizer, example.example).ids) for example in train)
    for row in report.layers:
        gate = Checkpoint(folder).tensor(gate_tensor(row.layer))
        first = [(x[row.layer] @ gate.T).argmax(dim=1) for x in inputs]
        hits = [chosen == label for chosen, label in zip(first, labels, strict=True)]
        answers = [hit[example.answer_start :] for hit, example in zip(hits, encoded, strict=True)]
        assert row.accuracy == pytest.approx(float(torch.cat(hits).float().mean()))
        assert row.answer_accuracy == pytest.approx(float(torch.cat(answers).float().mean()))
        assert row.accuracy_by_domain["math"] == pytest.approx(float(torch.cat(hits[3:6]).float().mean()))
        assert row.answer_accuracy_by_domain["math"] == pytest.approx(float(torch.cat(answers[3:6]).float().mean()))
        counts = torch.bincount(torch.cat(first), minlength=3) / report.held_out_tokens
        assert list(row.share_by_expert.values()) == pytest.approx(counts.tolist())
        math = torch.cat([c[e.answer_start :] for c, e in zip(first[3:6], encoded[3:6], strict=True)])
        assert list(row.confusion["math"].values()) == pytest.approx(
            (torch.bincount(math, minlength=3) / len(math)).tolist()
        )
        soft = [torch.softmax(x[row.layer] @ gate.T, dim=1) for x in inputs]
        answered = torch.cat([p[e.answer_start :] for p, e in zip(soft, encoded, strict=True)])
        assert row.entropy == pytest.approx(float(-(answered * answered.log()).sum(dim=1).mean()), abs=1e-4)
        assert sum(found.share for found in row.calibration) == pytest.approx(1)
        assert sum(found.share * found.accuracy for found in row.calibration) == pytest.approx(row.accuracy, abs=1e-5)
        sure = torch.cat([p.max(dim=1).values for p in soft]).mean()
        assert sum(found.share * found.confidence for found in row.calibration) == pytest.approx(float(sure), abs=1e-5)


def test_trained_gates_tell_the_domains_apart(recipe: Recipe, folder: Path) -> None:
    report = train_gates(recipe, folder)  # the held-out rows are among the trained ones here
    assert all(row.answer_accuracy > 0.9 for row in report.layers)


def test_gates_are_fitted_in_bfloat16_where_the_machine_has_it(
    recipe: Recipe, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "compute_dtype", lambda: torch.bfloat16)
    data = routing_data(recipe, folder)
    for method in METHODS:
        gates, report = fit_gates(recipe, folder, data, method, 2)
        assert all(gate.isfinite().all() for gate in gates.values())
        if method != "likelihood":
            assert report.layers[0].answer_accuracy > 0.9


@pytest.mark.parametrize("method", METHODS)
def test_training_twice_gives_the_same_bytes(recipe: Recipe, folder: Path, method: str) -> None:
    chosen = recipe.gate_training.model_copy(update={"method": method})
    recipe = recipe.model_copy(update={"gate_training": chosen})
    train_gates(recipe, folder)
    first = file_hash(folder / GATES_FILE)
    train_gates(recipe, folder)
    assert file_hash(folder / GATES_FILE) == first


def test_installing_gates_replaces_one_file(folder: Path) -> None:
    before = hashes(folder)
    old = checkpoint_gates(Checkpoint(folder))
    new = {layer: torch.randn_like(gate) for layer, gate in old.items()}
    install_gates(folder, new)
    after = hashes(folder)
    assert {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)} == {GATES_FILE}
    found = checkpoint_gates(Checkpoint(folder))
    assert all(torch.equal(found[layer], gate) for layer, gate in new.items())
    names = set(load_file(folder / GATES_FILE))
    index = read_json(folder / "model.safetensors.index.json")["weight_map"]
    assert names == {name for name, file in index.items() if file == GATES_FILE}


def test_gates_that_cannot_be_written_leave_the_old_ones(folder: Path) -> None:
    before = file_hash(folder / GATES_FILE)
    with pytest.raises((RuntimeError, ValueError, NotImplementedError)):
        install_gates(folder, {0: torch.eye(3, 64).to_sparse()})
    assert file_hash(folder / GATES_FILE) == before


def test_gates_are_stored_in_the_checkpoints_dtype(
    tmp_path: Path, anchor: Path, anchored_experts: dict[str, Path]
) -> None:
    experts = {}
    for name, path in {"anchor": anchor, **anchored_experts}.items():
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
        model.save_pretrained(tmp_path / name)
        load_tokenizer(path).save_pretrained(tmp_path / name)
        experts[name] = tmp_path / name
    half = make_recipe(tmp_path, experts.pop("anchor"), experts, gate_training=SETTINGS)
    folder = merge(half)
    report = train_gates(half, folder)
    assert {gate.dtype for gate in checkpoint_gates(Checkpoint(folder)).values()} == {torch.bfloat16}
    assert report.layers[0].answer_accuracy > 0.9


def test_the_step_writes_its_report_and_is_skipped_the_second_time(recipe: Recipe, folder: Path) -> None:
    road.train_gates(recipe)
    assert (recipe.folder / "gates.png").read_bytes().startswith(b"\x89PNG")
    report = json.loads((recipe.folder / "gates.json").read_text())
    assert [row["layer"] for row in report["layers"]] == [0, 1, 2]
    assert report["method"] == "cross-entropy"
    table = (recipe.folder / "gates.md").read_text()
    assert table.count("\n| 0 |") == table.count("\n| 2 |") == 2
    assert f"{report['layers'][0]['accuracy']:.3f} / {report['layers'][0]['answer_accuracy']:.3f}" in table
    labels = [json.loads(line) for line in (recipe.folder / "labels.jsonl").read_text("utf-8").splitlines()]
    assert [label["split"] for label in labels] == ["train"] * 12 + ["held_out"] * 9
    assert {(label["source"], label["confidence"]) for label in labels} == {("data", 1.0)}
    stamp = (folder / GATES_FILE).stat().st_mtime_ns
    road.train_gates(recipe)
    assert (folder / GATES_FILE).stat().st_mtime_ns == stamp
    other = recipe.gate_training.model_copy(update={"method": "ridge"})
    road.train_gates(recipe.model_copy(update={"gate_training": other}))
    assert (folder / GATES_FILE).stat().st_mtime_ns != stamp


def test_merging_again_forgets_that_the_gates_were_trained(recipe: Recipe) -> None:
    road.merge(recipe)
    road.train_gates(recipe)
    trained = file_hash(recipe.fused / GATES_FILE)
    road.merge(recipe, force=True)
    assert file_hash(recipe.fused / GATES_FILE) != trained
    road.train_gates(recipe)
    assert file_hash(recipe.fused / GATES_FILE) == trained


def test_a_failing_training_leaves_the_gates_and_no_record(
    recipe: Recipe, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = hashes(folder)

    def killed(*_: object) -> Iterator[None]:
        raise KeyboardInterrupt

    monkeypatch.setitem(trainer.METHODS, "cross-entropy", killed)
    with pytest.raises(KeyboardInterrupt):
        road.train_gates(recipe)
    assert hashes(folder) == before
    assert not (recipe.folder / "gates.json").exists()
    monkeypatch.undo()
    road.train_gates(recipe)
    assert hashes(folder)[GATES_FILE] != before[GATES_FILE]


def test_gates_before_the_merge_are_a_user_error(recipe: Recipe) -> None:
    with pytest.raises(UserError, match="run `qwen-fusion merge`"):
        road.train_gates(recipe)


@pytest.mark.parametrize("top_k", [1, 2])
def test_regression_is_fitted_on_what_the_experts_make_of_the_tokens(
    tmp_path: Path,
    anchor: Path,
    anchored_experts: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    top_k: int,
) -> None:
    recipe = make_recipe(tmp_path, anchor, anchored_experts, gate_training=SETTINGS, routing={"top_k": top_k})
    folder = merge(recipe)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    seen: list[Tokens] = []

    def watched(tokens: TokenPass, *rest: object) -> torch.Tensor:
        part = next(tokens())
        seen.append(replace(part, inputs=part.inputs.clone()))  # the next layer's take its place
        return ridge.fit(tokens, *rest)  # type: ignore[arg-type]

    monkeypatch.setitem(METHODS, "regression", watched)
    fit_gates(recipe, folder, routing_data(recipe, folder), "regression")
    for layer, part in zip(model.model.layers, seen, strict=True):
        with torch.no_grad():
            made = [_expert(layer.mlp.experts, e, part.inputs) for e in range(3)]
        assert torch.allclose(part.costs, costs(torch.stack(made), part.targets, top_k), atol=1e-4)


def _expert(experts: torch.nn.Module, number: int, x: torch.Tensor) -> torch.Tensor:
    """One expert of transformers' fused weights on `x` `(tokens, hidden)`."""
    gate, up = (experts.gate_up_proj[number] @ x.T).chunk(2)
    return (experts.down_proj[number] @ (torch.nn.functional.silu(gate) * up)).T


def test_auto_takes_the_method_with_the_least_held_out_loss(recipe: Recipe, folder: Path) -> None:
    report = train_gates(with_settings(recipe, method="auto"), folder)
    means = {name: mean_loss(losses) for name, losses in report.compared.items()}
    gates = [*METHODS, *mergekit_gates(recipe, folder)]
    assert set(means) == {ANCHOR, OWN, LABELLED, *(f"{name}, top-{k}" for name in gates for k in (1, 2))}
    assert report.method == min(METHODS, key=lambda name: means[f"{name}, top-1"])
    installed = checkpoint_gates(Checkpoint(folder))
    again = held_out_losses(folder, routing_data(recipe, folder), {"installed": installed})
    assert again["installed"] == pytest.approx(report.compared[f"{report.method}, top-1"], rel=1e-5)
    assert report.compared[OWN] == pytest.approx(report.compared[LABELLED], rel=1e-4)  # the experts are anchored
    shares = retained(report.compared[LABELLED], report.compared)
    assert shares and list(shares.values()) == pytest.approx([1] * len(shares), rel=1e-3)
    assert "| labelled |" in markdown(report)
    expert = 3 * 64 * 96 * 3  # of every layer
    assert report.active_parameters["top-2"] - report.active_parameters["top-1"] == expert


@pytest.mark.parametrize("method", ["ridge", "auto"])
def test_the_threshold_with_the_least_held_out_loss_is_taken(recipe: Recipe, folder: Path, method: str) -> None:
    report = train_gates(with_settings(recipe, method=method, threshold="auto"), folder)
    fitted = report.method
    names = {t: f"{fitted}, threshold {t}, top-1" for t in THRESHOLDS} | {None: f"{fitted}, top-1"}
    means = {threshold: mean_loss(report.compared[name]) for threshold, name in names.items()}
    assert len(set(means.values())) > 1
    assert report.threshold == min(means, key=lambda threshold: means[threshold])
    installed = held_out_losses(folder, routing_data(recipe, folder), {"": checkpoint_gates(Checkpoint(folder))})[""]
    assert installed == pytest.approx(report.compared[names[report.threshold]], rel=1e-5)
    alone = train_gates(with_settings(recipe, method=fitted, threshold=0.9), folder)
    assert alone.threshold == 0.9 and "needs a probability of 0.9 against it" in markdown(alone)
    again = held_out_losses(folder, routing_data(recipe, folder), {"": checkpoint_gates(Checkpoint(folder))})[""]
    assert mean_loss(again) == pytest.approx(means[0.9], rel=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_experts_that_are_one_and_the_same_get_finite_gates(tmp_path: Path, anchor: Path, method: str) -> None:
    recipe = make_recipe(tmp_path, anchor, dict.fromkeys(("general", "math"), anchor), gate_training=SETTINGS)
    folder = merge(recipe)
    train_gates(with_settings(recipe, method=method), folder)
    assert all(gate.isfinite().all() for gate in checkpoint_gates(Checkpoint(folder)).values())
    ids = torch.arange(20)[None]
    dense, fused = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (anchor, folder))
    with torch.no_grad():
        assert torch.allclose(dense(ids).logits, fused(ids).logits, atol=1e-4)


def test_compared_losses_are_transformers_own(recipe: Recipe, folder: Path) -> None:
    held_out = routing_examples(recipe, "held_out", 3)
    gates = {"random": checkpoint_gates(Checkpoint(folder))}
    found = held_out_losses(folder, routing_data(recipe, folder), gates)["random"]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = load_tokenizer(folder)
    for domain in found:
        nats = tokens = 0.0
        for example in (row.example for row in held_out if row.domain == domain):
            row = encode(tokenizer, example)
            with torch.no_grad():
                logits = model(torch.tensor([row.ids])).logits[0, row.answer_start - 1 : -1]
            nats += float(torch.nn.functional.cross_entropy(logits, torch.tensor(row.ids[row.answer_start :]))) * len(
                logits
            )
            tokens += len(logits)
        assert found[domain] == pytest.approx(nats / tokens, rel=1e-4)


@pytest.mark.parametrize("window", [0, 3])
def test_likelihood_labels_are_the_experts_own(
    recipe: Recipe, folder: Path, anchored_experts: dict[str, Path], window: int
) -> None:
    tokenizer = load_tokenizer(folder)
    examples = [row.example for row in routing_examples(recipe, "train", 2)]
    batches = encode_batches(tokenizer, examples, batch_tokens=128)
    targets = token_targets(Checkpoint(folder), batches, 3, window)
    models = [AutoModelForCausalLM.from_pretrained(p, dtype=torch.float32).eval() for p in anchored_experts.values()]
    for batch, found in zip(batches, targets, strict=True):
        assert torch.allclose(found.sum(dim=1), torch.ones(len(found)))
        done = 0
        for row in batch.rows.tolist():
            ids = torch.tensor([encode(tokenizer, examples[row]).ids])
            scores = torch.zeros(ids.shape[1], 3)
            for number, model in enumerate(models):
                with torch.no_grad():
                    logs = model(ids).logits[0, :-1].log_softmax(dim=1)
                scores[:-1, number] = logs.gather(1, ids[0, 1:, None])[:, 0]
            summed = torch.stack([scores[max(0, t - window) : t + window + 1].sum(dim=0) for t in range(ids.shape[1])])
            assert torch.allclose(found[done : done + ids.shape[1]], torch.softmax(summed, dim=1), atol=1e-4)
            done += ids.shape[1]


@pytest.mark.parametrize("top_k", [1, 2])
def test_forced_propagation_feeds_a_gate_what_its_labels_experts_made(
    recipe: Recipe, folder: Path, anchored_experts: dict[str, Path], monkeypatch: pytest.MonkeyPatch, top_k: int
) -> None:
    recipe = with_settings(recipe, propagation="labels", method="cross-entropy")
    seen: list[torch.Tensor] = []

    def watched(tokens: TokenPass, *rest: object) -> torch.Tensor:
        seen.append(torch.cat([part.inputs.clone() for part in tokens()]))
        return ridge.fit(tokens, *rest)  # type: ignore[arg-type]

    monkeypatch.setitem(METHODS, "cross-entropy", watched)
    data = routing_data(recipe, folder)
    fit_gates(recipe, folder, data, "cross-entropy", top_k)
    names = [expert.name for expert in recipe.experts]
    inputs = {
        name: gate_inputs(anchored_experts[name], [row.ids for row in data.train]) for name in names
    }  # of the dense experts
    order = [row for batch in data.train_batches() for row in batch.rows.tolist()]
    for layer, found in enumerate(seen):
        expected = torch.cat([inputs[names[data.train_labels[row]]][row][layer] for row in order])
        assert torch.allclose(found, expected, atol=1e-4)


def test_below_the_threshold_a_token_falls_back_to_the_general_expert(recipe: Recipe, folder: Path) -> None:
    routed = {}
    for threshold in (None, 0.5, 0.8, 0.999):
        data = routing_data(recipe, folder)
        gates, _ = fit_gates(with_settings(recipe, threshold=threshold, propagation="labels"), folder, data, "ridge")
        routed[threshold] = gates
    data = routing_data(recipe, folder)
    stream = LayerStream(Checkpoint(folder), data.train_batches())
    layer = next(iter(stream))
    layer.attend()
    x = torch.cat([stream.inputs(batch) for batch in stream.batches])
    general = recipe.expert_of("general")
    plain = torch.log_softmax(x @ routed[None][0].T, dim=1)
    for threshold in (0.5, 0.8, 0.999):
        found = (x @ routed[threshold][0].T).argmax(dim=1)
        odds = plain - plain[:, [general]]  # against the general expert alone
        lead = odds.max(dim=1).values
        sure = lead > math.log(threshold / (1 - threshold))
        wanted = torch.where(sure, odds.argmax(dim=1), general)
        clear = (lead - math.log(threshold / (1 - threshold))).abs() > 1  # the head start is fitted, not exact
        assert (found == wanted)[clear].float().mean() > 0.95
    counts = [int(((x @ routed[t][0].T).argmax(dim=1) == general).sum()) for t in (0.5, 0.8, 0.999)]
    assert counts == sorted(counts)


def test_processes_that_share_the_rows_fit_the_same_gates(recipe: Recipe, folder: Path, tmp_path: Path) -> None:
    train_gates(recipe, folder)
    alone = checkpoint_gates(Checkpoint(folder))
    install_gates(folder, {layer: torch.zeros_like(gate) for layer, gate in alone.items()})
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe.model_dump(mode="json", exclude_none=True)), encoding="utf-8")
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--num_processes",
        "2",
        "--cpu",
        "--main_process_port",
        "0",
    ]
    done = subprocess.run(
        [*launch, "-m", "fusion.cli", "train-gates", str(file), "-q"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(trainer.__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    together = checkpoint_gates(Checkpoint(folder))
    for layer, gate in alone.items():
        assert torch.allclose(together[layer], gate, rtol=1e-2, atol=1e-2 * float(gate.abs().max()))
