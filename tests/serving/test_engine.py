import gc
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from fusion.checkpoint import write_json
from fusion.errors import UserError
from serving import engine
from serving.ask import engine_settings
from serving.client import chat
from serving.engine import Engine, EngineSettings, Hardware, core_binding, engine_arguments, engine_environment
from serving.serve import find_server, listening_socket, running_server
from tests.fusion.plan.planned import fused, shipped
from tests.recipes import make_recipe
from tests.serving import fake_engine
from tests.serving.apart import SAID, serve_apart
from tests.serving.processes import alive, all_gone

CPU = Hardware(gpus=0, cores=(0, 1))
USER = [{"role": "user", "content": "6*7="}]
SERVING = {"max_model_len": 256, "sampling": {"max_tokens": 32}}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder with the config of a two-expert model."""
    folder = tmp_path / "model"
    folder.mkdir()
    config = {
        "num_experts": 2,
        "num_attention_heads": 28,
        "num_hidden_layers": 4,
        "max_position_embeddings": 32768,
        "rope_theta": 1e6,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def pids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Puts the fake engine in vLLM's place; the file that names its processes."""
    path = fake_engine.install(tmp_path / "fake")
    monkeypatch.setenv("PYTHONPATH", f"{path}{os.pathsep}{Path.cwd()}")
    monkeypatch.setenv("FAKE_ENGINE_PIDS", str(tmp_path / "pids"))
    monkeypatch.setenv("QWEN_FUSION_QUIET", "1")
    monkeypatch.setattr(engine, "GRACE_S", 2.0)
    return tmp_path / "pids"


def processes(pids: Path) -> list[int]:
    return [int(pid) for pid in pids.read_text().split()]


def test_arguments_on_a_cpu(model: Path) -> None:
    settings = EngineSettings(str(model), "m", dtype="float32", tensor_parallel_size=2, max_model_len=2048)
    arguments = engine_arguments(settings, CPU, 9000)
    for argument in ("--host=127.0.0.1", "--port=9000", "--dtype=float32", "--tensor-parallel-size=2",
                     "--max-model-len=2048", "--enforce-eager", "--no-enable-chunked-prefill",
                     f"--kv-cache-memory-bytes={1 << 30}",
                     "--enable-auto-tool-choice", "--tool-call-parser=hermes", "--generation-config=vllm",
                     '--override-generation-config={"temperature": 0.7, "top_p": 0.9}'):  # fmt: skip
        assert argument in arguments
    assert not any("gpu-memory" in argument for argument in arguments)
    assert engine_environment(settings, CPU)["VLLM_CPU_OMP_THREADS_BIND"] == "0|1"


@pytest.mark.parametrize(
    ("dtype", "native", "given"), [("auto", False, "float32"), ("auto", True, "auto"), ("bfloat16", False, "bfloat16")]
)
def test_a_cpu_does_not_emulate_bfloat16_unless_told_to(model: Path, dtype: str, native: bool, given: str) -> None:
    arguments = engine_arguments(EngineSettings(str(model), "m", dtype=dtype), Hardware(0, (0, 1), native), 9000)
    assert f"--dtype={given}" in arguments


def test_arguments_on_gpus(model: Path) -> None:
    arguments = engine_arguments(EngineSettings(str(model), "m", tensor_parallel_size=2), Hardware(2, (0, 1)), 9000)
    assert "--gpu-memory-utilization=0.9" in arguments
    assert not {"--enforce-eager", "--no-enable-chunked-prefill"} & set(arguments)
    assert not any("kv-cache-memory-bytes" in argument for argument in arguments)
    assert "VLLM_CPU_OMP_THREADS_BIND" not in engine_environment(EngineSettings(str(model), "m"), Hardware(1, (0,)))


