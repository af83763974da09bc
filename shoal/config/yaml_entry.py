"""A YAML file whose entries know their lines, so that errors name them. yaml_file.py, deploy_file.py use it."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import yaml

from shoal.config.knobs import KnobTable
from shoal.errors import ConfigError


class Entry:
    """A value of the file. name: as an error calls it ("models[0].layout"). value: as Python has it.

    has_dashes: its key is written with dashes.
    """

    def __init__(
        self,
        path: str,
        name: str,
        node: yaml.Node | None,
        value: Any,
        line: int | None = None,
        *,
        has_dashes: bool = False,
    ) -> None:
        self.path, self.name, self.value, self.has_dashes = path, name, value, has_dashes
        self.line = line if line is not None else (int(node.start_mark.line) + 1 if node is not None else 1)
        self._node = node

    def error(self, message: str) -> ConfigError:
        """ "deploy.yaml, line 4: models[0].layout " and the message."""
        return ConfigError(f"{self.path}, line {self.line}: {f'{self.name} ' if self.name else ''}{message}")

    def fields(self) -> dict[str, Entry]:
        """The entries of a mapping, by name with underscores. Raises ConfigError for another kind, or a key twice."""
        if not isinstance(self._node, yaml.MappingNode):
            raise self.error(f"must hold `name: value` lines; found {self.value!r}")
        found: dict[str, Entry] = {}
        for key, value in self._node.value:
            line = int(key.start_mark.line) + 1
            if not isinstance(key, yaml.ScalarNode):
                raise ConfigError(f"{self.path}, line {line}: a key must be a name")
            name = key.value.replace("-", "_")
            has_dashes = "-" in key.value
            entry = Entry(self.path, self._below(f".{name}"), value, _construct(value), line, has_dashes=has_dashes)
            if name in found:
                raise entry.error(f"is there a second time (the first is in line {found[name].line})")
            found[name] = entry
        return found

    def items(self) -> Iterator[Entry]:
        """The entries of a list. Raises ConfigError for another kind."""
        if not isinstance(self._node, yaml.SequenceNode):
            raise self.error(f"must be a list; found {self.value!r}")
        for index, node in enumerate(self._node.value):
            yield Entry(self.path, self._below(f"[{index}]"), node, _construct(node))

    def options(self, *sections: type, beside: Collection[str] = ()) -> dict[str, Any]:
        """The mapping as options of these classes, converted, by field name. Raises ConfigError with the line.

        beside: names that stand there, too, and are somebody else's.
        """
        return self.options_of(KnobTable(sections), beside)

    def options_of(
        self, table: KnobTable, beside: Collection[str] = (), errors: list[ConfigError] | None = None
    ) -> dict[str, Any]:
        """The same for a table. errors: takes the error of each key, where the others are to be read all the same."""
        values: dict[str, Any] = {}
        for name, entry in self.fields().items():
            if name in beside:
                continue
            try:
                knob = table.find(name, _dashed if entry.has_dashes else str)
                if knob.name in values:
                    raise ConfigError(f"{name} sets {knob.name} a second time")
                values[knob.name] = knob.from_value(entry.value, entry.name)
            except ConfigError as error:
                told = ConfigError(f"{self.path}, line {entry.line}: {self._said(entry, str(error))}")
                if errors is None:
                    raise told from None
                errors.append(told)
        return values

    def _said(self, entry: Entry, message: str) -> str:
        return message if message.startswith(entry.name) else f"{self.name}: {message}" if self.name else message

    def _below(self, name: str) -> str:
        return f"{self.name}{name}" if self.name else name.removeprefix(".")


def _dashed(name: str) -> str:
    return name.replace("_", "-")


def read_entries(path: str) -> Entry:
    """The file as one entry. Raises ConfigError for what cannot be read, and for what is no YAML, with the line."""
    try:
        node = yaml.compose(Path(path).read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        value = _construct(node) if node is not None else None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark is not None else ""
        # The parser's own text quotes the file, which may hold keys.
        raise ConfigError(f"{path}{where} is not YAML: {getattr(error, 'problem', None) or 'unreadable'}") from None
    return Entry(path, "", node, value)


def _construct(node: yaml.Node) -> Any:
    loader = yaml.SafeLoader("")
    try:
        return loader.construct_document(node)  # type: ignore[no-untyped-call]
    finally:
        loader.dispose()  # type: ignore[no-untyped-call]
