"""YAML and XML as strictly as JSON: one document, safe to load, and a value that a JSON Schema can judge.

    python -c "from serving.guard.formats import parse; print(parse('a: 1', 'yaml'))"

YAML is read by the core types of YAML 1.2 (`no` is a text, 14:30 and 2026-01-01 are too), without aliases, tags or
equal keys. XML is read without document types, so that no entity is of anyone's making, and without attributes: the
root's name is free, an element is an object of its children, a list is an element whose children are its entries, and
an empty element is null where the schema permits it. What has no type in XML takes the one that the schema gives it.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any
from xml.etree import ElementTree

import jsonschema_rs
import yaml
from defusedxml import DefusedXmlException
from defusedxml.ElementTree import fromstring

from serving.guard.pointer import pointed
from serving.guard.strict_json import (
    MAX_DEPTH,
    WHITESPACE,
    Malformed,
    begun,
    check_surrogates,
    to_float,
    to_integer,
)
from serving.guard.strict_json import parse as parse_json

FENCE = re.compile(r"```[a-zA-Z]*[ \t]*\n(.*?)\n?```", re.DOTALL)
_NUMBERS = {
    "integer": re.compile(r"[-+]?[0-9]{1,4000}"),
    "number": re.compile(r"[-+]?[0-9]{1,4000}(\.[0-9]{1,4000})?([eE][-+]?[0-9]{1,4})?"),
}


def parse(text: str, form: str, schema: Any = True) -> Any:
    """The value of a text in `form` (json, yaml, xml). Raises Malformed, whose `violation` names what is wrong."""
    return PARSERS[form](text, schema)


def unfenced(text: str) -> str | None:
    """The one code fence that is the whole of a text, without its marks; None where it is not one."""
    match = FENCE.fullmatch(text.strip(WHITESPACE))
    return match[1] if match else None


def parse_yaml(text: str) -> Any:
    """The value of one YAML document. Raises Malformed: empty, byte_order_mark, too_deep, duplicate_key, key_not_text,
    alias, tag, number_overflow, number_too_long, lone_surrogate, syntax."""
    begun(text)
    try:
        value = yaml.load(text, Loader=_CoreLoader)
    except yaml.MarkedYAMLError as error:
        place = error.problem_mark
        where = f" at line {place.line + 1} column {place.column + 1}" if place else ""
        raise Malformed("syntax", f"{error.problem or error.context}{where}") from None
    except Malformed:
        raise
    except (yaml.YAMLError, RecursionError, ValueError) as error:  # a character that YAML does not permit
        raise Malformed("syntax", str(error).split("\n")[0]) from None
    check_surrogates(value)
    return value


def parse_xml(text: str, schema: Any = True) -> Any:
    """The value of one XML element under a schema. Raises Malformed: empty, byte_order_mark, too_deep, document_type,
    attribute, mixed_content, duplicate_key, number_overflow, syntax."""
    document = begun(text)
    try:
        root = fromstring(document, forbid_dtd=True)
    except DefusedXmlException:
        raise Malformed("document_type", "a document type or an entity of its own is not permitted") from None
    except (ElementTree.ParseError, ValueError) as error:
        raise Malformed("syntax", str(error)) from None
    return _value(root, schema, schema, 1)


class _CoreLoader(yaml.SafeLoader):
    """YAML 1.2's core types without aliases and tags, and never deeper than MAX_DEPTH."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise Malformed("alias", "anchors and aliases are not permitted")
        if getattr(event, "tag", None) not in (None, "!"):
            raise Malformed("tag", "tags are not permitted", f"the tag {event.tag} is not permitted")
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Malformed("too_deep", f"more than {MAX_DEPTH} levels of nesting")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def _mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str):
            raise Malformed("key_not_text", "a key is no text")
        if key in found:
            raise Malformed("duplicate_key", "a key occurs twice in one mapping", f"the key {key!r} occurs twice")
        found[key] = loader.construct_object(value_node, deep=True)
    return found


_CoreLoader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", list("-+.0123456789")),
):
    _CoreLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)