def test_whole_experts_and_fp8_are_vllms_options(model: Path) -> None:
    settings = EngineSettings(str(model), "m", tensor_parallel_size=2, enable_expert_parallel=True, quantization="fp8")
    arguments = engine_arguments(settings, Hardware(2, (0, 1)), 9000)
    assert {"--enable-expert-parallel", "--quantization=fp8_per_tensor"} <= set(arguments)
    plain = engine_arguments(EngineSettings(str(model), "m"), Hardware(2, (0, 1)), 9000)
    assert not any("expert-parallel" in argument or "quantization" in argument for argument in plain)


def test_stages_ranks_and_ray_are_vllms_options(model: Path) -> None:
    settings = EngineSettings(str(model), "m", pipeline_parallel_size=2, data_parallel_size=2)
    arguments = engine_arguments(settings, Hardware(4, (0,)), 9000)
    assert {"--pipeline-parallel-size=2", "--data-parallel-size=2"} <= set(arguments)
    ray = EngineSettings(str(model), "m", pipeline_parallel_size=2, distributed_executor_backend="ray")
    assert "--distributed-executor-backend=ray" in engine_arguments(
        ray, Hardware(1, (0,)), 9000
    )  # the other's elsewhere
    plain = engine_arguments(EngineSettings(str(model), "m"), Hardware(4, (0,)), 9000)
    assert not any(word in argument for argument in plain for word in ("pipeline", "data-parallel", "executor"))


def test_vllm_understands_them_as_they_are_meant(tmp_path: Path) -> None:
    """vLLM's own parser and config make of the arguments what the recipe's keys say, of the five 7B experts' config."""
    write_json(tmp_path / "config.json", fused(*shipped())[0])
    shapes = [(2, 1, 1, "mp", True), (2, 2, 1, "mp", False), (1, 1, 2, None, True), (2, 2, 1, "ray", False)]
    lists = [
        engine_arguments(
            EngineSettings(
                str(tmp_path),
                "m",
                tensor_parallel_size=ways,
                pipeline_parallel_size=stages,
                data_parallel_size=ranks,
                distributed_executor_backend=backend,
                enable_expert_parallel=whole,
            ),
            Hardware(4, (0, 1)),
            9000,
        )
        for ways, stages, ranks, backend, whole in shapes
    ]
    told = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", UNDERSTOOD], input=json.dumps(lists), capture_output=True, text=True
    )
    assert told.returncode == 0, told.stderr
    understood = [tuple(row) for row in json.loads(told.stdout.splitlines()[-1])]
    assert understood == [(*shape[:3], shape[3] or "mp", shape[4]) for shape in shapes]


UNDERSTOOD = """
import json, sys
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser
rows = []
for arguments in json.loads(sys.stdin.read()):
    given = AsyncEngineArgs.from_cli_args(make_arg_parser(FlexibleArgumentParser()).parse_args(arguments))
    made = given  # without Ray there is no config of it
    if given.distributed_executor_backend != "ray":
        made = given.create_engine_config().parallel_config
    rows.append([made.tensor_parallel_size, made.pipeline_parallel_size, made.data_parallel_size,
                 made.distributed_executor_backend, made.enable_expert_parallel])
print(json.dumps(rows))
"""


def test_ray_serve_is_told_what_vllm_is_told(model: Path) -> None:
    """Every engine argument of the shipped Ray Serve configuration is one that `serve` gives."""
    told = yaml.safe_load((Path(__file__).parents[2] / "configs" / "deploy" / "ray-serve.yaml").read_text())
    (config,) = told["applications"][0]["args"]["llm_configs"]
    arguments = engine_arguments(EngineSettings(str(model), "m", max_model_len=32768), Hardware(1, (0,)), 9000)
    given = dict(argument[2:].partition("=")[::2] for argument in arguments)
    for key, value in config["engine_kwargs"].items():
        said = given[key.replace("_", "-")]
        if isinstance(value, dict):
            assert value.items() <= json.loads(said).items()
        elif key != "tensor_parallel_size":
            assert said == ("" if value is True else str(value))


