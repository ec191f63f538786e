import time

import pytest

from serving.guard import schema
from serving.guard.schema import Checker, CheckerCache, NotCompiled, SchemaError


@pytest.mark.parametrize(
    "wrong",
    [
        {"$ref": "http://127.0.0.1:1/schema.json"},
        {"$ref": "file:///etc/passwd"},
        {"$id": "http://169.254.169.254/latest/meta-data/", "properties": {"a": {"$ref": "token"}}},
        {"$schema": "https://example.org/own-dialect"},
        {"$ref": "#/$defs/missing"},
        {"type": "dict"},
        {"pattern": "("},
        {"required": "name"},
        5,
        None,
        ["object"],
    ],
)
def test_unusable_schemas_are_refused(wrong: object) -> None:
    with pytest.raises(SchemaError):
        Checker(wrong)


def test_large_and_deep_schemas_are_refused() -> None:
    deep: dict[str, object] = {}
    for _ in range(5000):
        deep = {"not": deep}
    with pytest.raises(SchemaError):
        CheckerCache().get(deep)
    with pytest.raises(SchemaError):
        CheckerCache().get({"enum": ["x" * schema.MAX_SCHEMA_BYTES]})


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"anyOf": [{"const": number} for number in range(10_000)]}, "10,000 alternatives"),
        ({"allOf": [{"$ref": "#"} for _ in range(3000)]}, "3,000 references"),
        (
            {
                "$defs": {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(1500)} | {"d1500": {}},
                "$ref": "#/$defs/d0",
            },
            "follow",
        ),
        ({"properties": {f"p{i}": {"pattern": f"\\p{{L}}{{1,{100 + i}}}"} for i in range(90)}}, "to compile"),
        ({"patternProperties": {"(": {}}}, "no pattern"),
    ],
)
def test_schemas_that_would_take_long_are_refused_in_time(wrong: dict[str, object], said: str) -> None:
    began = time.monotonic()
    with pytest.raises(SchemaError, match=said):
        CheckerCache().get(wrong)
    assert time.monotonic() - began < 5


def test_what_may_take_long_is_not_compiled_at_once() -> None:
    cache = CheckerCache()
    assert cache.at_once({"type": "integer"}).violations("a")
    for slow in ({"pattern": "a"}, {"enum": list(range(1000))}):
        with pytest.raises(NotCompiled):
            cache.at_once(slow)
        assert cache.get(slow) is cache.at_once(slow)


def test_violations_have_pointer_and_keyword_and_no_content() -> None:
    checker = Checker(
        {
            "type": "object",
            "properties": {"a/b": {"items": {"type": "integer", "maximum": 5}}},
            "required": ["c"],
        }
    )
    found = {(item.path, item.keyword) for item in checker.violations({"a/b": [1, 7, "secret"]})}
    assert found == {("/a~1b/1", "maximum"), ("/a~1b/2", "type"), ("", "required")}
    assert not any("secret" in item.message for item in checker.violations({"a/b": ["secret"], "c": 1}))


def test_loops_end_and_evil_patterns_do_not_stall() -> None:
    assert Checker({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}).violations(1) == []
    tree = {"type": "object", "properties": {"child": {"$ref": "#"}}, "additionalProperties": False}
    assert Checker(tree).violations({"child": {"child": {"other": 1}}})[0].path == "/child/child"
    assert Checker({"type": "string", "pattern": "^(a+)+$"}).violations("a" * 5000 + "b")


def test_the_cache_is_bounded_and_false_refuses_everything() -> None:
    cache = CheckerCache(size=2)
    first = cache.get({"const": 1})
    assert cache.get({"const": 1}) is first
    for number in (2, 3):
        cache.get({"const": number})
    assert cache.get({"const": 1}) is not first
    assert cache.get(False).violations(1)


@pytest.mark.parametrize("inner", [{"pattern": "^a"}, {"enum": ["a"]}, {"maxLength": 3}, {"not": {"const": "SECRET"}}])
def test_the_names_of_properties_are_not_told(inner: object) -> None:
    (found,) = Checker({"propertyNames": inner}).violations({"SECRET": 1})
    assert "SECRET" not in found.message and "SECRET" not in found.path
