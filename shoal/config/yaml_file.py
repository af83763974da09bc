"""A YAML file of options: the flags' names as keys, with dashes or underscores (`shoal serve --config FILE`).

Of a server's file three keys may also be grouped: `model: {path, type}`, `nodes: [{host, port}]` and
`communication: {protocol, interface, timeout}`. They become the options that flags set: there is one way from here on.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from shoal.config.knobs import KnobTable
from shoal.config.options import option
from shoal.config.yaml_entry import Entry, read_entries
from shoal.errors import ConfigError

# Key of a group -> the option that each of its entries is.
MODEL_GROUP = {"path": "model", "type": "model_label"}
COMMUNICATION_GROUP = {
    "protocol": "communication_protocol",
    "interface": "communication_interface",
    "timeout": "step_timeout",
}
_GROUPS = {"model": MODEL_GROUP, "communication": COMMUNICATION_GROUP}


@dataclasses.dataclass(frozen=True, kw_only=True)
class NodeEntry:
    """One machine of `nodes:`."""

    host: str | None = option(None, "Its address, or a name that leads to it.")
    port: int | None = option(None, "Port of its service; default: --port.", minimum=1, maximum=65535)


def read_yaml(path: str | Path, table: KnobTable) -> dict[str, Any]:
    """The options that the file sets, by field name.

    Raises ConfigError, naming the file and the line, for what cannot be read, unknown keys and wrong types.
    """
    root = read_entries(str(path))
    if root.value is None:
        return {}
    fields = root.fields()
    groups: dict[str, Entry] = {}
    if "nodes" in table.by_name:  # a server's file
        groups = {name: entry for name, entry in fields.items() if name in _GROUPS and isinstance(entry.value, dict)}
        if "nodes" in fields and isinstance(fields["nodes"].value, list):
            groups["nodes"] = fields["nodes"]
        if "communication" in fields and "communication" not in groups:
            raise fields["communication"].error("must hold protocol, interface or timeout")
    values = root.options_of(table, beside=groups)
    for name, entry in groups.items():
        found = {"nodes": _nodes(entry)} if name == "nodes" else _grouped(entry, _GROUPS[name], table)
        for option_name, value in found.items():
            if option_name in values:
                raise entry.error(f"sets {option_name}, which the file sets elsewhere, too")
            values[option_name] = value
    return values


def _grouped(entry: Entry, names: dict[str, str], table: KnobTable) -> dict[str, Any]:
    values = {}
    for name, field in entry.fields().items():
        if name not in names:
            raise field.error(f"is not known; there is {', '.join(names)}")
        try:
            values[names[name]] = table.by_name[names[name]].from_value(field.value, field.name)
        except ConfigError as error:
            raise ConfigError(f"{field.path}, line {field.line}: {error}") from None
    return values


def _nodes(entry: Entry) -> list[str]:
    """Each as HOST or HOST:PORT."""
    nodes = []
    for item in entry.items():
        if isinstance(item.value, str):
            nodes.append(item.value)
            continue
        node = NodeEntry(**item.options(NodeEntry))
        if node.host is None:
            raise item.error("has no `host:`; it is the machine's address, or a name that leads to it")
        host = f"[{node.host}]" if ":" in node.host else node.host
        nodes.append(host if node.port is None else f"{host}:{node.port}")
    if not nodes:
        raise entry.error("names no machine")
    return nodes
