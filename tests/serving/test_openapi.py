"""Requests made up from the guard's own description: every answer is one that it describes."""

from collections.abc import Iterator

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.specs.openapi.checks import positive_data_acceptance

from serving.guard.openapi import DESCRIPTION
from tests.serving.conftest import guard_settings, running_guard
from tests.serving.test_records import recording
from tests.serving.upstream import Upstream, completion


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[schemathesis.schemas.BaseSchema]:
    told = recording(tmp_path_factory.mktemp("records"), prompts=True)
    settings = {"recording": told, "records": {"prompts": True}}
    with Upstream(completion('{"a": 1}')) as upstream, running_guard(guard_settings(upstream.url, **settings)) as guard:
        yield schemathesis.openapi.from_url(f"{guard.url}/openapi.json")


@pytest.mark.parametrize("path", list(DESCRIPTION["paths"]))
def test_every_answer_is_as_described(api: schemathesis.schemas.BaseSchema, path: str) -> None:
    (method,) = DESCRIPTION["paths"][path]

    @settings(max_examples=40 if "completions" in path else 5, deadline=None, suppress_health_check=list(HealthCheck))
    @given(case=api[path][method].as_strategy())
    def answered(case: schemathesis.Case) -> None:
        case.call_and_validate(excluded_checks=[positive_data_acceptance])  # a schema may be none

    answered()
