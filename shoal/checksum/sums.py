"""Lists of sums, as sha256sum of GNU coreutils and BSD's sha256 write and read them.

Names are text as Python has it from the file system: bytes that are no UTF-8 are surrogates (os.fsencode undoes it).
"""

from __future__ import annotations

import re

from shoal.errors import ConfigError

_ESCAPES = {"\\": "\\\\", "\n": "\\n", "\r": "\\r"}
_UNESCAPES = {"\\": "\\", "n": "\n", "r": "\r"}
_HEX = re.compile(r"[0-9a-fA-F]{64}")
# "<sum>  name" (text) or "<sum> *name" (binary).
_GNU = re.compile(r"([0-9a-fA-F]+) [ *](.+)")
_BSD = re.compile(r"(SHA2?-?256) ?\((.+)\) ?= ?([0-9a-fA-F]+)")
_OTHER_BSD = re.compile(r"([A-Z0-9/_-]+) ?\((.+)\) ?= ?([0-9a-fA-F]+)")


def escape_name(name: str) -> tuple[str, bool]:
    """A name as it fits one line, and whether that changed it: then the line begins with a backslash."""
    escaped = "".join(_ESCAPES.get(character, character) for character in name)
    return escaped, escaped != name


def format_sum(name: str, digest: str) -> str:
    """The line of sha256sum, without its end."""
    escaped, changed = escape_name(name)
    return ("\\" if changed else "") + f"{digest}  {escaped}"


def parse_sums(text: str, source: str) -> dict[str, str]:
    """Names and their sums (lower case) of a list in any of the formats; a leading "./" of names is left out.

    Empty lines and those that begin with # are none. source: begins the error message.
    Raises ConfigError with the line for one that is no sum, for another algorithm, for a name with two sums, and for
    a list without any.
    """
    found: dict[str, str] = {}
    # Not splitlines: names may hold other characters that count as line ends there.
    for number, line in enumerate(text.split("\n"), 1):
        line = line.removesuffix("\r")
        if not line.strip() or line.startswith("#"):
            continue
        name, digest = _parse_line(line, f"{source}, line {number}")
        if found.get(name, digest) != digest:
            raise ConfigError(f"{source}, line {number}: {name} has another sum further up")
        found[name] = digest
    if not found:
        raise ConfigError(f"{source} holds no sums; a line of it is 64 hexadecimal digits, two spaces and a name")
    return found


def _parse_line(line: str, where: str) -> tuple[str, str]:
    escaped = line.startswith("\\")
    body = line[1:] if escaped else line
    if match := _BSD.fullmatch(body):
        name, digest = match[2], match[3]
    elif match := _OTHER_BSD.fullmatch(body):
        raise ConfigError(f"{where}: a sum by {match[1]}; only SHA-256 is compared")
    elif match := _GNU.fullmatch(body):
        digest, name = match[1], match[2]
    else:
        raise ConfigError(
            f"{where}: no sum: {line[:100]!r}; 64 hexadecimal digits, two spaces and a name would be one, or "
            "SHA256 (name) = digits"
        )
    if not _HEX.fullmatch(digest):
        raise ConfigError(f"{where}: {len(digest)} hexadecimal digits are no SHA-256, which has 64")
    if escaped:
        name = _unescape(name, where)
    while name.startswith("./"):
        name = name[2:].lstrip("/")
    return name, digest.lower()


def _unescape(name: str, where: str) -> str:
    def plain(match: re.Match[str]) -> str:
        if match[1] not in _UNESCAPES:
            raise ConfigError(f"{where}: \\{match[1]} in an escaped name; there are \\\\, \\n and \\r")
        return _UNESCAPES[match[1]]

    return re.sub(r"\\(.?)", plain, name, flags=re.DOTALL)
