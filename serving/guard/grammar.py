"""A schema in words that the grammar engine honours.

    python -c "from serving.guard.grammar import for_grammar; print(for_grammar({'type': 'object', 'required': ['a']}))"

What xgrammar takes wrongly can be said in another way. Of alternatives and the properties beside them it ignores one,
so each alternative is given what stands beside it. A name that is required and not among the properties it does not
permit, so it becomes one that may have any value. The type beside an enum it ignores, so values of other types are left
out, and a property that none is left for (and that need not be there), as it permits no other names than it is told.
"""

from dataclasses import dataclass
from typing import Any

from serving.guard.bodies import encoded
from serving.guard.enforcement import LISTS, SCHEMAS, SCHEMAS_BY_NAME
from serving.guard.pointer import escaped, objects
from serving.guard.satisfiable import impossible, is_of_type, types_of

MAX_BYTES = 256 * 1024  # of what is written: alternatives multiply what stands beside them
ALTERNATIVES = ("anyOf", "oneOf")
ABOUT = {"title", "description"}
STAYS = {"$schema", "$defs", "definitions", *ABOUT}  # where it stands, rather than in every alternative
MOVES = {"type", "properties", "required", "additionalProperties", "minProperties", "maxProperties"}
IN_ALTERNATIVE = {"type", "properties", "required", *ABOUT}
NARROWS = {"type", "const", "enum", *ABOUT}  # keywords that say the same whatever stands beside them
OPEN_ENDED = {"$ref", "patternProperties", "propertyNames"}
OTHER_NAMES = {"additionalProperties", "patternProperties", *ALTERNATIVES, "allOf"}
ADDRESSES = ("$ref", "$dynamicRef", "$recursiveRef", "$id", "id", "$anchor", "$dynamicAnchor")


@dataclass(frozen=True)
class ForGrammar:
    """A schema for the grammar engine, and which keywords of the original, by their place, it honours in this form."""

    schema: Any
    mended: frozenset[tuple[str, str]] = frozenset()


class _TooLarge(Exception):
    pass


def for_grammar(schema: Any) -> ForGrammar:
    """What to constrain with in place of `schema`; itself where nothing can be mended, or it would get too large.

    Left alone is a schema whose references point to other places than its definitions, as these places might move, and
    one with `unevaluatedProperties`, to which a name among the properties is another thing than one that is not.
    """
    for part in objects(schema):
        if "unevaluatedProperties" in part or not all(_to_definition(part[key]) for key in ADDRESSES if key in part):
            return ForGrammar(schema)
    mended: set[tuple[str, str]] = set()
    try:
        written, _ = _written(schema, "", mended)
    except _TooLarge:
        return ForGrammar(schema)
    return ForGrammar(written, frozenset(mended)) if mended else ForGrammar(schema)


def _written(schema: Any, path: str, mended: set[tuple[str, str]]) -> tuple[Any, int]:
    """The schema with all schemas in it written anew, and about how many bytes it has. Raises _TooLarge."""
    if not isinstance(schema, dict):
        return schema, len(encoded(schema))
    found: dict[str, Any] = {}
    size = 2
    for key, value in schema.items():
        size += len(key) + 4
        if key in SCHEMAS_BY_NAME and isinstance(value, dict):
            parts = {name: _written(part, f"{path}/{key}/{escaped(name)}", mended) for name, part in value.items()}
            found[key] = {name: part for name, (part, _) in parts.items()}
            size += sum(len(name) + 4 + count for name, (_, count) in parts.items())
        elif key in LISTS and isinstance(value, list):
            listed = [_written(part, f"{path}/{key}/{index}", mended) for index, part in enumerate(value)]
            found[key] = [part for part, _ in listed]
            size += sum(count for _, count in listed)
        elif key in SCHEMAS:
            found[key], count = _written(value, f"{path}/{key}", mended)
            size += count
        else:
            found[key] = value
            size += len(encoded(value))
    key = next((name for name in ALTERNATIVES if isinstance(found.get(name), list)), "")
    many = len(found.get(key, ()))
    if size * max(1, many) > MAX_BYTES:
        raise _TooLarge
    _leave_out(found, path, mended)
    alternatives = _spread(found, key) if many else None
    if alternatives is not None:
        mended.add((path, "anyOf"))  # of oneOf more than one may match as before
        complete = [set(one.get("required", ())) <= set(one.get("properties", ())) for one in alternatives]
        mended |= {(f"{path}/{key}/{index}", "required") for index, whole in enumerate(complete) if whole}
        if all(complete):
            mended.add((path, "required"))
        return {name: found[name] for name in found if name in STAYS} | {key: alternatives}, size * many
    named = _named(found)
    if named is not found:
        mended.add((path, "required"))
        size += len(encoded(named.get("properties"))) - len(encoded(found.get("properties")))
    return named, size


