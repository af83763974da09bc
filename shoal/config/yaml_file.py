"""A YAML file of options: the flags' names as keys, with dashes or underscores (`shoal serve --config FILE`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from shoal.config.knobs import KnobTable
from shoal.errors import ConfigError


def _dashed(name: str) -> str:
    return name.replace("_", "-")


def read_yaml(path: str | Path, table: KnobTable) -> dict[str, Any]:
    """The options that the file sets, by field name.

    Raises ConfigError, naming the file and the key, for what cannot be read, unknown keys and wrong types.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        content = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the config file {path}: {getattr(error, 'strerror', None) or error}") from error
    except yaml.YAMLError as error:
        where = (
            f", line {error.problem_mark.line + 1}"
            if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark
            else ""
        )
        problem = getattr(error, "problem", None) or error
        raise ConfigError(f"{path}{where} is not YAML: {problem}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold `name: value` lines; found a {type(content).__name__}")
    values: dict[str, Any] = {}
    for key, value in content.items():
        if not isinstance(key, str):
            raise ConfigError(f"{path}: the key {key!r} must be an option's name")
        try:
            knob = table.find(key, _dashed if "-" in key else str)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error
        if knob.name in values:
            raise ConfigError(f"{path}: {key} sets {knob.name} a second time")
        values[knob.name] = knob.from_value(value, f"{path}: {key}")
    return values
