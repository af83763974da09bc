from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys

import pytest

from shoal.engine.client import SubprocessClient
from tests.executor.engines import make_config

_PROGRAM = """
import gc, weakref
from shoal.garbage import spare_what_lives

class Node:
    def __init__(self):
        self.me = self

before, kept = weakref.ref(Node()), Node()
spare_what_lives()
assert before() is None, "a cycle that was garbage already is gone"
assert gc.get_freeze_count() > 1000 and not any(each is kept for each in gc.get_objects())
after = weakref.ref(Node())
gc.collect()
assert after() is None, "later ones are collected as ever"
"""

_CORE = """
import gc, os, sys
from shoal.engine.__main__ import main
from shoal.executor.distributed import DistributedExecutor
from pathlib import Path
from tests.executor.engines import StandInLauncher

directory = Path(sys.argv.pop(1))

class Executor(DistributedExecutor):
    def shutdown(self):
        (directory / "frozen").write_text(f"{gc.get_freeze_count()} {len(gc.get_objects())}")
        super().shutdown()

os._exit(main(lambda config: Executor(config, StandInLauncher(config, "", directory))))
"""


def test_collects_once_and_spares_what_lives():
    subprocess.run([sys.executable, "-c", _PROGRAM], check=True)


async def test_an_engine_core_spares_what_its_start_made(tmp_path):
    client = SubprocessClient(make_config(1))
    client.program = (sys.executable, "-c", _CORE, str(tmp_path))
    await client.start()
    await client.close()
    num_frozen, num_others = map(int, (tmp_path / "frozen").read_text().split())
    assert num_frozen > 10_000 and num_others < num_frozen / 10


_NOTE_FREEZES = """
import gc, os, sys

freeze = gc.freeze

def note():
    freeze()
    with open(os.environ["FREEZES"], "a") as file:
        file.write(" ".join(sys.orig_argv) + "\\n")

gc.freeze = note
"""


@pytest.mark.parametrize(
    ("command", "processes"),
    [
        (
            ["serve", "--device", "cpu", "-tp", "2", "--kv-cache-memory", "128MiB"],
            ["shoal.worker", "shoal.worker", "shoal.engine", "serve"],
        ),
        (["router", "--backend", "http://127.0.0.1:9"], ["router"]),
    ],
    ids=["serve", "router"],
)
def test_every_process_that_serves_spares_what_its_start_made(tmp_path, command, processes):
    (tmp_path / "sitecustomize.py").write_text(_NOTE_FREEZES)
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "FREEZES": str(tmp_path / "freezes")}
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    whole = [sys.executable, "-m", "shoal.cli", *command, "--port", "0"]
    with subprocess.Popen(whole, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            lines = list(itertools.takewhile(lambda line: "Ctrl-C" not in line, process.stdout))
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0, lines
        finally:
            process.kill()
    frozen = (tmp_path / "freezes").read_text().splitlines()
    assert len(frozen) == len(processes), frozen
    assert all(name in line for name, line in zip(processes, frozen, strict=True)), frozen
