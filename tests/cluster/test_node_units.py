"""The systemd units: that systemd takes them, and that what they run are commands that there are."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from shoal.cli.node import COMMAND

_UNITS = Path(__file__).parents[2] / "deploy" / "systemd"


def _settings(text: str) -> dict[str, str]:
    lines = (line.strip() for line in text.splitlines())
    return dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))


@pytest.mark.parametrize("name", ["shoal-head", "shoal-node"])
@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_takes_the_unit(name):
    done = subprocess.run(
        ["systemd-analyze", "verify", str(_UNITS / f"{name}.service")], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("name", "head", "address"), [("shoal-head", True, None), ("shoal-node", False, "10.0.0.1:6379")]
)
def test_the_unit_runs_commands_of_this_program(name, head, address):
    variables = _settings((_UNITS / "shoal.env").read_text())
    unit = _settings((_UNITS / f"{name}.service").read_text())
    assert unit["EnvironmentFile"] == "/etc/shoal/shoal.env"

    def words(line: str) -> list[str]:
        program, *rest = line.split()
        assert program == "/usr/bin/env"
        known = [word for word in rest if word != "$SHOAL_NODE_OPTIONS"]
        return [variables[word[2:-1]] if word.startswith("${") else word for word in known]

    program, group, *arguments = words(unit["ExecStart"])
    assert program == "/opt/shoal/bin/shoal" and group == COMMAND.name
    command, rest = COMMAND.select(arguments)
    (options,) = command.parse(rest)
    assert (command.name, options.head, options.address, options.block) == ("node start", head, address, True)
    command, rest = COMMAND.select(words(unit["ExecStopPost"])[2:])
    assert command.name == "node stop" and rest == []
