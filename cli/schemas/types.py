"""JSON Schema in few words: functions that make the schema of a value, each with what it means."""

from typing import Any

Schema = dict[str, Any]
ANY: Schema = {}
OBJECT: Schema = {"type": "object"}


def typed(kind: str, about: str = "", **more: Any) -> Schema:
    return {"type": kind, **({"description": about} if about else {}), **more}


def text(about: str = "") -> Schema:
    return typed("string", about)


def one_of(about: str, *values: str) -> Schema:
    return {"enum": list(values), "description": about}


def count(about: str = "") -> Schema:
    return typed("integer", about, minimum=0)


def number(about: str = "") -> Schema:
    return typed("number", about)


def flag(about: str) -> Schema:
    return typed("boolean", about)


def many(item: Schema, about: str = "") -> Schema:
    return typed("array", about, items=item)


def by(keys: str, value: Schema, about: str) -> Schema:
    """An object whose keys are data."""
    return typed("object", f"{about}, by {keys}", additionalProperties=value)


def maybe(schema: Schema) -> Schema:
    """Or null."""
    if "enum" in schema:
        return {**schema, "enum": [*schema["enum"], None]}
    return {**schema, "type": [schema["type"], "null"]}


def record(about: str = "", /, **keys: Schema) -> Schema:
    """An object that has all ``keys``."""
    return typed("object", about, properties=keys, required=list(keys))


def without(schema: Schema, *optional: str) -> Schema:
    """``schema``, of which the ``optional`` keys may be missing."""
    return {**schema, "required": [key for key in schema["required"] if key not in optional]}


def const(value: str | bool) -> Schema:
    return {"const": value}


def either(*schemas: Schema) -> Schema:
    return {"anyOf": list(schemas)}
