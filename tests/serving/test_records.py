"""Records: what is kept of a request, that none that was committed is lost, and that writing never hurts a request."""

import base64
import io
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusion.errors import UserError
from fusion.sections.data import Domain, Rule
from fusion.sections.serving import Records
from serving.records.answer import told
from serving.records.record import Feedback, RoutingRecord, entropy, suspicions
from serving.records.recorder import Ended, Recorder, asked_of, labelled, question_of, record_of
from serving.records.settings import Recording
from serving.records.shares import shares_of
from serving.records.store import Store, opened

NOW = RoutingRecord(
    "a", "/v1/chat/completions", 200, 1.5, violations=["type"], asked=[{"role": "user", "content": "é"}]
)
SOURCE: dict[str, Any] = {"generated": "demo.math"}
DOMAINS = {
    "math": Domain.model_validate({"train": SOURCE, "held_out": SOURCE, "rules": [{"pattern": r"\d"}]}),
    "general": Domain.model_validate({"train": SOURCE, "held_out": SOURCE}),
}


def recording(folder: Path, **settings: Any) -> Recording:
    return Recording(
        f"sqlite:///{folder / 'records.sqlite'}", Records(**settings), DOMAINS, ("g", "m"), {"math": "m"}, (1, 3)
    )


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with opened(f"sqlite:///{tmp_path / 'new' / 'records.sqlite'}") as found:
        yield found


def test_a_record_comes_back_as_it_was(store: Store) -> None:
    whole = replace(
        NOW,
        asker="key 1",
        streamed=True,
        domain="math",
        channel="rules",
        evidence="pattern: '1'",
        channels={"rules": {"domain": "math", "evidence": "pattern: '1'", "confidence": 1.0}},
        shares={"all": {"g": 0.25, "m": 0.75}},
        shares_source="engine",
        answered="\U0001f600",
    )
    store.add([NOW, replace(whole, request_id="b")])
    assert store.find("a") == NOW
    assert store.find("b") == replace(whole, request_id="b")
    assert store.find("c") is None
    assert [record.request_id for record in store.recent(5)] == ["b", "a"]


def test_what_the_background_pass_finds_is_put_down_once(store: Store) -> None:
    store.add([NOW, replace(NOW, request_id="b")], ["shares", None])
    [(number, what, record)] = store.waiting(10)
    assert (what, record) == ("shares", NOW)
    store.fill(number, shares={"all": {"g": 1.0}}, label={"channels": {"rules": {"domain": "general"}}})
    assert store.waiting(10) == []
    found = store.find("a")
    assert found is not None and found.shares == {"all": {"g": 1.0}} and found.shares_source == "explain"
    assert store.want_page("b") and not store.want_page("c")
    [(number, what, _)] = store.waiting(10)
    assert what == "page" and store.page("b") is None
    store.add([replace(NOW, request_id=name) for name in "cde"], ["shares"] * 3)
    assert store.want_page("e")
    assert [record.request_id for _, _, record in store.waiting(10)] == ["b", "e", "c", "d"]  # somebody waits for pages
    store.fill(number, page="<p>")
    assert store.page("b") == "<p>"


def test_old_records_go_and_feedback_stays(store: Store) -> None:
    day = 86400
    store.add([replace(NOW, request_id=str(i), time=time.time() - (9 - i) * day) for i in range(10)])
    store.add_feedback([Feedback("0", "down", messages=[{"role": "user", "content": "x"}])])
    assert store.prune(4.5, 100) == 5
    assert [r.request_id for r in store.recent(20)] == ["9", "8", "7", "6", "5"]
    assert store.prune(100, 3) == 2
    assert [r.request_id for r in store.recent(20)] == ["9", "8", "7"]
    assert store.prune(100, 3) == 0 and store.feedback()[0].request_id == "0"


@pytest.mark.parametrize(
    "url", ["mysql://x", "records.sqlite", "sqlite:////proc/none/x.sqlite", "postgresql://@127.0.0.1:9/x"]
)
def test_an_address_that_is_none_is_one_sentence(url: str) -> None:
    with pytest.raises((UserError, OSError), match=r"store of records|cannot be used|No such file"), opened(url):
        pass


