"""A router's YAML file: the options of RouterOptions, and the lists backends, keys, aliases and golden.

It knows the line of each entry, for errors. Read by router_settings.py.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from shoal.config.knobs import KnobTable
from shoal.errors import ConfigError

_LISTS = ("backends", "keys", "aliases", "golden")
_INDEX = re.compile(r"^\w+\[(\d+)\](?:\.(\w+))?")


class RouterFile:
    """What stands in the file. Lists are as they were read, options are converted."""

    def __init__(self, path: str, root: yaml.MappingNode | None) -> None:
        self.path = path
        self.options: dict[str, Any] = {}
        self.backends: list[Any] = []
        self.keys: Any = None
        self.aliases: Any = None
        self.golden: Any = None
        self._nodes: dict[str, tuple[yaml.Node, yaml.Node]] = {}
        for key, value in root.value if root is not None else ():
            if not isinstance(key, yaml.ScalarNode):
                raise ConfigError(f"{path}, line {_line(key)}: a key must be a name")
            if key.value in self._nodes:
                raise ConfigError(f"{path}, line {_line(key)}: {key.value} is there a second time")
            self._nodes[key.value] = (key, value)

    @classmethod
    def empty(cls) -> RouterFile:
        return cls("", None)

    @classmethod
    def read(cls, path: str, table: KnobTable) -> RouterFile:
        """Raises ConfigError that names the file and, for what is wrong in it, the line."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"cannot read the config file {path}: {getattr(error, 'strerror', None) or error}"
            ) from error
        try:
            root: Any = yaml.compose(text, Loader=yaml.SafeLoader)
            content = yaml.safe_load(text)
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            where = f", line {mark.line + 1}" if mark is not None else ""
            # The parser quotes what it found, which may be a key.
            raise ConfigError(f"{path}{where} is not YAML: {getattr(error, 'problem', None) or 'unreadable'}") from None
        if root is not None and content is not None and not isinstance(content, dict):
            raise ConfigError(f"{path} must hold `name: value` lines; found a {type(content).__name__}")
        file = cls(path, root if isinstance(content, dict) else None)
        file._fill(content or {}, table)
        return file

    def where(self, name: str, message: str = "") -> str:
        """ "file.yaml, line 12" for a key of the file; for an error about `name[3].weight`, the line of that."""
        if name not in self._nodes:
            return self.path
        key, value = self._nodes[name]
        line = _line(key)
        found = _INDEX.match(message)
        if found and isinstance(value, yaml.SequenceNode) and int(found[1]) < len(value.value):
            entry = value.value[int(found[1])]
            line = _line(entry)
            for inner, _ in entry.value if isinstance(entry, yaml.MappingNode) else ():
                if inner.value == found[2]:
                    line = _line(inner)
        return f"{self.path}, line {line}"

    @contextlib.contextmanager
    def blame(self, name: str) -> Iterator[None]:
        """Errors within get the file and the line in front. Nothing is blamed on a key that the file has not."""
        try:
            yield
        except ConfigError as error:
            raise ConfigError(f"{self.where(name, str(error))}: {error}") from error

    def _fill(self, content: dict[Any, Any], table: KnobTable) -> None:
        for key, value in content.items():
            name = str(key)
            with self.blame(name):
                if name in _LISTS:
                    setattr(self, name, value)
                    continue
                knob = table.find(name, (lambda near: near.replace("_", "-")) if "-" in name else str)
                if knob.name in self.options:
                    raise ConfigError(f"{name} sets {knob.name} a second time")
                self.options[knob.name] = knob.from_value(value, name)
        with self.blame("backends"):
            if self.backends is None or not isinstance(self.backends, list):
                raise ConfigError(f"backends must be a list; found {self.backends!r}")


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1
