"""What a request asks of every choice of its answer: a schema, a pattern, one of some texts, arguments of tools.

    wanted_of({"response_format": {"type": "json_object"}}, CheckerCache())

`response_format` (json_object, json_schema) and vLLM's `structured_outputs` (json, json_object, regex, choice) are
checked; a grammar and structural tags are the engine's alone. Tool calls are checked against the tools' parameters.
YAML and XML, and a stream that is passed on while it is checked, are asked for by a field of the guard's own:
`"guard": {"format": "yaml", "schema": {...}, "live": true}`.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from serving.guard import formats, strict_json
from serving.guard.enforcement import Unenforced, unenforced
from serving.guard.pointer import escaped
from serving.guard.schema import Checker, SchemaError, TooCostly, Unsatisfiable, Violation

JSON_OBJECT = {"type": "object"}
CONSTRAINTS = ("response_format", "structured_outputs")  # the fields by which an engine constrains
FIELD = "guard"  # the guard's own: of a request what it asks the guard for, of an answer how it came about
Check = Callable[[str], list[Violation]]
Compile = Callable[[Any], Checker]


@dataclass(frozen=True)
class Extension:
    """The field `guard` of a request: `form` (json, yaml, xml) and `schema` of the text, `live` for its stream, and
    `routing` where the answer is to say how it was routed."""

    form: str = "json"
    schema: Any = None
    live: bool = False
    routing: bool = False


@dataclass(frozen=True)
class Wanted:
    """The checks of one request: of a choice's text (None: it is free), of the arguments by the tool's name.

    `schema` is that of the text where it is a document, in `form`; `left_out` are the keywords that no grammar
    enforces, of it or of the parameters of tools that have to be called. `grammar` is the schema in words that the
    grammar engine honours better (None: in its own). `must_call` is whether a choice without a tool call is wrong.
    """

    check: Check | None
    schema: Any = None
    form: str = "json"
    left_out: Sequence[Unenforced] = ()
    tools: Mapping[str, Checker] = field(default_factory=dict)
    must_call: bool = False
    grammar: Any = None

    def violations(self, choice: Mapping[str, Any]) -> list[Violation]:
        """What is wrong with a choice of a chat completion or of a completion; empty when it is as asked."""
        if self.check is None and not self.tools:
            return []
        calls = (choice.get("message") or {}).get("tool_calls") or []
        found = [violation for index, call in enumerate(calls) for violation in self._call(index, call)]
        text = text_of(choice)
        if self.must_call and not calls:
            found.append(Violation("", "no_tool_call", "the answer calls no tool, and the request asks for one"))
        if self.check is not None and (text or not calls):
            found += self.check(text)
        cut = choice.get("finish_reason") == "length"
        if cut and (self._may_go_on(text, calls) or (found and not self._whole(choice))):
            return [Violation("", "output_truncated", "the answer ended at the token limit (finish_reason length)")]
        return found

    def _call(self, index: int, call: Any) -> list[Violation]:
        where = f"/tool_calls/{index}"
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict):
            return [Violation(where, "unknown_tool", "a call without a function")]
        if function.get("name") not in self.tools:
            return [Violation(f"{where}/function/name", "unknown_tool", "the request has no tool of this name")]
        found = document_violations(function.get("arguments") or "", self.tools[function["name"]])
        return [replace(v, path=f"{where}/function/arguments{v.path}") for v in found]

    def _may_go_on(self, text: str, calls: Sequence[Any]) -> bool:
        """Whether a document could have more to it though it is one: any piece of YAML is, and of a number."""
        if self.schema is None or calls:
            return False
        return self.form == "yaml" or (self.form == "json" and text.strip()[-1:].isdigit())

    def _whole(self, choice: Mapping[str, Any]) -> bool:
        """Whether what a choice says is complete, though not as asked: a limit has cut nothing off then."""
        calls = (choice.get("message") or {}).get("tool_calls") or []
        texts = [call["function"].get("arguments") or "" for call in calls if isinstance(call.get("function"), dict)]
        if self.schema is not None and not calls:
            texts.append(text_of(choice))
        try:
            form = "json" if calls else self.form
            return bool(texts) and all(isinstance(formats.parse(text, form), dict | list) for text in texts)
        except strict_json.Malformed:
            return False


def is_completion(answer: Any) -> bool:
    """Whether an engine's answer has the form of a completion, as far as it is looked into."""
    if not isinstance(answer, dict) or not isinstance(answer.get("usage") or {}, dict):
        return False
    choices = answer.get("choices") or []
    return isinstance(choices, list) and all(isinstance(choice, dict) and _is_choice(choice) for choice in choices)