def test_live_gates_alone_open_the_development_routes(model: Path) -> None:
    for live in (False, True):
        settings = EngineSettings(str(model), "m", live_gates=live)
        extended = any("worker-extension" in argument for argument in engine_arguments(settings, CPU, 9000))
        assert extended == ("VLLM_SERVER_DEV_MODE" in engine_environment(settings, CPU)) == live


def test_the_recipe_says_so(tmp_path: Path) -> None:
    serving = {
        **SERVING,
        "tensor_parallel_size": 2,
        "pipeline_parallel_size": 2,
        "distributed_executor_backend": "ray",
        "enable_expert_parallel": True,
        "quantization": "fp8",
    }
    recipe = make_recipe(tmp_path, tmp_path, {"general": tmp_path, "math": tmp_path}, serving=serving)
    recipe.fused.mkdir(parents=True)
    (recipe.fused / "config.json").write_text("{}")
    settings = engine_settings(recipe)
    assert (settings.enable_expert_parallel, settings.quantization) == (True, "fp8")
    assert (settings.pipeline_parallel_size, settings.distributed_executor_backend) == (2, "ray")


@pytest.mark.parametrize(
    ("hardware", "dtype", "words"),
    [
        (CPU, "auto", "vLLM's CPU build has no kernel for experts of one scale each, set serving.quantization to null"),
        (Hardware(1, (0,)), "float32", "set serving.dtype to auto"),
    ],
)
def test_fp8_that_vllm_cannot_serve_is_one_sentence(model: Path, hardware: Hardware, dtype: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        engine_arguments(EngineSettings(str(model), "m", dtype=dtype, quantization="fp8"), hardware, 9000)


def test_a_quantised_checkpoint_is_served_as_it_is(tmp_path: Path) -> None:
    made = tmp_path / "fused-w4a16"
    serving = {**SERVING, "checkpoint": str(made)}
    recipe = make_recipe(tmp_path, tmp_path, {"general": tmp_path, "math": tmp_path}, serving=serving)
    with pytest.raises(UserError, match="fused-w4a16 does not exist yet: run `qwen-fusion quantize`"):
        engine_settings(recipe)
    made.mkdir()
    (made / "config.json").write_text('{"quantization_config": {}, "num_experts": 2}')
    assert engine_settings(recipe).model == str(made)
    with pytest.raises(UserError, match=r"is quantised already: set serving.quantization to null"):
        engine_arguments(EngineSettings(str(made), "m", quantization="fp8"), Hardware(1, (0,)), 9000)


def test_cores_are_shared_among_workers() -> None:
    assert core_binding((0, 1), 1) == "0,1"
    assert core_binding((0, 1), 4) == "0|1|0|1"
    assert core_binding((2, 3, 6, 7, 8), 2) == "2,3|6,7"


def test_yarn_stretches_the_positions(model: Path) -> None:
    arguments = engine_arguments(EngineSettings(str(model), "m", yarn_factor=4.0), CPU, 1)
    assert "--max-model-len=131072" in arguments
    overrides = json.loads(next(a for a in arguments if a.startswith("--hf-overrides")).split("=", 1)[1])
    assert overrides == {
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32768
        },
        "max_position_embeddings": 131072,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("size", "hardware", "words"),
    [(4, CPU, "2 experts"), (2, Hardware(1, (0,)), "GPUs"), (4, Hardware(4, (0,)), "experts")],
)
def test_what_vllm_would_refuse_is_one_sentence(model: Path, size: int, hardware: Hardware, words: str) -> None:
    with pytest.raises(UserError, match=words):
        engine_arguments(EngineSettings(str(model), "m", tensor_parallel_size=size), hardware, 1)


