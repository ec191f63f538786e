import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.guard.strict_json import Malformed, parse

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(values, st.booleans(), st.sampled_from([None, 1]))
def test_what_json_writes_comes_back(value: object, ascii_only: bool, indent: int | None) -> None:
    assert parse(f" \n{json.dumps(value, ensure_ascii=ascii_only, indent=indent)}\t") == value


@pytest.mark.parametrize(
    ("text", "violation"),
    [
        ("", "empty"),
        ("  \n", "empty"),
        ("\ufeff{}", "byte_order_mark"),
        ('{"a": 1, "b": 2, "a": 1}', "duplicate_key"),
        ('[{"x": {"a": 1, "\\u0061": 2}}]', "duplicate_key"),
        ("NaN", "not_a_number"),
        ("[-Infinity]", "not_a_number"),
        ('{"a": Infinity}', "not_a_number"),
        ("1e400", "number_overflow"),
        ("[-1e999]", "number_overflow"),
        ("9" * 5000, "number_too_long"),
        ('"\\ud800"', "lone_surrogate"),
        ('{"\\udc00": 1}', "lone_surrogate"),
        ('["a\\ud800b"]', "lone_surrogate"),
        ('"\ud800"', "lone_surrogate"),
        ("{} {}", "trailing_text"),
        ('{"a": 1} done', "trailing_text"),
        ("01", "trailing_text"),
        ("[" * 200 + "]" * 200, "too_deep"),
        ('{"a":' * 100_000, "too_deep"),
        ('{"a": 1', "syntax"),
        ("{'a': 1}", "syntax"),
        ("[1,]", "syntax"),
        ('"a\nb"', "syntax"),
        ("```json\n{}\n```", "syntax"),
        ("nul", "syntax"),
        ("\u00a0{}", "syntax"),
    ],
)
def test_every_violation_has_its_name(text: str, violation: str) -> None:
    with pytest.raises(Malformed) as caught:
        parse(text)
    assert caught.value.violation == violation


def test_large_integers_keep_their_digits_and_brackets_in_strings_do_not_count() -> None:
    assert parse("12345678901234567890123456789") == 12345678901234567890123456789
    assert parse('"\\ud83d\\ude00"') == "😀"
    assert parse(json.dumps("[" * 500)) == "[" * 500


@given(
    st.text(st.characters() | st.sampled_from('{}[]":,\\0123e+-. nulltruefalseNaNInfinity\ud800\ufeff'), max_size=60)
)
def test_any_text_gives_a_value_or_a_named_violation(text: str) -> None:
    try:
        value = parse(text)
    except Malformed as error:
        assert error.violation
    else:
        assert parse(json.dumps(value)) == value
