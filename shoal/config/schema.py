"""The JSON Schema of Shoal's YAML files, made from the options' own declarations. `shoal config schema` prints it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from shoal.config.deploy_file import Layout, ModelNames, ReplicaLimits, ScaleRules
from shoal.config.knobs import Knob, KnobTable
from shoal.config.options import RouterOptions
from shoal.config.sources import SERVE_SECTIONS
from shoal.config.yaml_file import COMMUNICATION_GROUP, MODEL_GROUP, NodeEntry

_TYPES = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"}
_ROUTER_LISTS: dict[str, Any] = {
    "backends": {"type": "array", "description": "Servers: URL, or {url, weight, …}."},
    "keys": {"description": "Clients' keys and their limits."},
    "aliases": {"description": "Further names of models."},
    "golden": {"description": "Expected answers of golden prompts."},
}


def file_schema() -> dict[str, Any]:
    """Of the files of `shoal serve --config`, `shoal deploy` and `shoal router --config`: any of the three."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A configuration file of Shoal",
        "anyOf": [{"$ref": f"#/$defs/{name}"} for name in ("serve", "deploy", "router")],
        "$defs": {
            "serve": _object(_serve_properties(), "shoal serve --config FILE"),
            "deploy": _object(
                {
                    "models": {"type": "array", "minItems": 1, "items": {"$ref": "#/$defs/deployed_model"}},
                    "router": _object(_properties((RouterOptions,)) | _ROUTER_LISTS, "Options of shoal router."),
                },
                "shoal deploy FILE",
                required=["models"],
            ),
            "deployed_model": _deployed_model(),
            "router": _object(_properties((RouterOptions,)) | _ROUTER_LISTS, "shoal router --config FILE"),
        },
    }


def _serve_properties() -> dict[str, Any]:
    table = KnobTable(SERVE_SECTIONS)

    def group(names: dict[str, str], description: str) -> dict[str, Any]:
        return _object({name: _knob(table.by_name[option]) for name, option in names.items()}, description)

    properties = _properties(SERVE_SECTIONS)
    properties["model"] = {"anyOf": [properties["model"], group(MODEL_GROUP, "A model with a label.")]}
    node = _object(_properties((NodeEntry,)), NodeEntry.__doc__ or "", required=["host"])
    properties["nodes"] = {**properties["nodes"], "items": {"anyOf": [{"type": "string"}, node]}}
    properties["communication"] = group(COMMUNICATION_GROUP, "Between the machines of `nodes`.")
    return properties


def _deployed_model() -> dict[str, Any]:
    replicas = _object(_properties((ReplicaLimits,)), "How many replicas there are.")
    parts = {
        "replicas": {"anyOf": [{"type": "integer", "minimum": 1}, replicas]},
        "layout": _object(_properties((Layout,)), Layout.__doc__ or ""),
        "scale": _object(_properties((ScaleRules,)), ScaleRules.__doc__ or ""),
        "serve": _object(_properties(SERVE_SECTIONS), "Options of shoal serve."),
    }
    return _object(_properties((ModelNames,)) | parts, ModelNames.__doc__ or "", required=["model"])


def _object(properties: dict[str, Any], description: str, required: Iterable[str] = ()) -> dict[str, Any]:
    """A key may be written with dashes, too."""
    dashed = {name.replace("_", "-"): value for name, value in properties.items() if "_" in name}
    schema: dict[str, Any] = {
        "type": "object",
        "description": description,
        "properties": properties | dashed,
        "additionalProperties": False,
    }
    return schema | ({"required": list(required)} if required else {})


def _properties(sections: Iterable[type]) -> dict[str, Any]:
    return {name: _knob(knob) for knob in KnobTable(sections).knobs for name in knob.names}


def _knob(knob: Knob) -> dict[str, Any]:
    kinds = [_TYPES[kind] for kind in knob.types]
    if knob.is_list:
        kinds.append("string")  # one alone
    if knob.optional:
        kinds.append("null")
    schema: dict[str, Any] = {"type": kinds[0] if len(kinds) == 1 else kinds, "description": knob.help}
    if knob.is_list:
        schema["items"] = {"type": "string"}
    if knob.choices:
        schema["enum"] = [*knob.choices, None] if knob.optional else list(knob.choices)
    if knob.minimum is not None:
        schema["minimum"] = knob.minimum
    if knob.maximum is not None:
        schema["maximum"] = knob.maximum
    if knob.default is not None:
        schema["default"] = knob.default
    return schema
