"""Where option values come from, and which wins: flag or keyword > YAML file > environment (SHOAL_*) > default."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

from shoal import env
from shoal.config.flags import parse_flags, spell_flag
from shoal.config.knobs import KnobTable
from shoal.config.options import CacheOptions, ModelOptions, ParallelOptions, SchedulerOptions, ServerOptions
from shoal.config.yaml_file import read_yaml
from shoal.errors import ConfigError
from shoal.log import get_logger

ENGINE_SECTIONS = (ModelOptions, CacheOptions, SchedulerOptions, ParallelOptions)
SERVE_SECTIONS = (*ENGINE_SECTIONS, ServerOptions)

_logger = get_logger(__name__)


def options_from_arguments(
    arguments: Sequence[str], sections: Sequence[type], positional: str | None = None, *, takes_config: bool = True
) -> list[Any]:
    """One instance per section from a command line, the YAML file that its --config names, and the environment."""
    table = KnobTable(sections)
    rest, file = split_config(arguments) if takes_config else (arguments, None)
    flags = parse_flags(rest, table, positional)
    values = values_from_environment(table) | (read_yaml(file, table) if file else {}) | flags
    if positional and positional not in values:
        _refuse_swallowed_positional(positional, table, flags)
    return table.build(values)


def options_from_kwargs(kwargs: Mapping[str, Any], sections: Sequence[type] = ENGINE_SECTIONS) -> list[Any]:
    """One instance per section from keyword arguments (`LLM(...)`) and the environment.

    Raises ConfigError for an unknown name, with the nearest right one, and for a wrong type.
    """
    table = KnobTable(sections)
    values = values_from_environment(table)
    given: dict[str, Any] = {}
    for name, value in kwargs.items():
        knob = table.find(name, str)
        if knob.name in given:
            raise ConfigError(f"{name} sets {knob.name} a second time")
        given[knob.name] = knob.from_value(value, name)
    return table.build(values | given)


def warn_about_environment(sections: Sequence[type] = SERVE_SECTIONS) -> None:
    """Log a warning for each SHOAL_* variable that nothing reads, with the nearest name that something does."""
    names = [field.name for section in sections for field in dataclasses.fields(section)]
    for warning in env.unknown_names(names):
        _logger.warning("%s", warning)


def values_from_environment(table: KnobTable) -> dict[str, Any]:
    """What SHOAL_* variables set of these options, by field name."""
    texts = env.option_values()
    values = {}
    for knob in table.knobs:
        text = texts.get(knob.name, "").strip()
        if text:
            values[knob.name] = knob.from_text(text, env.PREFIX + knob.name.upper())
    return values


def split_config(arguments: Sequence[str]) -> tuple[list[str], str | None]:
    """Take `--config FILE` or `--config=FILE` out: it is no option, since a file cannot name itself."""
    rest: list[str] = []
    file = None
    remaining = list(arguments)
    while remaining:
        token = remaining.pop(0)
        if token == "--":
            rest += [token, *remaining]
            break
        name, equals, inline = token.partition("=")
        if name != "--config":
            rest.append(token)
            continue
        if file is not None:
            raise ConfigError("--config is given twice; one file holds all options")
        if not equals and not remaining:
            raise ConfigError("--config needs a value: --config FILE")
        file = inline if equals else remaining.pop(0)
    return rest, file


def _refuse_swallowed_positional(positional: str, table: KnobTable, flags: Mapping[str, Any]) -> None:
    """`--served-model-name name /models/x` gives both words to the flag; nobody means that."""
    for knob in table.knobs:
        swallowed = [item for item in flags.get(knob.name, [])[1:] if os.path.isdir(item)] if knob.is_list else []
        if swallowed:
            flag = spell_flag(knob.name)
            raise ConfigError(
                f"{flag} took the directory {swallowed[0]} as a value, and no {positional} is given; "
                f"put the {positional} first, or write --{positional} {swallowed[0]}"
            )