@given(st.integers(1, 40), st.integers(1, 3), st.lists(st.booleans(), min_size=2, max_size=8), st.randoms())
def test_shares_are_of_the_tokens_places_in_sparse_layers(tokens: int, top: int, sparse: list[bool], rng: Any) -> None:
    layers = [i for i, found in enumerate(sparse) if found] or [0]
    routes = np.array([[[rng.randrange(4) for _ in range(top)] for _ in sparse] for _ in range(tokens)], dtype=np.uint8)
    buffer = io.BytesIO()
    np.save(buffer, routes, allow_pickle=False)
    found = shares_of(base64.b64encode(buffer.getvalue()).decode(), "abcd", layers)
    places = [expert for token in routes for layer in layers for expert in token[layer]]
    assert found["all"] == {
        name: pytest.approx(places.count(i) / len(places), abs=1e-4) for i, name in enumerate("abcd")
    }
    assert all(sum(group.values()) == pytest.approx(1, abs=1e-3) for group in found.values())


@pytest.mark.parametrize("array", [np.zeros((2, 3)), np.full((1, 4, 1), 9), np.zeros((0, 4, 1)), np.zeros((1, 2, 1))])
def test_an_account_of_another_model_is_none(array: Any) -> None:
    buffer = io.BytesIO()
    np.save(buffer, array.astype(np.uint8))
    with pytest.raises(ValueError, match="routed_experts"):
        shares_of(base64.b64encode(buffer.getvalue()).decode(), ("g", "m"), (1, 3))


def test_what_an_answer_says_is_read_from_object_and_stream() -> None:
    usage = {"prompt_tokens": 3, "completion_tokens": 2}
    body = {"choices": [{"index": 1, "text": "no"}, {"index": 0, "message": {"content": "hé"}}], "usage": usage}
    assert told(json.dumps(body).encode(), False).text == "hé"
    pieces = [{"choices": [{"index": 0, "delta": {"content": c}}]} for c in "hé"] + [{"choices": [], "usage": usage}]
    stream = b"".join(b"data: " + json.dumps(piece).encode() + b"\n\n" for piece in pieces) + b"data: [DONE]\n\n"
    found = told(stream, True)
    assert (found.text, found.prompt_tokens, found.completion_tokens) == ("hé", 3, 2)
    assert told(stream[:-40], True).text == "hé"  # one that was cut off
    assert told(b"[1]", False).text == told(b"", True).text == ""


