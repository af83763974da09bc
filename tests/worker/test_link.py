"""What a worker says whose executor cannot be reached."""

from __future__ import annotations

import subprocess
import sys

_WORKER = """
import sys, threading
import shoal.worker.link as link
from shoal.log import configure
configure(role="worker 0")
link._SILENCE_SECONDS = 0.5
link.ExecutorLink(sys.argv[1], 0, 1, "a-token-of-this-test")
threading.Event().wait(20)
"""


def test_an_executor_that_is_never_reached_is_told_from_one_that_fell_silent():
    done = subprocess.run(
        [sys.executable, "-c", _WORKER, "tcp://127.0.0.1:9"], capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 4
    assert "the executor at tcp://127.0.0.1:9 was not reached within 0.5 s: a firewall is between" in done.stderr
