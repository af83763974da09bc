"""Knobs: what the option dataclasses declare, as a table. Flags, YAML keys, variables and keyword arguments use it.

A knob converts a value from any of these sources to its declared type, or says what was found and what would work.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from shoal.errors import ConfigError

_TRUE = ("true", "yes", "on", "1")
_FALSE = ("false", "no", "off", "0")
# Flags of vLLM's that people bring along and this version has no counterpart of.
NOT_YET = {
    "speculative_config": "speculative decoding is not built in this version",
    "tool_call_parser": "tool calls are not built in this version",
    "reasoning_parser": "reasoning parsers are not built in this version",
}


@dataclasses.dataclass(frozen=True)
class Knob:
    """One option: its name and declared type (`bool`, `int`, `float`, `str` or `list[str]`; several for a union)."""

    name: str
    section: type
    types: tuple[type, ...]
    optional: bool
    default: Any
    help: str
    choices: tuple[str, ...] | None
    short: str | None
    aliases: tuple[str, ...]
    minimum: float | None
    maximum: float | None

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def is_switch(self) -> bool:
        return self.types == (bool,)

    @property
    def is_list(self) -> bool:
        return self.types == (list,)

    @property
    def names(self) -> tuple[str, ...]:
        """Every spelling with underscores: the field's name first."""
        return (self.name, *self.aliases)

    def from_text(self, text: str, source: str) -> Any:
        """A value written as text: on the command line or in a variable. `source` begins the error message."""
        if self.optional and text.lower() in ("none", "null"):
            return None
        if self.is_switch:
            if text.lower() not in _TRUE + _FALSE:
                raise ConfigError(f"{source} must be true or false; got {text!r}")
            return text.lower() in _TRUE
        if self.is_list:
            return self.from_value(_json_list(text, source) if text.lstrip().startswith("[") else [text], source)
        value: Any = text
        if str not in self.types:
            try:
                value = int(text) if int in self.types else float(text)
            except ValueError:
                raise ConfigError(f"{source} must be {self._wanted()}; got {text!r}") from None
        return self.from_value(value, source)

    def from_value(self, value: Any, source: str) -> Any:
        """A value that has a type already: out of a YAML file or a keyword argument."""
        if value is None and self.optional:
            return None
        if self.is_list:
            items = [value] if isinstance(value, str) else value
            if not isinstance(items, (list, tuple)) or not all(isinstance(item, str) for item in items):
                raise ConfigError(f"{source} must be {self._wanted()}; got {value!r}")
            return list(items)
        if float in self.types and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if isinstance(value, tuple) and list in self.types:
            value = list(value)
        if hasattr(value, "__fspath__") and str in self.types:
            value = value.__fspath__()
        if type(value) not in self.types:
            raise ConfigError(f"{source} must be {self._wanted()}; got {value!r} ({type(value).__name__})")
        if self.choices and value not in self.choices:
            near = difflib.get_close_matches(str(value), self.choices, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"{source} must be one of {', '.join(self.choices)}; got {value!r}{hint}")
        below = self.minimum is not None and not value >= self.minimum  # "not": NaN is in no range
        above = self.maximum is not None and not value <= self.maximum
        if below or above:
            raise ConfigError(f"{source} must be {self._wanted()}; got {value!r}")
        return value

    def _wanted(self) -> str:
        words = {
            bool: "true or false",
            int: "an integer",
            float: "a number",
            str: "a string",
            list: "a list of strings" if self.is_list else "a list",
            dict: "an object",
        }
        wanted = " or ".join(words[kind] for kind in self.types)
        if self.minimum is not None and self.maximum is not None:
            return f"{wanted} from {self.minimum:g} to {self.maximum:g}"
        if self.minimum is not None:
            return f"{wanted}, {self.minimum:g} or more"
        return wanted


class KnobTable:
    """The knobs of some option classes, findable under every spelling."""

    def __init__(self, sections: Iterable[type]) -> None:
        self.sections = tuple(sections)
        self.knobs = [knob for section in self.sections for knob in _declared(section)]
        self.by_name: dict[str, Knob] = {}
        self.by_short: dict[str, Knob] = {}
        for knob in self.knobs:
            for name in knob.names:
                assert name not in self.by_name, f"two options are called {name}"
                self.by_name[name] = knob
            if knob.short:
                assert knob.short not in self.by_short, f"two options are called -{knob.short}"
                self.by_short[knob.short] = knob

    def find(self, name: str, spell: Callable[[str], str]) -> Knob:
        """The knob of a name, with dashes or underscores. Raises ConfigError with the nearest right name.

        spell: how the source at hand writes an option's name ("max_model_len" -> "--max-model-len").
        """
        key = name.replace("-", "_")
        knob = self.by_name.get(key)
        if knob is not None:
            return knob
        if key in NOT_YET:
            raise ConfigError(f"{spell(key)} is not supported: {NOT_YET[key]}")
        near = difflib.get_close_matches(key, self.by_name, n=1)
        hint = f"; did you mean {spell(near[0])}?" if near else ", and no name is near it"
        raise ConfigError(f"{spell(key)} is not an option{hint}")

    def build(self, values: Mapping[str, Any]) -> list[Any]:
        """One instance per section, in the order given, of `values` by field name; the rest takes its default."""
        instances = []
        for section in self.sections:
            own = {knob.name for knob in self.knobs if knob.section is section}
            instances.append(section(**{name: value for name, value in values.items() if name in own}))
        return instances


def _declared(section: type) -> list[Knob]:
    hints = typing.get_type_hints(section)
    knobs = []
    for field in dataclasses.fields(section):
        kinds, optional = _kinds(hints[field.name])
        default = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
        metadata = field.metadata
        knobs.append(
            Knob(
                name=field.name,
                section=section,
                types=kinds,
                optional=optional,
                default=default,
                help=metadata["help"],
                choices=metadata["choices"],
                short=metadata["short"],
                aliases=metadata["aliases"],
                minimum=metadata["minimum"],
                maximum=metadata["maximum"],
            )
        )
    return knobs


def _kinds(hint: Any) -> tuple[tuple[type, ...], bool]:
    parts = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    kinds = tuple(typing.get_origin(part) or part for part in parts if part is not type(None))
    assert all(kind in (bool, int, float, str, list, dict) for kind in kinds), f"an option cannot be of type {hint}"
    return kinds, type(None) in parts


def _json_list(text: str, source: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{source} begins like a JSON list but is none ({error.msg}); got {text!r}") from None
