"""The JSON schema of recipes, made of the commands' options: editors complete and check a recipe by it."""

from collections.abc import Mapping
from typing import Any

from surgeon.recipe.commands import RESERVED, Commands, Key

SETTING = {"type": "string", "pattern": r"^\$[A-Za-z_][\w-]*$", "description": "A setting."}
VALUE = {"type": ["string", "number", "boolean", "null", "array"]}
CONDITION = {"type": "string", "pattern": r"^\s*(<=|>=|==|<|>)\s*\S+\s*$|^\$[A-Za-z_][\w-]*$"}
CONDITIONS = {"type": "object", "additionalProperties": CONDITION}
KINDS: Mapping[str, Any] = {
    "text": {"type": ["string", "number", "null"]},
    "integer": {"type": ["integer", "null"]},
    "number": {"type": ["number", "string", "null"]},
    "switch": {"type": "boolean"},
}


def schema(commands: Commands) -> dict[str, Any]:
    """Return the schema, JSON Schema of 2020-12."""
    names = list(commands.names())
    loop = {
        "type": "object",
        "additionalProperties": False,
        "required": ["steps"],
        "properties": {
            "until": CONDITIONS | {"description": 'Conditions on figures of steps: judged.recovery: ">= 95"'},
            "at-most": {"type": "integer", "minimum": 1, "description": "Most rounds of a loop with until."},
            "with": {"type": "object", "description": "Run the steps once for each value of these settings."},
            "steps": {"type": "array", "minItems": 1, "items": {"$ref": "#/$defs/step"}},
        },
    }
    step = {
        "type": "object",
        "additionalProperties": False,
        "required": ["name"],
        "properties": {
            "name": {"type": "string", "pattern": r"^[A-Za-z0-9][\w-]{0,63}$"},
            "require": CONDITIONS | {"description": 'Stop where a figure misses this: recovery: ">= 80"'},
            "repeat": loop,
            **{name: {"$ref": f"#/$defs/{name}"} for name in names},
        },
        "oneOf": [{"required": [name]} for name in [*names, "repeat"]],
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A recipe of surgeon",
        "type": "object",
        "additionalProperties": False,
        "required": ["steps"],
        "properties": {
            "settings": {"type": "object", "additionalProperties": VALUE},
            "steps": {"type": "array", "minItems": 1, "items": {"$ref": "#/$defs/step"}},
        },
        "$defs": {"step": step, **{name: _command(commands.keys(name)) for name in names}},
    }


def _command(keys: Mapping[str, Key]) -> dict[str, Any]:
    own = {name: key for name, key in keys.items() if name not in RESERVED}
    return {
        "type": "object",
        "additionalProperties": False,
        "required": [name for name, key in own.items() if key.is_required],
        "properties": {name: _key(key) for name, key in own.items()},
    }


def _key(key: Key) -> dict[str, Any]:
    one: dict[str, Any] = {"anyOf": [KINDS[key.kind], SETTING]}
    if key.words:
        listed: list[Any] = [*key.words, *key.aliases]
        listed = [int(word) for word in listed] if key.kind == "integer" else listed
        one = {"anyOf": [{"enum": listed if key.is_list else [*listed, None]}, SETTING]}
        if key.is_list:
            one["anyOf"].append({"type": "array", "items": {"enum": listed}})
    elif key.is_list or key.kind == "text":  # 3,7,11 may be a list too
        one = {"anyOf": [*one["anyOf"], {"type": "array", "items": {"type": ["string", "number"]}}]}
    return one | {"description": key.help}