def _leave_out(schema: dict[str, Any], path: str, mended: set[tuple[str, str]]) -> None:
    """Takes values that are not of the schema's type out of its enum, and properties without any value."""
    types, values = types_of(schema), schema.get("enum")
    if types and isinstance(values, list):
        fitting = [value for value in values if any(is_of_type(value, name) for name in types)]
        if 0 < len(fitting) < len(values):
            schema["enum"] = fitting
            mended.add((path, "type"))
    if "properties" in schema and _is_object(schema) and not schema.keys() & OTHER_NAMES:
        properties, required = schema["properties"], schema.get("required", ())
        kept = {name: part for name, part in properties.items() if name in required or impossible(part) is None}
        if 0 < len(kept) < len(properties):
            schema["properties"] = kept
            mended |= {(f"{path}/properties/{escaped(name)}", "type") for name in properties.keys() - kept.keys()}


def _spread(schema: dict[str, Any], key: str) -> list[dict[str, Any]] | None:
    """The alternatives of an object, each with what stands beside them; None where nothing does or cannot be joined."""
    if schema.get("type") != "object" or schema.keys() - STAYS - MOVES - {key}:
        return None
    if not schema.keys() & {"properties", "required"} or not _is_object(schema):
        return None
    beside = {name: schema[name] for name in schema if name in MOVES}
    joined = [_joined(beside, alternative) for alternative in schema[key]]
    found = [alternative for alternative in joined if alternative is not None]
    return found if len(found) == len(joined) else None


def _joined(beside: dict[str, Any], alternative: Any) -> dict[str, Any] | None:
    """Both schemas in one; None where that would need more than to put them side by side."""
    if not isinstance(alternative, dict) or alternative.keys() - IN_ALTERNATIVE or not _is_object(alternative):
        return None
    if alternative.get("type", "object") != "object":
        return None
    properties, own = dict(beside.get("properties", {})), alternative.get("properties", {})
    if "additionalProperties" in beside and own.keys() - properties.keys():
        return None  # to which they would be additional
    for name, part in own.items():
        known = properties.get(name, True)
        if known is True or known == {} or _same(known, part):
            properties[name] = part
        elif isinstance(part, dict) and isinstance(known, dict) and not part.keys() - NARROWS and "$ref" not in known:
            if not all(_same(known[key], part[key]) for key in part.keys() & known.keys() - ABOUT):
                return None
            properties[name] = {**known, **part}
        else:
            return None
    required = list(dict.fromkeys([*beside.get("required", []), *alternative.get("required", [])]))
    joined = {**beside, **{key: value for key, value in alternative.items() if key in ABOUT}}
    if properties:
        joined["properties"] = properties
    if required:
        joined["required"] = required
    return _named(joined)


def _same(one: Any, other: Any) -> bool:
    """Whether two schemas or values are written alike: 1 is not true."""
    return encoded(one) == encoded(other)


def _named(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema with every required name among its properties, itself where that is so or cannot be."""
    if schema.get("type") != "object" or not _is_object(schema) or schema.keys() & OPEN_ENDED:
        return schema
    properties, others = schema.get("properties", {}), schema.get("additionalProperties", {})
    missing = {name: others for name in schema.get("required", []) if name not in properties}
    if not missing or others is False:
        return schema
    return {**schema, "properties": {**properties, **missing}}


def _is_object(schema: dict[str, Any]) -> bool:
    """Whether `properties` and `required` are of the form they should have."""
    required = schema.get("required", [])
    return (
        isinstance(schema.get("properties", {}), dict)
        and isinstance(required, list)
        and all(isinstance(name, str) for name in required)
    )


def _to_definition(reference: Any) -> bool:
    """Whether it is `#`, or a definition of the root's."""
    if not isinstance(reference, str):
        return True  # a property of that name
    head, _, name = reference.rpartition("/")
    return reference == "#" or (head in ("#/$defs", "#/definitions") and bool(name))