@pytest.mark.parametrize(
    ("hardware", "settings", "words"),
    [
        (CPU, {"pipeline_parallel_size": 2}, "CPU build runs one model by tensor parallelism alone"),
        (CPU, {"data_parallel_size": 2}, "CPU build runs one model by tensor parallelism alone"),
        (CPU, {"distributed_executor_backend": "ray"}, "serving.distributed_executor_backend to null"),
        (Hardware(3, (0,)), {"tensor_parallel_size": 2, "data_parallel_size": 2}, "data_parallel_size 2 needs 4 GPUs"),
        (Hardware(8, (0,)), {"pipeline_parallel_size": 5}, "more than the 4 layers"),
        (Hardware(8, (0,)), {"tensor_parallel_size": 2, "data_parallel_size": 2, "enable_expert_parallel": True},
         "4 cards .* are more than the 2 experts .* would hold none"),
    ],
)  # fmt: skip
def test_a_split_that_cannot_be_is_one_sentence(
    model: Path, hardware: Hardware, settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        engine_arguments(EngineSettings(str(model), "m", **settings), hardware, 1)


def test_a_missing_model_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="merge it first"):
        engine_arguments(EngineSettings(str(tmp_path / "nothing"), "m"), CPU, 1)


def test_a_port_in_use_is_one_sentence(model: Path) -> None:
    with listening_socket("127.0.0.1", 0) as taken, pytest.raises(UserError, match="in use"):
        listening_socket("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(UserError, match="cannot"):
        listening_socket("192.0.2.77", 80)


def test_a_server_for_a_block(model: Path, pids: Path, tmp_path: Path) -> None:
    state = tmp_path / "state.json"
    assert find_server(state) is None
    settings = EngineSettings(str(model), "m")
    with running_server(settings, log=tmp_path / "log", state=state) as server:
        assert chat(server.url, "m", USER).text == "42"
        found = find_server(state, "m")
        assert found is not None
        assert found.url == server.url
        assert find_server(state, "another") is None
        running = processes(pids)
    assert not state.exists()
    assert not any(alive(pid) for pid in running)
    assert gc.get_freeze_count() == 0  # what the caller has is still collected


@pytest.mark.parametrize("behaviour", ["", "stubborn"])
def test_an_error_inside_the_block_ends_everything(
    model: Path, pids: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, behaviour: str
) -> None:
    monkeypatch.setenv("FAKE_ENGINE", behaviour)
    with pytest.raises(KeyboardInterrupt), Engine(EngineSettings(str(model), "m"), tmp_path / "log"):
        raise KeyboardInterrupt
    assert not any(alive(pid) for pid in processes(pids))


def test_an_engine_that_dies_on_start_says_why(
    model: Path, pids: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_ENGINE", "crash")
    with pytest.raises(UserError, match="ValueError: the KV cache does not fit") as caught:
        Engine(EngineSettings(str(model), "m"), tmp_path / "log").__enter__()
    assert "exit code 1" in str(caught.value)
    assert all_gone(processes(pids))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_serve_ends_cleanly(model: Path, pids: Path, tmp_path: Path, number: signal.Signals) -> None:
    process, url = serve_apart(EngineSettings(str(model), "m"), tmp_path)
    assert chat(url, "m", USER).text == "42"
    process.send_signal(number)
    assert process.wait(timeout=20) == 0, (tmp_path / SAID).read_text()
    assert not any(alive(pid) for pid in processes(pids))
    assert not (tmp_path / "state.json").exists()


def test_a_dead_engine_ends_serve_with_an_error(model: Path, pids: Path, tmp_path: Path) -> None:
    process, _ = serve_apart(EngineSettings(str(model), "m"), tmp_path)
    os.kill(processes(pids)[0], signal.SIGKILL)
    process.wait(timeout=20)
    output = (tmp_path / SAID).read_text()
    assert process.returncode == 2, output
    assert "vLLM ended with exit code 137" in output
    assert str(tmp_path / "vllm.log") in output
    assert all_gone(processes(pids))


def test_the_engine_ends_with_a_parent_that_is_killed(model: Path, pids: Path, tmp_path: Path) -> None:
    process, _ = serve_apart(EngineSettings(str(model), "m"), tmp_path)
    process.kill()
    process.communicate()
    assert all_gone(processes(pids))
    assert find_server(tmp_path / "state.json") is None
