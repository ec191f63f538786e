"""Schemas that nothing satisfies, told before three generations are spent on them.

python -c "from serving.guard.satisfiable import impossible; print(impossible({'type': 'array', 'enum': ['a', 'b']}))"
"""

from typing import Any

from serving.guard.pointer import escaped

# keywords that bound a value of a type from both sides
BOUNDS = {
    "number": ("minimum", "maximum"),
    "integer": ("minimum", "maximum"),
    "string": ("minLength", "maxLength"),
    "array": ("minItems", "maxItems"),
    "object": ("minProperties", "maxProperties"),
}


def impossible(schema: Any) -> str | None:
    """Where and why nothing satisfies `schema`; None where no such contradiction is seen, which proves nothing.

    Seen are: false schemas, an enum or const of another type than is asked for, a lower bound above the upper one, and
    these in what an object requires, in a member of allOf, or in every one of anyOf and oneOf. A part with a `$ref` is
    not looked at, as older drafts ignore all beside it; nor is a schema of draft 4, which knows no const.
    """
    if isinstance(schema, dict) and "draft-04" in str(schema.get("$schema")):
        return None
    return _impossible(schema, "")


def _impossible(schema: Any, path: str) -> str | None:
    if schema is False:
        return f"{path or '/'}: the schema is false"
    if not isinstance(schema, dict) or "$ref" in schema or "$dynamicRef" in schema or "$recursiveRef" in schema:
        return None
    types = types_of(schema)
    if types is not None:
        values = values_of(schema)
        if values is not None and not any(is_of_type(value, name) for value in values for name in types):
            keyword = "const" if "const" in schema else "enum"
            return f"{path or '/'}: no value of its {keyword} is of type {' or '.join(types)}"
        if all(_crossed(schema, name) for name in types):
            low, high = BOUNDS[types[0]]
            return f"{path or '/'}: {low} is greater than {high}"
    if types == ["object"] and isinstance(schema.get("required"), list) and isinstance(schema.get("properties"), dict):
        for name in schema["required"]:
            found = _impossible(schema["properties"].get(name), f"{path}/properties/{escaped(str(name))}")
            if found is not None:
                return found
    for keyword in ("allOf", "anyOf", "oneOf"):
        members = schema.get(keyword)
        if isinstance(members, list) and members:
            reasons = [_impossible(member, f"{path}/{keyword}/{index}") for index, member in enumerate(members)]
            told = [reason for reason in reasons if reason is not None]
            if told and (keyword == "allOf" or len(told) == len(members)):
                return told[0]
    return None


def types_of(schema: dict[str, Any]) -> list[str] | None:
    """The types that a schema names; None where it names none."""
    given = schema.get("type")
    names = [given] if isinstance(given, str) else given
    return names if isinstance(names, list) and names else None


def values_of(schema: dict[str, Any]) -> list[Any] | None:
    """The values that a schema lists, by const or enum; None where it lists none."""
    if "const" in schema:
        return [schema["const"]]
    return schema["enum"] if isinstance(schema.get("enum"), list) else None


def is_of_type(value: Any, name: str) -> bool:
    """Whether a value is of a type of JSON Schema; of one that it does not know every value is."""
    if name in ("integer", "number"):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and (name == "number" or value == value // 1)
    kind = {"string": str, "boolean": bool, "array": list, "object": dict, "null": type(None)}.get(name)
    return kind is None or isinstance(value, kind)


def _crossed(schema: dict[str, Any], name: str) -> bool:
    low, high = (schema.get(key) for key in BOUNDS.get(name, ("", "")))
    return isinstance(low, int | float) and isinstance(high, int | float) and low > high
