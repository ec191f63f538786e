"""`qwen-fusion guard` in a process of its own, in front of a server that it did not start."""

import re
import signal
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from serving.client import chat
from serving.records.store import opened
from tests.serving.apart import COMMAND, guard_apart
from tests.serving.upstream import Upstream, completion

USER = [{"role": "user", "content": "Give me a"}]
FORMAT = {"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "object", "required": ["a"]}}}


@pytest.fixture
def upstream() -> Iterator[Upstream]:
    with Upstream(completion('Here: {"b": 1}'), completion('Here: {"a": 1}')) as running:
        yield running


def test_a_server_that_runs_already_is_guarded(upstream: Upstream) -> None:
    process = subprocess.Popen(
        [*COMMAND, "--upstream", f"{upstream.url}/v1", "--port", "0", "--set", "unwrap=true"],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stderr is not None
        line = process.stderr.readline()
        assert f"guarding {upstream.url}, 1,234 tokens on " in line
        found = re.search(r"on (http://[^/]+)/v1", line)
        assert found is not None
        answer = chat(found.group(1), "m", USER, response_format=FORMAT)
        assert (answer.text, answer.attempts) == ('{"a": 1}', 2)
        assert answer.raw["guard"]["unwrapped"] == 1
        sent = upstream.requests[0]  # nothing is filled in that its client did not say
        assert set(sent) == {"model", "messages", "response_format", "stream"}
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0


@pytest.mark.parametrize(
    "arguments",
    [
        *(
            ["--upstream", wrong]
            for wrong in ("http://", "http://a:b", "http://a:99999", "http://a/v2", "http://u:p@a")
        ),
        ["--upstream", "http://a", "--set", f"api_keys_file={COMMAND[0]}"],
        ["--upstream", "http://a", "--set", "records={}"],
        ["--upstream", "http://a", "--set", "records={url: 'mysql://a/b'}"],
        ["--upstream", "http://a", "--set", "records={url: 'sqlite:////proc/none/x.sqlite'}"],
        ["--upstream", "http://a", "--set", "records={explain_share: 0.5}"],
        ["--upstream", "http://a", "--set", "ui=true"],
        ["--upstream", "localhost:8001"],
        ["--upstream", "http://x", "--port", "70000"],
        [],
    ],
)
def test_bad_arguments_are_a_sentence(arguments: list[str]) -> None:
    done = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr and done.stderr.strip()


def test_several_processes_record_into_one_store(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'records.sqlite'}"
    with Upstream(completion("hello")) as upstream:
        process, address = guard_apart(upstream.url, "workers=3", f"records={{url: '{url}', prompts: true}}")
        try:
            asked = [f"question {number}" for number in range(60)]
            with ThreadPoolExecutor(12) as pool:
                list(pool.map(lambda text: chat(address, "m", [{"role": "user", "content": text}]), asked))
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(20)
    with opened(url) as store:
        records = store.recent(100)
    assert sorted(record.asked[0]["content"] for record in records) == sorted(asked)
    assert {record.answered for record in records} == {"hello"}
