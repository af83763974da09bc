"""A YAML file of options: the flags' names as keys, with dashes or underscores (`shoal serve --config FILE`).

Of a server's file three keys may also be grouped: `model: {path, type}`, `nodes: [{host, port}]` and
`communication: {protocol, interface, timeout}`. They become the options that flags set: there is one way from here on.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import re
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
# What `nodes:` says in its own way, and the value that says nothing.
_INSTEAD_OF_NODES = {"nnodes": 1, "node_rank": 0, "master_addr": None}
_HOST_NAME = re.compile(r"[a-z0-9_]([a-z0-9_.-]*[a-z0-9_.])?", re.IGNORECASE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NodeEntry:
    """One machine of `nodes:`."""

    host: str | None = option(None, "Its address, or a name that leads to it.")
    port: int | None = option(None, "Port of its service; default: --port.", minimum=1, maximum=65535)


def read_yaml(path: str | Path, table: KnobTable, errors: list[ConfigError] | None = None) -> dict[str, Any]:
    """The options that the file sets, by field name.

    Raises ConfigError, naming the file and the line, for what cannot be read, unknown keys and wrong types.
    errors: takes those of single keys and groups instead, so that all of them can be told.
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
    values = root.options_of(table, groups, errors)
    for name, entry in groups.items():
        try:
            found = {"nodes": _nodes(entry)} if name == "nodes" else _grouped(entry, _GROUPS[name], table)
            for option_name, value in found.items():
                if option_name in values:
                    raise entry.error(f"sets {option_name}, which the file sets elsewhere, too")
                values[option_name] = value
        except ConfigError as error:
            if errors is None:
                raise
            errors.append(error)
    if "nodes" in fields:
        for name, default in _INSTEAD_OF_NODES.items():
            if values.get(name, default) != default:
                told = fields.get(name, root).error("says what nodes says; give one of the two")
                if errors is None:
                    raise told
                errors.append(told)
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
    seen: dict[str, Entry] = {}
    for item in entry.items():
        if isinstance(item.value, str):
            host = _host_of(item)
            nodes.append(item.value)
        else:
            node = NodeEntry(**item.options(NodeEntry))
            if node.host is None:
                raise item.error("has no `host:`; it is the machine's address, or a name that leads to it")
            host = node.host
            written = f"[{host}]" if ":" in host else host
            nodes.append(written if node.port is None else f"{written}:{node.port}")
        machine = _check_host(item, host)
        if machine in seen:
            first = seen[machine]
            raise item.error(f"is {host}, as {first.name} in line {first.line} is: a machine is named once")
        seen[machine] = item
    if not nodes:
        raise entry.error("names no machine")
    return nodes


def _host_of(item: Entry) -> str:
    """Of HOST, HOST:PORT, [v6], [v6]:PORT or a bare v6 address."""
    text: str = item.value
    if match := re.fullmatch(r"\[([^\]]*)\](?::(.*))?|([^:/]*):([^:/]*)", text):
        host, port = (match[1], match[2]) if match[1] is not None else (match[3], match[4])
        if port is not None and not (port.isascii() and port.isdecimal() and 0 < int(port) < 65536):
            raise item.error(f"must be HOST or HOST:PORT with a port from 1 to 65535; found {text!r}")
        return host
    return text


def _check_host(item: Entry, host: str) -> str:
    """The host in one spelling; raises ConfigError for what is neither an address nor a name."""
    if ":" in host or re.fullmatch(r"[0-9.]+", host):
        try:
            return str(ipaddress.ip_address(host))
        except ValueError:
            pass
    elif _HOST_NAME.fullmatch(host):
        return host.lower().rstrip(".")
    raise item.error(f"must have an address or a name as its host, such as 10.0.0.1 or node1; found {host!r}")