_CoreLoader.add_constructor("tag:yaml.org,2002:map", _mapping)
_CoreLoader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: to_integer(node.value))
_CoreLoader.add_constructor("tag:yaml.org,2002:float", lambda loader, node: to_float(node.value))


def _value(element: ElementTree.Element, schema: Any, root: Any, level: int) -> Any:
    if level > MAX_DEPTH:
        raise Malformed("too_deep", f"more than {MAX_DEPTH} levels of nesting")
    if element.attrib:
        raise Malformed("attribute", "an element has attributes", f"{element.tag} has attributes")
    children = list(element)
    if children and any((text or "").strip() for text in (element.text, *(child.tail for child in children))):
        raise Malformed("mixed_content", "an element has text beside its children", f"{element.tag} has text")
    parts = list(_alternatives(schema, root))
    types = {name for part in parts for name in _types(part)}
    repeated = len(children) > 1 and len({child.tag for child in children}) == 1
    if ("array" in types and ("object" not in types or repeated)) or (not types and repeated):
        items = _stated(parts, "items")
        first = _listed(parts, "prefixItems")
        stated = [*first, *[items] * len(children)]
        return [_value(child, part, root, level + 1) for child, part in zip(children, stated, strict=False)]
    if children or types == {"object"}:
        found: dict[str, Any] = {}
        for child in children:
            if child.tag in found:
                raise Malformed("duplicate_key", "an element occurs twice in another", f"{child.tag} occurs twice")
            inner = _stated([_stated([part], "properties", {}) for part in parts], child.tag, None)
            inner = _of_other_names(parts, child.tag) if inner is None else inner
            found[child.tag] = _value(child, inner, root, level + 1)
        return found
    return _scalar((element.text or "").strip(), types)


def _scalar(text: str, types: set[str]) -> Any:
    if not text and "null" in types:
        return None
    for name, pattern in _NUMBERS.items():
        if name in types and pattern.fullmatch(text):
            return int(text) if _NUMBERS["integer"].fullmatch(text) else to_float(text)
    if "boolean" in types and text in ("true", "false"):
        return text == "true"
    return text


def _alternatives(schema: Any, root: Any, seen: tuple[int, ...] = ()) -> Iterator[dict[str, Any]]:
    """A schema and those that may stand in its place, references within the document followed."""
    if not isinstance(schema, dict) or id(schema) in seen:
        return
    yield schema
    within = (*seen, id(schema))
    if isinstance(schema.get("$ref"), str):
        yield from _alternatives(pointed(schema["$ref"], root), root, within)
    for keyword in ("anyOf", "oneOf", "allOf"):
        for part in schema.get(keyword) or ():
            yield from _alternatives(part, root, within)


def _types(schema: dict[str, Any]) -> set[str]:
    given = schema.get("type")
    named = {given} if isinstance(given, str) else set(given or ())
    values = [schema["const"]] if "const" in schema else schema.get("enum") or []
    return named or {_KINDS[type(value)] for value in values if type(value) in _KINDS}


def _of_other_names(parts: list[dict[str, Any]], name: str) -> Any:
    """The schema of a child that is none of the properties."""
    for pattern, schema in (item for part in parts for item in _stated([part], "patternProperties", {}).items()):
        if jsonschema_rs.is_valid({"pattern": pattern}, name):  # its expressions have a limit, Python's have none
            return schema
    return _stated(parts, "additionalProperties")


def _listed(parts: list[dict[str, Any]], key: str) -> list[Any]:
    return next((part[key] for part in parts if isinstance(part.get(key), list)), [])


def _stated(parts: list[dict[str, Any]], key: str, otherwise: Any = True) -> Any:
    return next((part[key] for part in parts if isinstance(part.get(key), dict)), otherwise)


_KINDS = {
    str: "string",
    bool: "boolean",
    int: "integer",
    float: "number",
    type(None): "null",
    dict: "object",
    list: "array",
}
PARSERS: dict[str, Callable[[str, Any], Any]] = {
    "json": lambda text, _: parse_json(text),
    "yaml": lambda text, _: parse_yaml(text),
    "xml": parse_xml,
}
