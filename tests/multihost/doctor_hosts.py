"""Hosts with nodes on them, and `shoal doctor` run on one: what it says, as a program reads it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

from tests.namespaces import Host

TOKEN = "a-token-that-all-hosts-have"


class Report(NamedTuple):
    code: int
    findings: list[dict[str, Any]]
    facts: dict[str, Any]

    def of(self, check: str, status: str | None = None) -> Iterator[dict[str, Any]]:
        return (
            finding
            for finding in self.findings
            if finding["check"] == check and (status is None or finding["status"] == status)
        )

    def failed(self, check: str) -> dict[str, Any]:
        """The first finding of a check that failed."""
        found = list(self.of(check, "fail"))
        assert found, f"no {check!r} failed; there were: {self.described()}"
        return found[0]

    def described(self) -> str:
        return "\n".join(f"{f['node']}: {f['status']} {f['check']}: {f['seen']} [{f['mend']}]" for f in self.findings)


# What makes a node take itself for another version: before anything has imported it.
_AS_VERSION = """
import runpy, sys, shoal.version
shoal.version.__version__ = sys.argv.pop(1)
runpy.run_module("tests.multihost.doctor_node", run_name="__main__", alter_sys=True)
"""


def start_node(
    host: Host, head: Host, *, clock: float = 0.0, version: str | None = None, **variables: str
) -> subprocess.Popen[Any]:
    """A node as far as doctors see it (see doctor_node); it listens when this returns.

    clock: seconds that its clock is ahead. version: of Shoal, that it takes itself for.
    """
    program = ["-m", "tests.multihost.doctor_node"] if version is None else ["-c", _AS_VERSION, version]
    command = (sys.executable, *program, f"{head.address}:6379", host.address, str(clock))
    environment = {"SHOAL_CLUSTER_TOKEN": TOKEN, "OMP_NUM_THREADS": "1", **variables}
    process = host.popen(*command, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "up\n"
    return process


def doctor(
    host: Host, *arguments: str, prefix: tuple[str, ...] = (), timeout: float = 60.0, **variables: str
) -> Report:
    """`shoal doctor --json` there. Fails when it takes more than a minute, or says what is no report."""
    command = (*prefix, sys.executable, "-m", "shoal.cli", "doctor", "--json", *arguments)
    environment = {"SHOAL_CLUSTER_TOKEN": TOKEN, "OMP_NUM_THREADS": "1", **variables}
    process = host.popen(*command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        output, errors = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        raise AssertionError(f"the doctor took more than {timeout} s") from None
    try:
        report = json.loads(output)
    except ValueError:
        raise AssertionError(f"no report, exit code {process.returncode}:\n{output}\n{errors}") from None
    return Report(process.returncode, report["findings"], report["facts"])