def _is_choice(choice: dict[str, Any]) -> bool:
    message = choice.get("message") or {}
    if not isinstance(message, dict):
        return False
    calls = message.get("tool_calls") or []
    return isinstance(calls, list) and all(
        isinstance(call, dict) and isinstance(call.get("function"), dict | None) and _is_function(call)
        for call in calls
    )


def _is_function(call: dict[str, Any]) -> bool:
    function = call.get("function") or {}
    return all(isinstance(function.get(key), str | None) for key in ("name", "arguments"))


def text_of(choice: Mapping[str, Any]) -> str:
    """The text of a choice, whichever route it comes from."""
    content = choice["text"] if "text" in choice else (choice.get("message") or {}).get("content")
    if isinstance(content, list):
        texts = (part.get("text") for part in content if isinstance(part, dict))
        return "".join(text for text in texts if isinstance(text, str))
    return content if isinstance(content, str) else "" if content is None else json.dumps(content)


def document_violations(text: str, checker: Checker, form: str = "json") -> list[Violation]:
    """What is wrong with a text that should be one strict document that satisfies a schema."""
    try:
        value = formats.parse(text, form, checker.schema)
    except strict_json.Malformed as error:
        return [Violation("", error.violation, str(error), error.detail)]
    return checker.violations(value)


def extension_of(request: Mapping[str, Any]) -> Extension:
    """What a request says in the guard's own field. Raises SchemaError where it says what is not known."""
    given = request.get(FIELD)
    if given is None:
        return Extension()
    if not isinstance(given, dict) or given.keys() - {"format", "schema", "live", "routing"}:
        raise SchemaError("'guard' has no keys but format, schema, live and routing")
    form, live, routing = given.get("format", "json"), given.get("live", False), given.get("routing", False)
    if not isinstance(form, str) or form not in formats.PARSERS:
        raise SchemaError(f"guard.format is one of {', '.join(formats.PARSERS)}")
    if not isinstance(live, bool) or not isinstance(routing, bool):
        raise SchemaError("guard.live and guard.routing are true or false")
    asks = form != "json" or given.get("schema") is not None
    if asks and (constraint := next((key for key in CONSTRAINTS if request.get(key)), None)):
        raise SchemaError(f"guard and {constraint} ask for two things")
    return Extension(form, given.get("schema"), live, routing)


def wanted_of(request: Mapping[str, Any], compiled: Compile) -> Wanted | None:
    """What a request asks for, None when it asks for nothing that can be checked. `compiled` gives a schema's checker.

    Raises SchemaError on an unusable schema, on one that nothing satisfies where no tool can be called instead, where
    `response_format` is json_schema without one, and where the answer would not be the document alone.
    """
    extension = extension_of(request)
    schema, tools = _schema(request, extension), _tools(request, compiled)
    if schema is not None:
        for key in ("echo", "continue_final_message"):
            if request.get(key):
                raise SchemaError(f"with {key} the answer is not the document alone")
        checker = compiled(schema)
        if checker.impossible is not None and not tools:
            raise Unsatisfiable(f"nothing satisfies it ({checker.impossible})")

        def check(text: str) -> list[Violation]:
            return document_violations(text, checker, extension.form)

        must_call = _must_call(request, tools)
        if extension.form != "json":
            return Wanted(check, schema, extension.form, (), tools, must_call)
        written = checker.for_grammar
        left_out = [*checker.left_out, *(_tools_left_out(tools) if must_call else ())]
        return Wanted(check, schema, "json", left_out, tools, must_call, written.schema if written.mended else None)
    other = _other_check(request, compiled)
    if other is None and not tools:
        return None
    if not _must_call(request, tools):  # what may call a tool or not has no grammar
        return Wanted(other, tools=tools)
    return Wanted(other, left_out=_tools_left_out(tools), tools=tools, must_call=True)


