"""What a killed process leaves behind is ended: what runs on, what is stopped, and nothing else."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import psutil
import pytest

from shoal.engine.leftovers import descendants, end_leftovers

PARENT = """
import subprocess, sys, time
children = [subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) for _ in range(2)]
print("up", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("stopped", [False, True])
async def test_children_of_a_killed_process_are_ended(stopped: bool) -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None and parent.stdout.readline() == b"up\n"
        children = descendants(parent.pid)
        assert len(children) == 2
        if stopped:
            children[0].send_signal(signal.SIGSTOP)
        parent.kill()
        parent.wait()
    assert all(child.is_running() for child in children)
    assert sorted(await end_leftovers(children, 0.05)) == sorted(child.pid for child in children)
    assert not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children)
    assert await end_leftovers(children) == []


async def test_what_ends_by_itself_is_waited_for() -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(0.3)"]) as process:
        began = time.monotonic()
        assert await end_leftovers([psutil.Process(process.pid)], 30) == []
        assert time.monotonic() - began < 30
        assert process.wait() == 0
        assert descendants(process.pid) == ()
