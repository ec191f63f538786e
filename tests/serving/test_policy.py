"""What may not go in or out: found by check digits and forms, redacted inside a document, refused, or moderated."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusion.sections.serving import Policy
from serving.guard.detectors import spans, word_spans
from serving.guard.policy import INPUT, OUTPUT, Censor, Forbidden
from tests.serving.test_asgi import FORMAT, Start, ask, client
from tests.serving.upstream import completion

CARD, IDENTITY, KEY = "4111 1111 1111 1111", "11010519491231002X", "AKIAIOSFODNN7EXAMPLE"
ALL = ["secrets", "email", "phone", "cn_identity", "bank_card"]


@pytest.mark.parametrize(
    ("detector", "found", "other"),
    [
        ("secrets", KEY, "AKIA of a kind"),
        ("secrets", "-----BEGIN RSA PRIVATE KEY-----\nMIIE\n-----END RSA PRIVATE KEY-----", "a PRIVATE KEY"),
        ("email", "li.lei@mail.example.cn", "li.lei at example"),
        ("phone", "138 0013 8000", "123 4567"),
        ("phone", "+49 30 901820", "+49 3"),
        ("cn_identity", IDENTITY, "110105194912310021"),
        ("bank_card", CARD, "4111 1111 1111 1112"),
        ("bank_card", "6222021234567890128", "6222021234567890127"),
    ],
)
def test_what_a_detector_finds_and_what_not(detector: str, found: str, other: str) -> None:
    text = f"it is {found}, says he"
    marked = sorted(spans(text, detector))
    assert text[marked[0][0] : max(end for _, end in marked)] == found
    assert list(spans(f"it is {other}, says he", detector)) == []


def test_blocked_words_are_whole_ones() -> None:
    def found(text: str) -> list[str]:
        return [text[begin:end] for begin, end in word_spans(text, ("Apollo", "机密", "c++"))]

    assert found("APOLLO and apollonian, 这是机密文件, in C++") == ["APOLLO", "机密", "C++"]


def policy(*rules: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"rules": list(rules), **more}


def censor(*rules: dict[str, Any], side: str = OUTPUT) -> Censor:
    return Censor(Policy.model_validate(policy(*rules)), side)


def test_redaction_inside_a_document_leaves_the_rest_as_it_is_written() -> None:
    text = '{ "to" : "a@b.example",  "n": 12345678901234567890, "quote": "say \\"a@b.example\\" \\u00e9" , "x":1.50}'
    found: dict[str, int] = {}
    redacted = censor({"find": ["email"]}).document(text, found)
    assert redacted == (
        '{ "to" : "[redacted: email]",  "n": 12345678901234567890, "quote": "say \\"[redacted: email]\\" é" , "x":1.50}'
    )
    assert found == {"email": 2}
    assert censor({"find": ["email"], "side": "input"}).document(text, {}) == text


def test_a_refused_thing_is_found_outside_of_texts_too() -> None:
    with pytest.raises(Forbidden, match="bank_card"):
        censor({"find": ["bank_card"], "action": "refuse"}).document('{"card": 4111111111111111}', {})
    with pytest.raises(Forbidden, match="request holds"):
        censor({"words": ["apollo"], "action": "refuse"}, side=INPUT).text("Apollo", {})


# a number that is a card is refused, as another test says: these are too short to be one
VALUES = st.recursive(
    st.none() | st.integers(-(10**9), 10**9) | st.text() | st.sampled_from(["a@b.example", f"x {CARD} y", IDENTITY]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
)


@given(VALUES)
def test_a_redacted_document_is_a_document_without_what_was_looked_for(value: Any) -> None:
    everything = censor({"find": ["email", "cn_identity", "bank_card"]})
    found: dict[str, int] = {}
    text = everything.document(json.dumps(value), found)
    json.loads(text)
    for leaf in ("a@b.example", CARD, IDENTITY):
        assert leaf not in text
    assert bool(found) == (text != json.dumps(value))


def test_answers_are_redacted_whether_they_are_json_or_not(guarded: Start) -> None:
    rules = policy({"find": ALL, "side": "output"})
    logprobs = {"content": [{"token": "a@b.example"}]}
    answer = completion('{"a": 1, "b": "a@b.example"}')
    answer["choices"][0]["logprobs"] = logprobs
    guard = guarded(answer, completion("call 138 0013 8000"), policy=rules)
    structured = ask(guard, response_format=FORMAT)
    assert structured.choices[0].message.content == '{"a": 1, "b": "[redacted: email]"}'
    assert structured.choices[0].logprobs is None and structured.model_extra["guard"]["redacted"] == {"email": 1}
    text = "".join(chunk.choices[0].delta.content or "" for chunk in ask(guard, stream=True))
    assert text == "call [redacted: phone]"
    live = ask(guard, stream=True, extra_body={"guard": {"live": True}})  # cannot be live: it is looked at as a whole
    assert "".join(chunk.choices[0].delta.content or "" for chunk in live) == "call [redacted: phone]"


def test_what_cannot_be_redacted_and_stay_as_asked_is_422(guarded: Start) -> None:
    schema = {"type": "object", "properties": {"to": {"type": "string", "format": "email", "pattern": "@"}}}
    wanted = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}
    guard = guarded(completion('{"to": "a@b.example"}'), policy=policy({"find": ["email"]}))
    with pytest.raises(openai.UnprocessableEntityError) as caught:
        ask(guard, response_format=wanted)
    assert caught.value.code == "content_policy" and "a@b" not in caught.value.response.text
    assert len(guard.upstream.requests) == 1


def test_requests_are_redacted_or_refused_before_any_generation(guarded: Start) -> None:
    rules = policy({"find": ["email"], "side": "input"}, {"words": ["apollo"], "side": "input", "action": "refuse"})
    guard = guarded(completion("ok"), policy=rules)
    parts = [{"type": "text", "text": "to a@b.example"}]
    assert ask(guard, messages=[{"role": "user", "content": parts}]).choices[0].message.content == "ok"
    assert guard.upstream.requests[0]["messages"][0]["content"][0]["text"] == "to [redacted: email]"
    assert client(guard).completions.create(model="m", prompt=["a@b.example"], max_tokens=1)
    assert guard.upstream.requests[1]["prompt"] == ["[redacted: email]"]
    for request in ({"messages": [{"role": "user", "content": "About Apollo"}]},):
        with pytest.raises(openai.BadRequestError) as caught:
            ask(guard, **request)
        assert caught.value.code == "content_policy" and "pollo" not in caught.value.response.text
    with pytest.raises(openai.BadRequestError, match="token ids"):
        client(guard).completions.create(model="m", prompt=[1, 2, 3], max_tokens=1)
    assert len(guard.upstream.requests) == 2


@contextmanager
def moderator(word: str) -> Iterator[str]:
    """A moderation server that flags texts with `word` in them."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.headers["content-type"] == "application/json"
            asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
            results = [
                {"flagged": word in text, "categories": {"violence": word in text, "hate": False}}
                for text in asked["input"]
            ]
            body = json.dumps({"id": "m", "model": asked["model"], "results": results}).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_moderation_model_has_the_last_word(guarded: Start) -> None:
    with moderator("fight") as url:
        guard = guarded(completion("peace"), completion("fight"), policy={"moderation": {"url": url, "model": "m"}})
        assert ask(guard).choices[0].message.content == "peace"
        with pytest.raises(openai.UnprocessableEntityError, match="violence") as caught:
            ask(guard)
        assert caught.value.code == "content_policy"
        with pytest.raises(openai.BadRequestError, match="violence"):
            ask(guard, messages=[{"role": "user", "content": "a fight"}])
        assert len(guard.upstream.requests) == 2
    closed = {"moderation": {"url": url, "model": "m", "timeout_s": 2}}
    with pytest.raises(openai.InternalServerError) as unmoderated:
        client(guarded(completion("peace"), policy=closed)).with_options(max_retries=0).chat.completions.create(
            model="m", messages=[{"role": "user", "content": "hello"}]
        )
    assert unmoderated.value.code == "moderation_unavailable"
    closed["moderation"]["fail"] = "open"
    assert ask(guarded(completion("peace"), policy=closed)).choices[0].message.content == "peace"


@pytest.mark.parametrize("number", ["4111111111111111", "13800138000"])
def test_what_is_found_in_a_number_cannot_be_redacted_and_is_refused(guarded: Start, number: str) -> None:
    rule = {"find": ["bank_card", "phone"], "side": "output"}
    guard = guarded(completion(f'{{"a": {number}}}'), policy=policy(rule, phone_regions=["CN"]))
    with pytest.raises(openai.UnprocessableEntityError) as caught:
        ask(guard, response_format={"type": "json_object"})
    assert caught.value.code == "content_policy" and number not in caught.value.response.text