def _tools_left_out(tools: Mapping[str, Checker]) -> list[Unenforced]:
    """What a grammar leaves out of the parameters of tools, which go to the engine as they are."""
    return [
        replace(found, path=f"/tools/{escaped(name)}{found.path}")
        for name, checker in tools.items()
        for found in unenforced(checker.schema)
    ]


def _must_call(request: Mapping[str, Any], tools: Mapping[str, Checker]) -> bool:
    choice = request.get("tool_choice")
    return bool(tools) and (choice == "required" or isinstance(choice, dict))


def _schema(request: Mapping[str, Any], extension: Extension) -> Any | None:
    """The schema of the text; None where it need not be a document."""
    wanted, ours = request.get("response_format"), request.get("structured_outputs")
    if extension.schema is not None or extension.form != "json":
        return True if extension.schema is None else extension.schema
    if isinstance(wanted, dict) and wanted.get("type") == "json_object":
        return wanted.get("schema") or JSON_OBJECT
    if isinstance(wanted, dict) and wanted.get("type") == "json_schema":
        named = wanted.get("json_schema")
        if not isinstance(named, dict) or named.get("schema") is None:
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
        except strict_json.Malformed as error:
            raise SchemaError(f"structured_outputs.json is no JSON: {error}") from None
    return schema


def with_schema(request: dict[str, Any], schema: Any) -> dict[str, Any]:
    """The same request, constrained by another schema than it names."""
    wanted, ours = request.get("response_format"), request.get("structured_outputs")
    if isinstance(wanted, dict) and wanted.get("type") == "json_schema":
        return {**request, "response_format": {**wanted, "json_schema": {**wanted["json_schema"], "schema": schema}}}
    if isinstance(wanted, dict) and wanted.get("schema"):
        return {**request, "response_format": {**wanted, "schema": schema}}
    if isinstance(ours, dict) and ours.get("json") is not None and not ours.get("json_object"):
        return {**request, "structured_outputs": {**ours, "json": schema}}
    return request


def _other_check(request: Mapping[str, Any], compiled: Compile) -> Check | None:
    ours = request.get("structured_outputs")
    if not isinstance(ours, dict):
        return None
    if isinstance(ours.get("choice"), list):
        texts = ours["choice"]
        return lambda text: [] if text in texts else [Violation("", "choice", f"is none of {_quoted(texts)}")]
    if isinstance(ours.get("regex"), str):
        try:
            pattern = compiled({"type": "string", "pattern": f"^(?:{ours['regex']})$"})
        except TooCostly:
            raise
        except SchemaError:
            return None  # a pattern of the engine's own kind is its alone
        return pattern.violations
    return None


def _quoted(texts: list[Any]) -> str:
    shown = ", ".join(json.dumps(text, ensure_ascii=False) for text in texts[:20])
    return shown + (", ..." if len(texts) > 20 else "")


def _tools(request: Mapping[str, Any], compiled: Compile) -> dict[str, Checker]:
    """The checker of each tool's arguments, none where no tool may be called."""
    tools = request.get("tools")
    if not isinstance(tools, list) or request.get("tool_choice") == "none":
        return {}
    functions = [tool.get("function") for tool in tools if isinstance(tool, dict)]
    choice = request.get("tool_choice")
    if isinstance(choice, dict) and isinstance(choice.get("function"), dict):  # no other may be called
        named = choice["function"].get("name")
        functions = [function for function in functions if isinstance(function, dict) and function.get("name") == named]
    return {
        function["name"]: compiled(_parameters(function))
        for function in functions
        if isinstance(function, dict) and isinstance(function.get("name"), str)
    }


def _parameters(function: Mapping[str, Any]) -> Any:
    given = function.get("parameters")
    return JSON_OBJECT if given is None else given
