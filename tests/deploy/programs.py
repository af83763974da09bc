"""Programs on a PATH of their own that stand in for real ones: each writes down how it was called."""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

_HEAD = """#!{python}
import json, os, signal, sys, time
with open({log!r}, "a") as log:
    log.write(json.dumps([{name!r}, *sys.argv[1:]]) + "\\n")
"""


class Programs:
    """directory: for the programs and what they write down."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory / "bin"
        self.directory.mkdir()
        self.log = directory / "calls"

    def add(self, name: str, body: str = "") -> None:
        """body: Python that follows the writing down; `sys.argv` is the call's."""
        path = self.directory / name
        path.write_text(_HEAD.format(python=sys.executable, log=str(self.log), name=name) + body)
        path.chmod(0o755)

    def calls(self) -> list[list[str]]:
        """Each call: the program's name and its arguments, in order."""
        if not self.log.exists():
            return []
        return [json.loads(line) for line in self.log.read_text().splitlines()]
