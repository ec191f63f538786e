"""vLLM's OpenAI server as a child process on a loopback port, with the right arguments for the hardware.

with Engine(EngineSettings(model="runs/demo/fused", served_name="demo")) as engine:
    print(engine.url)
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from fusion.cpu import cpu_has_bfloat16
from fusion.errors import UserError
from fusion.progress import console, quiet
from fusion.provenance import version_of
from serving import supervisor

LOG_LINES = 15
GRACE_S = 15.0
_IMPORTANT = re.compile(r"(?:\w+\.)*(\w*(?:Error|Exception): .+)")
_NOISE = re.compile(r"nanobind: | - ")
_NOT_THE_CAUSE = ("See root cause above", "See stack trace for root cause")


@dataclass(frozen=True)
class EngineSettings:
    """What vLLM serves and how.

    `dtype` `auto` is the checkpoint's, and float32 on a CPU that would have to emulate bfloat16, which takes
    several times as long. `yarn_factor` stretches the model's positions by that factor. `cpu_kv_cache_bytes` is
    used on CPU, where a share of all memory would be asked for per worker; `gpu_memory_utilization` on GPU.
    `kv_cache_bytes` is a worker's cache whatever the hardware. `compact_json` writes constrained JSON without any
    white space, so that no model can fill its budget with spaces; experts trained on another style answer better
    without it. `pipeline_parallel_size` stages of layers times `data_parallel_size` ranks take `tensor_parallel_size`
    cards each; with `distributed_executor_backend` `ray` they may be other machines'. `quantization` `fp8` lets vLLM
    convert the linear maps while it loads. `live_gates` opens vLLM's development routes, by which new gates come in
    (serving/swap.py), to whoever reaches the loopback port. `lora_modules` are names and folders of adapters that
    requests may name as their model. With `routed_experts` an answer on GPUs tells the experts of every token.
    """

    model: str
    served_name: str
    dtype: str = "auto"
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    data_parallel_size: int = 1
    distributed_executor_backend: str | None = None
    enable_expert_parallel: bool = False
    quantization: str | None = None
    gpu_memory_utilization: float = 0.9
    max_model_len: int | None = None
    yarn_factor: float | None = None
    cpu_kv_cache_bytes: int = 1 << 30
    kv_cache_bytes: int | None = None
    temperature: float = 0.7
    top_p: float = 0.9
    compact_json: bool = False
    prefix_caching: bool = True
    live_gates: bool = False
    lora_modules: tuple[tuple[str, str], ...] = ()
    max_lora_rank: int = 16
    routed_experts: bool = False


@dataclass(frozen=True)
class Hardware:
    """The GPUs vLLM can use (0: it runs on the CPU), the ids of the CPU cores of this process, and whether what it runs
    on multiplies bfloat16."""

    gpus: int
    cores: tuple[int, ...]
    bfloat16: bool = True


def detect_hardware() -> Hardware:
    """What is here, without loading torch: no GPU is counted where vLLM's CPU build is installed."""
    cores = tuple(sorted(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else (0,)
    if version_of("vllm") is None:
        return Hardware(0, cores, cpu_has_bfloat16())
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return Hardware(len([device for device in visible.split(",") if device.strip() not in ("", "-1")]), cores)
    return Hardware(len([device for device in Path("/dev").glob("nvidia*") if device.name[6:].isdigit()]), cores)


def engine_arguments(settings: EngineSettings, hardware: Hardware, port: int) -> list[str]:
    """The arguments of vLLM's API server. Raises UserError where the model cannot run that way."""
    config = model_config(settings.model)
    _check_parallel(settings, hardware, config)
    structured = {"backend": "xgrammar", "disable_any_whitespace": settings.compact_json}
    sampling = {"temperature": settings.temperature, "top_p": settings.top_p}
    arguments = [
        f"--model={settings.model}",
        f"--served-model-name={settings.served_name}",
        "--host=127.0.0.1",
        f"--port={port}",
        f"--dtype={'float32' if settings.dtype == 'auto' and not hardware.bfloat16 else settings.dtype}",
        f"--tensor-parallel-size={settings.tensor_parallel_size}",
        "--enable-auto-tool-choice",
        "--tool-call-parser=hermes",
        f"--structured-outputs-config={json.dumps(structured)}",
        "--generation-config=vllm",
        f"--override-generation-config={json.dumps(sampling)}",
    ]
    if settings.pipeline_parallel_size > 1:
        arguments.append(f"--pipeline-parallel-size={settings.pipeline_parallel_size}")
    if settings.data_parallel_size > 1:
        arguments.append(f"--data-parallel-size={settings.data_parallel_size}")
    if settings.distributed_executor_backend is not None:
        arguments.append(f"--distributed-executor-backend={settings.distributed_executor_backend}")
    if settings.enable_expert_parallel:
        arguments.append("--enable-expert-parallel")
    if settings.quantization == "fp8":
        _check_quantization(settings, hardware)
        arguments.append("--quantization=fp8_per_tensor")  # plain `fp8` is vLLM 0.32's deprecated name for it
    if not settings.prefix_caching:
        arguments.append("--no-enable-prefix-caching")
    if settings.live_gates:
        arguments.append("--worker-extension-cls=serving.live_gates.LiveGates")
    if settings.lora_modules:
        count = len(settings.lora_modules)
        arguments += ["--enable-lora", f"--max-loras={count}", f"--max-lora-rank={settings.max_lora_rank}"]
        arguments += ["--lora-modules", *(f"{name}={folder}" for name, folder in settings.lora_modules)]
    if settings.routed_experts and hardware.gpus:
        arguments.append("--enable-return-routed-experts")
    length = settings.max_model_len
    if settings.yarn_factor is not None:
        overrides = yarn_overrides(config, settings.yarn_factor)
        arguments.append(f"--hf-overrides={json.dumps(overrides)}")
        length = length or overrides["max_position_embeddings"]
    if length is not None:
        arguments.append(f"--max-model-len={length}")
    if hardware.gpus:
        arguments.append(f"--gpu-memory-utilization={settings.gpu_memory_utilization}")
        if settings.kv_cache_bytes is not None:
            arguments.append(f"--kv-cache-memory-bytes={settings.kv_cache_bytes}")
    else:
        cache = settings.kv_cache_bytes or settings.cpu_kv_cache_bytes
        arguments += [f"--kv-cache-memory-bytes={cache}", "--enforce-eager"]
        # vLLM 0.32's CPU build ends when a request with a seed has its prompt cut ("CPU Generator does not use offset")
        arguments.append("--no-enable-chunked-prefill")
    return arguments


def engine_environment(settings: EngineSettings, hardware: Hardware) -> dict[str, str]:
    """The variables vLLM's processes get beside those of this one: on CPU, which cores each worker runs on."""
    variables = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    if settings.live_gates:
        variables["VLLM_SERVER_DEV_MODE"] = "1"
    if not hardware.gpus:
        variables["VLLM_CPU_OMP_THREADS_BIND"] = core_binding(hardware.cores, settings.tensor_parallel_size)
        variables["CUDA_VISIBLE_DEVICES"] = ""
    elif settings.routed_experts:
        variables["VLLM_USE_V2_MODEL_RUNNER"] = "1"
    return variables


def core_binding(cores: tuple[int, ...], workers: int) -> str:
    """Cores of each worker in vLLM's spelling: "0,1" for one, "0|1" for two, "0|1|0|1" for four on two cores."""
    if len(cores) < workers:
        return "|".join(str(cores[rank % len(cores)]) for rank in range(workers))
    share = len(cores) // workers
    return "|".join(",".join(map(str, cores[rank * share : (rank + 1) * share])) for rank in range(workers))


def yarn_overrides(config: dict[str, Any], factor: float) -> dict[str, Any]:
    """vLLM's --hf-overrides for YaRN: both spellings of the base, and positions already multiplied by the factor."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    original = int(rope.get("original_max_position_embeddings") or config["max_position_embeddings"])
    theta = rope.get("rope_theta") or config.get("rope_theta") or 10000.0
    parameters = {
        "rope_type": "yarn",
        "rope_theta": theta,
        "factor": factor,
        "original_max_position_embeddings": original,
    }
    return {"rope_parameters": parameters, "max_position_embeddings": int(original * factor)}


def model_config(model: str) -> dict[str, Any]:
    """config.json of a model folder or hub id. Raises UserError when it is not there."""
    path = Path(model) / "config.json"
    if not path.is_file():
        if Path(model).is_absolute() or Path(model).exists() or model.count("/") != 1:
            raise UserError(f"no model to serve in {model} (config.json is missing): merge it first")
        from huggingface_hub import hf_hub_download

        try:
            path = Path(hf_hub_download(model, "config.json"))
        except Exception as error:
            reason = str(error).split("\n")[0]
            raise UserError(f"the model {model} is neither a folder nor reachable on the hub ({reason})") from None
    config: dict[str, Any] = json.loads(path.read_text())
    return config


def free_port() -> int:
    """A loopback port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _check_quantization(settings: EngineSettings, hardware: Hardware) -> None:
    if not hardware.gpus:
        raise UserError(
            f"{settings.model} cannot be served as FP8 here: vLLM's CPU build has no kernel for experts of one scale "
            "each, set serving.quantization to null"
        )
    if "quantization_config" in model_config(settings.model):
        raise UserError(f"{settings.model} is quantised already: set serving.quantization to null")
    if settings.dtype == "float32":
        raise UserError("FP8 weights go with bfloat16 or float16 activations: set serving.dtype to auto")


def _check_parallel(settings: EngineSettings, hardware: Hardware, config: dict[str, Any]) -> None:
    size = settings.tensor_parallel_size
    experts = config.get("num_experts")
    if experts is not None and size > experts:
        raise UserError(
            f"tensor_parallel_size {size} is more than the {experts} experts of {settings.model}, which vLLM refuses: "
            f"set serving.tensor_parallel_size to {experts} or less"
        )
    heads = config.get("num_attention_heads")
    if heads is not None and heads % size:
        raise UserError(
            f"tensor_parallel_size {size} does not divide the {heads} attention heads of {settings.model}: "
            "set serving.tensor_parallel_size to a divisor"
        )
    _check_stages_and_ranks(settings, hardware, config)


def _check_stages_and_ranks(settings: EngineSettings, hardware: Hardware, config: dict[str, Any]) -> None:
    size, stages, ranks = settings.tensor_parallel_size, settings.pipeline_parallel_size, settings.data_parallel_size
    experts = config.get("num_experts")
    layers = config.get("num_hidden_layers")
    if layers is not None and stages > layers:
        raise UserError(
            f"pipeline_parallel_size {stages} is more than the {layers} layers of {settings.model}: "
            f"set serving.pipeline_parallel_size to {layers} or less"
        )
    if experts is not None and settings.enable_expert_parallel and size * ranks > experts:
        raise UserError(
            f"{size * ranks} cards (tensor_parallel_size x data_parallel_size) are more than the {experts} experts of "
            f"{settings.model}, and some would hold none: set serving.enable_expert_parallel to false"
        )
    ray = settings.distributed_executor_backend == "ray"
    if not hardware.gpus and (stages > 1 or ranks > 1 or ray):
        raise UserError(
            "vLLM's CPU build runs one model by tensor parallelism alone: set serving.pipeline_parallel_size and "
            "serving.data_parallel_size to 1, and serving.distributed_executor_backend to null"
        )
    if hardware.gpus and not ray and size * stages * ranks > hardware.gpus:
        wanted = [f"tensor_parallel_size {size}"]
        wanted += [f"pipeline_parallel_size {stages}"] * (stages > 1) + [f"data_parallel_size {ranks}"] * (ranks > 1)
        elsewhere = (
            "" if ranks > 1 else ", or serving.distributed_executor_backend to ray where other machines have more"
        )
        raise UserError(
            f"{' x '.join(wanted)} needs {size * stages * ranks} GPUs and {hardware.gpus} can be seen: set it to what "
            f"is there{elsewhere}"
        )


class Engine:
    """A running vLLM server: started and healthy inside the `with` block, gone with all its workers after it.

    Its workers also end when this process is killed. Raises UserError, with the log's last lines, when vLLM dies.
    """

    def __init__(
        self,
        settings: EngineSettings,
        log: Path | None = None,
        hardware: Hardware | None = None,
        start_timeout_s: float = 1800.0,
    ) -> None:
        self.settings = settings
        self.hardware = hardware or detect_hardware()
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log or Path.cwd() / "vllm.log"
        self.start_seconds = 0.0
        self._start_timeout_s = start_timeout_s
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        try:
            self._wait_until_healthy()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def start(self) -> None:
        """Starts the process without waiting for it. Raises UserError where the settings cannot work."""
        server = [sys.executable, "-W", "ignore", "-m", "vllm.entrypoints.openai.api_server"]
        command = [*server, *engine_arguments(self.settings, self.hardware, self.port)]
        environment = {**os.environ, **engine_environment(self.settings, self.hardware)}
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as log:
            self._process = supervisor.start(command, GRACE_S, stdout=log, stderr=subprocess.STDOUT, env=environment)

    def alive(self) -> bool:
        """True while vLLM's process runs."""
        return self._process is not None and self._process.poll() is None

    def check(self) -> None:
        """Raises UserError with the log's last lines when vLLM has ended by itself."""
        if self._process is None or self.alive():
            return
        code = self._process.returncode
        raise UserError(f"vLLM ended with exit code {code} (log: {self.log}){log_cause(self.log)}")

    def healthy(self) -> bool:
        """True when vLLM answers its health check."""
        return is_healthy(self.url)

    def stop(self) -> None:
        """Ends vLLM and all its workers; waits until they are gone."""
        process, self._process = self._process, None
        if process is None:
            return
        with _interrupts_held():
            if process.stdin is not None:
                process.stdin.close()
            try:
                process.wait(GRACE_S + 10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _wait_until_healthy(self) -> None:
        begin = time.monotonic()
        where = f"{self.hardware.gpus} GPUs" if self.hardware.gpus else "CPU"
        text = f"starting vLLM for {self.settings.served_name} on {where}"
        with nullcontext() if quiet() else console.status(text) as status:
            while not self.healthy():
                self.check()
                self.start_seconds = time.monotonic() - begin
                if self.start_seconds > self._start_timeout_s:
                    raise UserError(f"vLLM was not ready after {self.start_seconds:.0f} s: its log is {self.log}")
                if status is not None:
                    status.update(f"{text}: {self.start_seconds:.0f} s")
                time.sleep(0.25)


def is_healthy(url: str, timeout_s: float = 5.0, path: str = "/health") -> bool:
    """True when GET of the path answers 200."""
    try:
        with urllib.request.urlopen(f"{url}{path}", timeout=timeout_s) as answer:
            return bool(answer.status == 200)
    except (OSError, ValueError):
        return False


def log_cause(log: Path) -> str:
    """ ": ErrorName: words", the last error the log names, and its last lines below; empty when there is no log."""
    if not log.is_file():
        return ""
    lines = [line for line in log.read_text(errors="replace").split("\n") if line.strip() and not _NOISE.match(line)]
    matches = [match for line in lines if (match := _IMPORTANT.search(line))]
    causes = [match[1].strip() for match in matches if not any(mark in match[1] for mark in _NOT_THE_CAUSE)]
    tail = "\n".join(["", *lines[-LOG_LINES:]])
    return (f": {causes[-1]}" if causes else "") + f"\nlast lines of the log:{tail}"


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """A second Ctrl-C must not leave workers behind; threads other than the main one get no signals anyway."""
    try:
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    except ValueError:
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