def test_a_request_is_labelled_by_its_last_question() -> None:
    messages = [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": "2"}]
    parts = [{"type": "text", "text": "and "}, {"type": "image_url"}, {"type": "text", "text": "you?"}]
    assert question_of({"messages": [*messages, {"role": "user", "content": parts}]}) == "and you?"
    assert question_of({"prompt": "3"}) == "3" and question_of({"prompt": [1, 2]}) == ""
    assert asked_of({"prompt": "3"}) == [{"role": "user", "content": "3"}]


def test_text_is_kept_only_where_the_recipe_says_so(tmp_path: Path) -> None:
    request = {"messages": [{"role": "user", "content": "1+1="}]}
    body = json.dumps({"choices": [{"message": {"content": "2"}}]}).encode()
    ended = Ended("a", "/v1/chat/completions", 200, 3, admitted=request, body=body)
    bare = record_of(ended, recording(tmp_path))
    assert bare.asked is None and bare.answered is None and bare.asker is None
    assert (bare.domain, bare.channel, bare.evidence) == ("math", "rules", "pattern")  # without the text that it quotes
    kept = record_of(replace(ended, asker="0a1b"), recording(tmp_path, prompts=True))
    assert kept.asked == request["messages"] and kept.answered == "2" and kept.asker == "0a1b"
    assert kept.evidence == "pattern: '1'"
    assert record_of(replace(ended, status=422), recording(tmp_path, prompts=True)).answered is None


HOSTILE = "a\0b \ud800 é"  # what JSON may hold and no database does
SPOILT = Ended(
    "spoilt", "/v1/chat/completions", 200, 1, admitted={"messages": [{"role": "user\0", "content": "1" + HOSTILE}]},
    body=json.dumps({"choices": [{"message": {"content": HOSTILE}}]}).encode(),
)  # fmt: skip


def test_text_that_no_database_takes_is_mended(tmp_path: Path) -> None:
    lost: list[int] = []
    told_of = recording(tmp_path, prompts=True)
    with Recorder(told_of, lost.append) as recorder:
        recorder.put(SPOILT)
        recorder.put(Ended("fine", "/v1/completions", 200, 1, admitted={"prompt": "1"}))
    with opened(told_of.url) as store:
        spoilt = store.find("spoilt")
        assert spoilt is not None and store.find("fine") is not None and not lost
    assert spoilt.answered == "a\ufffdb ? é" and spoilt.asked == [{"role": "user\ufffd", "content": "1a\ufffdb ? é"}]


def test_without_a_rule_there_is_no_opinion(tmp_path: Path) -> None:
    request = {"messages": [{"role": "user", "content": "seven plus twelve"}]}
    record = record_of(Ended("a", "/v1/completions", 200, 1, admitted=request), recording(tmp_path))
    assert (record.domain, record.channel, record.channels) == ("general", "default", {})
    served = replace(record, shares={"all": {"g": 0.05, "m": 0.95}})
    assert suspicions(served, {"math": "m", "general": "g"}) == []


def test_a_long_question_takes_no_longer_than_a_short_one(tmp_path: Path) -> None:
    slow = {"math": DOMAINS["math"].model_copy(update={"rules": (Rule(pattern=r"\d+ *[-+*] *\d+"),)})}
    began = time.perf_counter()
    label = labelled({"prompt": "1" * 200_000}, replace(recording(tmp_path), domains={**slow, **DOMAINS}))
    assert time.perf_counter() - began < 5 and label["domain"] == "math"  # quadratic in what is looked at
    ends = labelled({"prompt": "x" * 100_000 + " 1"}, recording(tmp_path))
    assert ends["channel"] == "rules"


def test_what_looks_misrouted_is_told_and_nothing_else() -> None:
    of = {"math": "m", "general": "g"}
    fine = replace(NOW, domain="math", channels={"rules": {"domain": "math"}}, shares={"all": {"g": 0.1, "m": 0.9}})
    assert suspicions(fine, of) == [] == suspicions(NOW, of)
    assert suspicions(replace(fine, domain="general", channels={}), of) == ["labelled general, served by m"]
    assert suspicions(replace(fine, status=422, attempts=3), of) == ["no answer as asked in 3 attempts"]
    assert suspicions(replace(fine, status=422, violations=[]), of) == []  # a policy's
    assert "no expert stands out" in suspicions(replace(fine, shares={"all": {"g": 0.45, "m": 0.55}}), of)[0]
    channels = {"rules": {"domain": "math"}, "classifier": {"domain": "general"}}
    assert suspicions(replace(fine, channels=channels), of) == ["label channels disagree: general, math"]
    assert entropy({"all": {"g": 0.5, "m": 0.5}}) == 1.0 and entropy({"all": {"g": 1.0, "m": 0.0}}) == 0.0


def test_everything_that_was_handed_over_is_written(tmp_path: Path) -> None:
    lost: list[int] = []
    told_of = recording(tmp_path, queue=5000)
    with Recorder(told_of, lost.append) as recorder:
        for i in range(2000):
            recorder.put(Ended(str(i), "/v1/completions", 200, 1, admitted={"prompt": "1"}))
    with opened(told_of.url) as store:
        assert store.count() == 2000 and not lost
        assert [r.request_id for r in store.recent(3)] == ["1999", "1998", "1997"]


def test_a_full_queue_and_a_broken_database_drop_records_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost: list[int] = []
    told_of = recording(tmp_path, queue=4)
    with Recorder(told_of, lost.append) as recorder:
        (tmp_path / "records.sqlite").unlink()
        (tmp_path / "records.sqlite").mkdir()
        recorder.store._engine.dispose()  # so that the next transaction opens what is no database any more
        began = time.perf_counter()
        for i in range(500):
            recorder.put(Ended(str(i), "/v1/completions", 200, 1, admitted={"prompt": "1"}))
        assert time.perf_counter() - began < 5
    assert sum(lost) == 500


WRITER = """
import sys
from serving.records.record import RoutingRecord
from serving.records.store import opened
with opened(sys.argv[1]) as store:
    for number in range(10**9):
        store.add([RoutingRecord(str(2 * number + i), "/v1/completions", 200, 1.0) for i in range(2)])
        print(number, flush=True)
"""


def test_what_was_committed_survives_a_kill(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'records.sqlite'}"
    committed = -1
    for kill_after in (3, 20, 50):
        process = subprocess.Popen([sys.executable, "-c", WRITER, url], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        for line in process.stdout:
            if int(line) >= kill_after:
                break
        process.send_signal(signal.SIGKILL)
        said = [line, *process.stdout.readlines()]
        process.wait()
        committed = int([one for one in said if one.endswith("\n")][-1])
        with opened(url) as store:
            found = [int(record.request_id) for record in store.recent(2 * committed + 2)]
            assert found[::-1][-1] >= 2 * committed + 1  # both of the last pair that was told of
            assert len(store.recent(10**6)) % 2 == 0  # and no half of any pair
            store.prune(1e-9, 10**6)


@contextmanager
def postgres(folder: Path) -> Iterator[str]:
    """A PostgreSQL server of the test's own, on a socket in `folder`; the address of its database."""
    import shutil

    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not found:
        pytest.skip("no PostgreSQL here: install Debian's postgresql")
    user = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"] if Path("/root").stat().st_uid == 0 else []
    if user and not shutil.which("setpriv"):
        pytest.skip("PostgreSQL does not run as root, and there is no setpriv")
    place = Path(subprocess.run(["mktemp", "-d"], capture_output=True, text=True, check=True).stdout.strip())
    if user:
        shutil.chown(place, 65534, 65534)
    try:
        data, program = place / "data", str(found[-1].with_name("postgres"))
        subprocess.run([*user, found[-1], "-D", data, "-U", "qwen", "-A", "trust"], check=True, capture_output=True)
        log = (folder / "postgres.log").open("wb")
        server = subprocess.Popen(
            [*user, program, "-D", data, "-k", place, "-c", "listen_addresses=", "-F"], stdout=log, stderr=log
        )
        try:
            until = time.monotonic() + 60
            while not list(place.glob(".s.PGSQL.*[0-9]")):
                assert server.poll() is None and time.monotonic() < until, (folder / "postgres.log").read_text()
                time.sleep(0.05)
            yield f"postgresql://qwen@/postgres?host={place}"
        finally:
            server.send_signal(signal.SIGINT)
            server.wait(30)
    finally:
        shutil.rmtree(place)


def test_processes_that_start_at_once_make_one_set_of_tables(tmp_path: Path) -> None:
    program = "import sys; from serving.records.store import opened\nwith opened(sys.argv[1]) as s: print(s.count())"
    with postgres(tmp_path) as url:
        starts = [
            subprocess.Popen([sys.executable, "-c", program, url], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            for _ in range(4)
        ]
        assert [(start.communicate()[0], start.returncode) for start in starts] == [(b"0\n", 0)] * 4


def test_several_replicas_write_to_one_postgresql(tmp_path: Path) -> None:
    with postgres(tmp_path) as url:
        first = replace(recording(tmp_path, queue=1000, prompts=True), url=url)
        with Recorder(first) as one, Recorder(first) as two:
            for i in range(300):
                (one, two)[i % 2].put(Ended(str(i), "/v1/completions", 200, 1, admitted={"prompt": "1\0"}))
            two.put(SPOILT)
        with opened(url) as store:
            assert store.count() == 301 and store.find("299") is not None and store.find("spoilt") is not None
            store.add_feedback([Feedback("299", "up", messages=[{"role": "user", "content": "é"}])])
            assert store.feedback()[0].messages == [{"role": "user", "content": "é"}]
            assert store.prune(30, 10) == 291
