"""What a request asks of every choice of its answer: a schema, a pattern, one of some texts, arguments of tools.

    wanted_of({"response_format": {"type": "json_object"}}, CheckerCache())

`response_format` (json_object, json_schema) and vLLM's `structured_outputs` (json, json_object, regex, choice) are
checked; a grammar and structural tags are the engine's alone. Tool calls are checked against the tools' parameters.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from serving.guard import strict_json
from serving.guard.schema import Checker, CheckerCache, SchemaError, Violation

JSON_OBJECT = {"type": "object"}
CONSTRAINTS = ("response_format", "structured_outputs")  # the fields by which an engine constrains
Check = Callable[[str], list[Violation]]


@dataclass(frozen=True)
class Wanted:
    """The checks of one request: of a choice's text (None: it is free), of the arguments by the tool's name.

    `schema` is that of the text where it is JSON. `must_call` is whether a choice without a tool call is wrong.
    """

    check: Check | None
    schema: Any = None
    tools: Mapping[str, Checker] = field(default_factory=dict)
    must_call: bool = False

    def violations(self, choice: Mapping[str, Any]) -> list[Violation]:
        """What is wrong with a choice of a chat completion or of a completion; empty when it is as asked."""
        calls = (choice.get("message") or {}).get("tool_calls") or []
        found = [violation for index, call in enumerate(calls) for violation in self._call(index, call)]
        text = text_of(choice)
        if self.must_call and not calls:
            found.append(Violation("", "no_tool_call", "the answer calls no tool, and the request asks for one"))
        if self.check is not None and (text or not calls):
            found += self.check(text)
        if found and choice.get("finish_reason") == "length" and not self._whole(choice):
            return [Violation("", "output_truncated", "the answer ended at the token limit (finish_reason length)")]
        return found

    def _call(self, index: int, call: Any) -> list[Violation]:
        where = f"/tool_calls/{index}"
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict):
            return []
        if function.get("name") not in self.tools:
            return [Violation(f"{where}/function/name", "unknown_tool", "the request has no tool of this name")]
        found = json_violations(function.get("arguments") or "", self.tools[function["name"]])
        return [Violation(f"{where}/function/arguments{v.path}", v.keyword, v.message) for v in found]

    def _whole(self, choice: Mapping[str, Any]) -> bool:
        """Whether what a choice says is complete, though not as asked: a limit has cut nothing off then."""
        calls = (choice.get("message") or {}).get("tool_calls") or []
        texts = [call["function"].get("arguments") or "" for call in calls if isinstance(call.get("function"), dict)]
        if self.schema is not None and not calls:
            texts.append(text_of(choice))
        try:
            return bool(texts) and all(isinstance(strict_json.parse(text), dict | list) for text in texts)
        except strict_json.StrictJSONError:
            return False


def text_of(choice: Mapping[str, Any]) -> str:
    """The text of a choice, whichever route it comes from."""
    content = choice["text"] if "text" in choice else (choice.get("message") or {}).get("content")
    if isinstance(content, list):
        return "".join(part.get("text") or "" for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else "" if content is None else json.dumps(content)


def json_violations(text: str, checker: Checker) -> list[Violation]:
    """What is wrong with a text that should be one strict JSON value that satisfies a schema."""
    try:
        value = strict_json.parse(text)
    except strict_json.StrictJSONError as error:
        return [Violation("", error.violation, str(error))]
    return checker.violations(value)


def wanted_of(request: Mapping[str, Any], cache: CheckerCache) -> Wanted | None:
    """What a request asks for, None when it asks for nothing that can be checked.

    Raises SchemaError on an unusable schema, and where `response_format` is json_schema without one.
    """
    schema = _schema(request)
    check = _check(request, schema, cache)
    tools = _tools(request, cache)
    choice = request.get("tool_choice")
    if check is None and not tools:
        return None
    must_call = bool(tools) and (choice == "required" or isinstance(choice, dict))
    return Wanted(check, schema, tools, must_call)


def _schema(request: Mapping[str, Any]) -> Any | None:
    """The schema of the text; None where it need not be JSON."""
    wanted, ours = request.get("response_format"), request.get("structured_outputs")
    if isinstance(wanted, dict) and wanted.get("type") == "json_object":
        return JSON_OBJECT
    if isinstance(wanted, dict) and wanted.get("type") == "json_schema":
        named = wanted.get("json_schema")
        if not isinstance(named, dict) or "schema" not in named:
            raise SchemaError("response_format of type json_schema needs json_schema.schema")
        return named["schema"]
    if not isinstance(ours, dict):
        return None
    if ours.get("json_object"):
        return JSON_OBJECT
    schema = ours.get("json")
    if isinstance(schema, str):
        try:
            return strict_json.parse(schema)
        except strict_json.StrictJSONError as error:
            raise SchemaError(f"structured_outputs.json is no JSON: {error}") from None
    return schema


def _check(request: Mapping[str, Any], schema: Any | None, cache: CheckerCache) -> Check | None:
    if schema is not None:
        checker = cache.get(schema)
        return lambda text: json_violations(text, checker)
    ours = request.get("structured_outputs")
    if not isinstance(ours, dict):
        return None
    if isinstance(ours.get("choice"), list):
        texts = ours["choice"]
        return lambda text: [] if text in texts else [Violation("", "choice", f"is none of {_quoted(texts)}")]
    if isinstance(ours.get("regex"), str):
        try:
            pattern = cache.get({"type": "string", "pattern": f"^(?:{ours['regex']})$"})
        except SchemaError:
            return None  # a pattern of the engine's own kind is its alone
        return pattern.violations
    return None


def _quoted(texts: list[Any]) -> str:
    shown = ", ".join(json.dumps(text, ensure_ascii=False) for text in texts[:20])
    return shown + (", ..." if len(texts) > 20 else "")


def _tools(request: Mapping[str, Any], cache: CheckerCache) -> dict[str, Checker]:
    """The checker of each tool's arguments, none where no tool may be called."""
    tools = request.get("tools")
    if not isinstance(tools, list) or request.get("tool_choice") == "none":
        return {}
    functions = [tool.get("function") for tool in tools if isinstance(tool, dict)]
    return {
        function["name"]: cache.get(_parameters(function))
        for function in functions
        if isinstance(function, dict) and isinstance(function.get("name"), str)
    }


def _parameters(function: Mapping[str, Any]) -> Any:
    given = function.get("parameters")
    return JSON_OBJECT if given is None else given
