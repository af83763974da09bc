"""Sizes of memory as people write them: "512MiB", "4GiB", "2GB", "4294967296"."""

from __future__ import annotations

import re

from shoal.errors import ConfigError

_UNITS = {"": 1, "b": 1}
for _power, _letter in enumerate("kmgt", start=1):
    _UNITS[f"{_letter}ib"] = 1024**_power
    _UNITS[f"{_letter}b"] = 1000**_power
    _UNITS[_letter] = 1024**_power  # "4G", as in docker, systemd and java
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([a-z]*)", re.IGNORECASE)


def parse_size(text: str | int, source: str) -> int:
    """Bytes. KiB, MiB, GiB, TiB and the bare letters count by 1024; kB, MB, GB, TB by 1000.

    Raises ConfigError, beginning with `source`, for anything else and for nothing at all (0).
    """
    match = _SIZE.fullmatch(str(text).strip())
    if match is None or match[2].lower() not in _UNITS:
        raise ConfigError(f"{source} must be a size such as 512MiB, 4GiB or a number of bytes; got {text!r}")
    size = (
        int(float(match[1]) * _UNITS[match[2].lower()]) if "." in match[1] else int(match[1]) * _UNITS[match[2].lower()]
    )
    if size <= 0:
        raise ConfigError(f"{source} must be more than 0 bytes; got {text!r}")
    return size


def format_size(size: int | float) -> str:
    """ "3.7 GiB", "512 MiB", "17 bytes"."""
    for power, unit in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        if size >= 1024**power:
            value = size / 1024**power
            return f"{value:.1f} {unit}" if value < 10 and value != int(value) else f"{value:.0f} {unit}"
    return f"{int(size)} bytes"
