"""Command-line flags, derived from the option dataclasses: parsing and the help text. The CLI calls it.

A parser of our own, since it takes several values for one flag (`--api-key a b`), dashes or underscores, and answers
an unknown flag with the nearest right one.
"""

from __future__ import annotations

import inspect
import shutil
import textwrap
from collections.abc import Sequence
from typing import Any

from shoal.config.knobs import Knob, KnobTable
from shoal.errors import ConfigError


def spell_flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def parse_flags(arguments: Sequence[str], table: KnobTable, positional: str | None = None) -> dict[str, Any]:
    """The options that a command line sets, by field name. What it does not set is not in the result.

    positional: the option that a bare argument sets (`shoal serve MODEL`).
    Raises ConfigError for an unknown flag, a missing, surplus or wrong value.
    """
    values: dict[str, Any] = {}
    rest = list(arguments)
    while rest:
        token = rest.pop(0)
        if token == "--":
            for bare in rest:
                _set_positional(bare, table, positional, values)
            break
        if token.startswith("-") and len(token) > 1 and not token[1].isdigit():
            _set_flag(token, rest, table, values)
        else:
            _set_positional(token, table, positional, values)
    return values


def _set_flag(token: str, rest: list[str], table: KnobTable, values: dict[str, Any]) -> None:
    name, equals, inline = token.partition("=")
    if name.startswith("--"):
        key = name[2:].replace("-", "_")
        negated = table.by_name.get(key.removeprefix("no_")) if key.startswith("no_") else None
        if negated is not None and negated.is_switch and key not in table.by_name:
            if equals:
                raise ConfigError(f"{name} takes no value; got {inline!r}")
            values[negated.name] = False
            return
        knob = _find_flag(key, table)
    else:
        short = table.by_short.get(name[1:])
        knob = short or table.find(name[1:], lambda near: name if near == name[1:] else spell_flag(near))
    if knob.is_switch:
        values[knob.name] = knob.from_text(inline, name) if equals else True
    elif knob.is_list:
        texts = [inline] if equals else _following(rest)
        if not texts:
            raise ConfigError(f"{name} needs at least one value")
        added = [item for text in texts for item in knob.from_text(text, name)]
        values[knob.name] = [*values.get(knob.name, []), *added]
    else:
        if not equals and (not rest or rest[0].startswith("--")):
            raise ConfigError(f"{name} needs a value: {name} {_placeholder(knob)}")
        values[knob.name] = knob.from_text(inline if equals else rest.pop(0), name)


def _find_flag(key: str, table: KnobTable) -> Knob:
    """As KnobTable.find; what looks like a switch turned off ("--no-prefix-cache") gets a suggestion of its kind."""
    base = key.removeprefix("no_")
    if base == key or key in table.by_name:
        return table.find(key, spell_flag)
    if base in table.by_name:
        raise ConfigError(f"{spell_flag(key)} is not an option; {flag_usage(table.by_name[base])} takes a value")
    return table.find(base, lambda near: spell_flag(f"no_{near}" if near == base or _is_switch(near, table) else near))


def _is_switch(name: str, table: KnobTable) -> bool:
    return name in table.by_name and table.by_name[name].is_switch


def _following(rest: list[str]) -> list[str]:
    texts = []
    while rest and not rest[0].startswith("-"):
        texts.append(rest.pop(0))
    return texts


def _set_positional(text: str, table: KnobTable, positional: str | None, values: dict[str, Any]) -> None:
    if positional is None or positional in values:
        first = "" if positional is None else f" after {positional.upper()}"
        raise ConfigError(f"unexpected argument {text!r}{first}; options begin with --")
    values[positional] = table.by_name[positional].from_text(text, positional.upper())


def help_text(table: KnobTable, width: int | None = None) -> str:
    """The options by section, each with its values, its meaning and its default."""
    width = min(width or shutil.get_terminal_size((100, 24)).columns, 120)
    lines: list[str] = []
    for section in table.sections:
        lines += ["", section_title(section)]
        for knob in (knob for knob in table.knobs if knob.section is section):
            lines.append(f"  {flag_usage(knob)}")
            lines += textwrap.wrap(
                describe(knob), width, initial_indent=" " * 8, subsequent_indent=" " * 8, break_on_hyphens=False
            )
    return "\n".join(lines) + "\n"


def section_title(section: type) -> str:
    """The first sentence of the option class's docstring, without its full stop."""
    return (inspect.getdoc(section) or section.__name__).split("\n")[0].rstrip(".")


def flag_usage(knob: Knob) -> str:
    """ "-q, --quantization NAME": every spelling, and what follows it."""
    spellings = ([f"-{knob.short}"] if knob.short else []) + [spell_flag(name) for name in knob.names]
    if knob.is_switch:
        return ", ".join([*spellings, spell_flag(f"no_{knob.name}")])
    return f"{', '.join(spellings)} {_placeholder(knob)}"


def describe(knob: Knob) -> str:
    """The help sentence, the choices where there are few, and the default where the sentence does not say it."""
    text = knob.help
    if knob.choices:
        text += f" One of {', '.join(knob.choices)}."
    if knob.default is not None and knob.default != []:
        shown = {True: "on", False: "off"}[knob.default] if knob.is_switch else _plain(knob.default)
        text += f" Default: {shown}."
    return text


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(str(item) for item in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _placeholder(knob: Knob) -> str:
    if knob.is_list:
        word = knob.name.rsplit("_", 1)[-1]
        return f"{(word if word.endswith('ias') else word.rstrip('s')).upper()} …"
    if knob.types == (int,):
        return "N"
    if knob.types == (float,):
        return "X"
    return knob.name.rsplit("_", 1)[-1].upper()
