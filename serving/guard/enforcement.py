"""Which keywords of a schema the grammar engine will not honour, so that they are left to validation.

    python -c "from serving.guard.enforcement import unenforced; print(unenforced({'not': {'type': 'null'}}))"

For vLLM's xgrammar backend, which `serve` names: keywords that it ignores, and those for which vLLM refuses the whole
schema with a 400 (vllm/v1/structured_output/backend_xgrammar.py); such a schema is asked for without a grammar. What
can be said in another way is mended in grammar.py.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from serving.guard.pointer import escaped
from serving.guard.satisfiable import is_of_type, types_of, values_of

IGNORED = ("not", "if", "then", "else", "dependentRequired", "dependentSchemas", "dependencies", "unevaluatedItems")
NUMBERS, ARRAYS = ("multipleOf",), ("uniqueItems", "contains", "minContains", "maxContains")
FORMATS = {
    *("email", "date", "time", "date-time", "duration", "ipv4", "ipv6", "hostname", "uuid"),
    *("uri", "uri-reference", "uri-template", "json-pointer", "relative-json-pointer"),
}
BESIDE_REF = {
    *("$ref", "$defs", "definitions", "$schema", "$id", "$anchor", "$comment", "title", "description", "default"),
    *("examples", "deprecated", "readOnly", "writeOnly"),
}
SCHEMAS_BY_NAME = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
SCHEMAS = ("items", "additionalProperties", "not", "if", "then", "else", "contains", "propertyNames", "additionalItems")
LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")


@dataclass(frozen=True)
class Unenforced:
    """One keyword that validation alone will see to: where in the schema, and why."""

    path: str
    keyword: str
    why: str


def unenforced(schema: Any, path: str = "") -> list[Unenforced]:
    """The keywords of a schema and of all schemas in it that the grammar does not enforce."""
    if not isinstance(schema, dict):
        return []
    found = [Unenforced(path, keyword, why) for keyword, why in _here(schema)]
    for name, part in _within(schema):
        found += unenforced(part, f"{path}/{name}")
    return found


def _here(schema: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for keyword in IGNORED:
        if keyword in schema:
            yield keyword, "is ignored"
    for keyword in (*NUMBERS, *ARRAYS):
        if keyword in schema:
            yield keyword, "is ignored where there is no type, and makes vLLM refuse the schema where there is one"
    types, values = types_of(schema), values_of(schema)
    if types and values is not None and not all(any(is_of_type(v, name) for name in types) for v in values):
        yield "type", "beside enum or const is ignored"
    if "oneOf" in schema:
        yield "oneOf", "is taken as anyOf: more than one may match"
    if "anyOf" in schema and "properties" in schema:
        yield "anyOf", "beside properties, one of the two is ignored"
    if "$ref" in schema and schema.keys() - BESIDE_REF:
        yield "$ref", "what stands beside it is ignored"
    required, properties = schema.get("required"), schema.get("properties", {})
    if isinstance(required, list) and isinstance(properties, dict) and any(name not in properties for name in required):
        yield "required", "a name that is not among the properties is not permitted"
    if isinstance(schema.get("format"), str) and schema["format"] not in FORMATS:
        yield "format", f"{schema['format']} is not known to the grammar"
    if "propertyNames" in schema and schema.keys() & {"properties", "patternProperties", "unevaluatedProperties"}:
        yield "propertyNames", "beside other keywords for properties makes vLLM refuse the schema"
    patterns = schema.get("patternProperties")
    if isinstance(patterns, dict) and (len(patterns) > 1 or "properties" in schema):
        yield "patternProperties", "of more than one, or beside properties, makes vLLM refuse the schema"
    if isinstance(schema.get("allOf"), list) and len(schema["allOf"]) > 1:
        yield "allOf", "of more than one makes vLLM refuse the schema"
    lengths = schema.keys() & {"minLength", "maxLength"}
    if lengths and schema.keys() & {"pattern", "format"}:
        yield sorted(lengths)[0], "beside a pattern or a format"


def _within(schema: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for keyword in SCHEMAS_BY_NAME:
        parts = schema.get(keyword)
        if isinstance(parts, dict):
            yield from ((f"{keyword}/{escaped(name)}", part) for name, part in parts.items())
    for keyword in SCHEMAS:
        yield keyword, schema.get(keyword)
    for keyword in LISTS:
        parts = schema.get(keyword)
        if isinstance(parts, list):
            yield from ((f"{keyword}/{index}", part) for index, part in enumerate(parts))
