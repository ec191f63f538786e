"""Two replicas, each a real vLLM on the CPU with its guard, behind Debian's nginx with the configuration that ships."""

import json
import re
import shutil
import signal
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from itertools import count
from pathlib import Path

import pytest

from fusion.sections.serving import Guarding
from serving.engine import EngineSettings, free_port, is_healthy
from tests.families import write_model
from tests.serving.apart import serve_apart
from tests.serving.processes import command_of, descendants
from tests.serving.waiting import wait_for

CONF = Path(__file__).parents[2] / "configs" / "deploy" / "nginx.conf"
START_S = 400.0
WATCHED_S = 3.0  # of load before and after what happens to a replica


@dataclass(frozen=True)
class Asked:
    """One request of the load: when it was sent, by `time.monotonic`, its id, and its status; 0 for a broken answer, of
    which `broke` tells how it ended."""

    sent: float
    id: str
    status: int
    broke: str = ""


class Replicas:
    """nginx in front of two replicas, and the replicas by port."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.ports = [free_port(), free_port()]
        self.running: dict[int, subprocess.Popen[str]] = {}
        self.model = write_model(folder / "model", seed=3)

    def start(self, port: int) -> None:
        """Starts the replica of that port and waits until it is ready."""
        own = self.folder / str(port)
        own.mkdir(exist_ok=True)
        settings = EngineSettings(
            str(self.model), "tiny", dtype="float32", max_model_len=512, cpu_kv_cache_bytes=64 << 20
        )
        self.running[port] = serve_apart(settings, own, START_S, port)[0]

    def nginx(self, *options: str, down: int | None = None) -> None:
        """Runs nginx on the shipped configuration, with these ports and `down` behind one of them."""
        text = CONF.read_text(encoding="utf-8").replace("listen 8000;", f"listen 127.0.0.1:{self.port};")
        for shipped, port in zip((8001, 8002), self.ports, strict=True):
            text = text.replace(f":{shipped} ", f":{port} {'down ' if port == down else ''}")
        (self.folder / "nginx.conf").write_text(text, encoding="utf-8")
        place = ["-p", str(self.folder), "-c", str(self.folder / "nginx.conf")]
        subprocess.run(["nginx", *place, *options], check=True, capture_output=True)

    def reload(self, down: int | None) -> None:
        """The same with `-s reload`, until no request can reach a worker that has the former configuration."""
        before = self._workers()
        self.nginx("-s", "reload", down=down)
        assert wait_for(lambda: bool(self._workers()) and not before & self._workers())

    def _workers(self) -> set[int]:
        master = int((self.folder / "nginx.pid").read_text())
        return {pid for pid in descendants(master) if "shutting down" not in command_of(pid)}

    def went(self, asked: Iterable[Asked]) -> dict[str, list[int]]:
        """By id, the ports that each of these requests went to, in turn, as the access log has them."""
        ids = {one.id for one in asked}

        def logged() -> dict[str, list[int]]:
            lines = (self.folder / "access.log").read_text().splitlines()
            found = {
                line.split(" ")[1]: [int(port) for port in re.findall(r"127\.0\.0\.1:(\d+)", line)] for line in lines
            }
            return {name: found[name] for name in ids & set(found)}

        assert wait_for(lambda: len(logged()) == len(ids))  # a line is written once its answer has gone out
        return logged()


@pytest.fixture(scope="module")
def replicas(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Replicas]:
    """Both replicas and nginx, running."""
    if shutil.which("nginx") is None:
        pytest.skip("nginx is not installed (apt-get install nginx-light)")
    found = Replicas(tmp_path_factory.mktemp("replicas"))
    try:
        with ThreadPoolExecutor() as pool:
            list(pool.map(found.start, found.ports))
        found.nginx()
        yield found
        found.nginx("-s", "stop")
    finally:
        for process in found.running.values():
            process.terminate()
        for process in found.running.values():
            process.communicate(timeout=60)


def request(url: str, stream: bool = False, tokens: int = 24, name: str = "") -> urllib.request.Request:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "stream": stream}
    body |= {"max_tokens": tokens, "min_tokens": tokens, "ignore_eos": True}
    headers = {"content-type": "application/json", "x-request-id": name}
    return urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(body).encode(), headers)


def ask(url: str, name: str, stream: bool) -> Asked:
    sent = time.monotonic()
    try:
        with urllib.request.urlopen(request(url, stream, name=name), timeout=60) as answer:
            whole = answer.read()
            ended = whole.endswith(b"data: [DONE]\n\n") if stream else whole.endswith(b"}")
            if ended and b'"error"' not in whole:
                return Asked(sent, name, answer.status)
            broke = repr(whole[-200:])
    except urllib.error.HTTPError as error:
        return Asked(sent, name, error.code)
    except (OSError, HTTPException) as error:
        broke = repr(error)
    return Asked(sent, name, 0, f"{time.monotonic() - sent:.1f} s: {broke}")


@contextmanager
def load(url: str, name: str, clients: int = 6) -> Iterator[Callable[[], list[Asked]]]:
    """Requests without a pause, every other one a stream, until the function that it gives, which returns them."""
    over, made = threading.Event(), [list[Asked]() for _ in range(clients)]

    def client(number: int) -> None:
        while not over.is_set():
            index = len(made[number])
            made[number].append(ask(url, f"{name}-{number}-{index}", stream=index % 2 == 1))

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()

    def finish() -> list[Asked]:
        over.set()
        for thread in threads:
            thread.join()
        return [one for of_client in made for one in of_client]

    try:
        yield finish
    finally:
        finish()


def test_both_replicas_are_asked(replicas: Replicas) -> None:
    with load(replicas.url, "both") as finish:
        time.sleep(WATCHED_S)
        asked = finish()
    assert {one.status for one in asked} == {200}
    went = replicas.went(asked)
    assert all(len(ports) == 1 for ports in went.values())
    shares = Counter(ports[0] for ports in went.values())
    assert set(shares) == set(replicas.ports)  # how many each depends on which one the machine has time for


def spread(url: str) -> float:
    """Seconds from a stream's first event to its last."""
    with urllib.request.urlopen(request(url, stream=True, tokens=48), timeout=60) as answer:
        times = [time.monotonic() for line in answer if line.startswith(b"data:")]
    assert len(times) > 2  # a busy machine puts several tokens into one event
    return times[-1] - times[0]


def test_streams_arrive_as_they_are_made(replicas: Replicas) -> None:
    direct = min(spread(f"http://127.0.0.1:{replicas.ports[0]}") for _ in range(3))
    assert max(spread(replicas.url) for _ in range(3)) > direct / 2  # all at once where they are kept back


def test_ids_sizes_and_what_is_not_shown(replicas: Replicas) -> None:
    with urllib.request.urlopen(request(replicas.url, name="mine-1"), timeout=60) as answer:
        assert answer.headers["x-request-id"] == "mine-1"
    with urllib.request.urlopen(request(replicas.url, name="no id"), timeout=60) as answer:
        assert re.fullmatch(r"[0-9a-f]{32}", answer.headers["x-request-id"])
    assert is_healthy(replicas.url) and is_healthy(replicas.url, path="/ready")
    assert is_healthy(f"http://127.0.0.1:{replicas.ports[0]}", path="/metrics")
    assert not is_healthy(replicas.url, path="/metrics")
    large = urllib.request.Request(
        f"{replicas.url}/v1/chat/completions",
        b" " * (Guarding().max_body_bytes + 1),
        {"content-type": "application/json"},
    )
    with pytest.raises(urllib.error.HTTPError, match="413"):
        urllib.request.urlopen(large, timeout=60)


def test_a_killed_replica_fails_what_it_was_answering_alone_and_comes_back(replicas: Replicas) -> None:
    lost = replicas.ports[1]
    with load(replicas.url, "kill") as finish:
        time.sleep(WATCHED_S)
        process = replicas.running.pop(lost)
        process.kill()
        process.communicate()
        gone = time.monotonic()
        time.sleep(WATCHED_S)
        asked = finish()
    failed, went = [one for one in asked if one.status != 200], replicas.went(asked)
    assert all(one.sent < gone for one in failed)
    assert all(went[one.id] == [lost] for one in failed)  # and none of them was generated twice
    assert any(one.sent > gone for one in asked)
    assert {one.status for one in failed} <= {502, 0}

    replicas.start(lost)
    numbers = count()

    def is_asked() -> bool:
        one = ask(replicas.url, f"back-{next(numbers)}", stream=False)
        assert one.status == 200
        return replicas.went([one])[one.id] == [lost]

    assert wait_for(is_asked, within_s=30)  # fail_timeout is 10 s


def test_a_drained_replica_fails_nothing(replicas: Replicas) -> None:
    drained = replicas.ports[0]
    with load(replicas.url, "drain") as finish:
        time.sleep(WATCHED_S)
        replicas.reload(down=drained)
        time.sleep(1)  # as the configuration has it: what a worker has sent may not be accepted yet
        process = replicas.running.pop(drained)
        process.send_signal(signal.SIGTERM)
        told = time.monotonic()
        assert process.wait(Guarding().drain_s + 30) == 0
        time.sleep(WATCHED_S)
        asked = finish()
    assert [one for one in asked if one.status != 200] == []
    went = replicas.went(asked)
    assert any(went[one.id] == [drained] for one in asked)
    assert all(went[one.id] == [replicas.ports[1]] for one in asked if one.sent > told)


def test_the_limits_are_the_guards() -> None:
    text = CONF.read_text(encoding="utf-8")
    megabytes, seconds = (
        re.search(r"client_max_body_size (\d+)m;", text),
        re.search(r"proxy_read_timeout (\d+)s;", text),
    )
    assert megabytes and int(megabytes[1]) * 2**20 == Guarding().max_body_bytes
    assert seconds and Guarding().deadline_s < int(seconds[1]) < Guarding().deadline_s + 60
