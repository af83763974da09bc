"""A RayLauncher with stand-ins for workers, driven by a test through standard input: run on a host of a Ray cluster.

`python -m tests.executor.ray_program TENSOR PIPELINE` prints a JSON object a line: what the launcher said.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time

from shoal.config.parallel import ParallelConfig
from shoal.config.resolve import make_engine_config
from shoal.errors import ShoalError
from shoal.executor.launcher import WorkerLink
from shoal.executor.ray import RayLauncher

# Says who it is, and waits for the end of its standard input.
STAND_IN = (
    "import json, os, sys; token = json.loads(sys.stdin.readline())['token'];"
    "print('rank', sys.argv[1], 'pid', os.getpid(), 'token', token, 'ppid', os.getppid(), flush=True);"
    "sys.stdin.read()"
)


class Link(WorkerLink):
    def command(self, rank: int) -> list[str]:
        return [sys.executable, "-c", STAND_IN, str(rank)]


def say(**facts: object) -> None:
    print(json.dumps(facts), flush=True)


def main(tensor: int, pipeline: int) -> None:
    config = make_engine_config(model="shoal-tiny", device="cpu")
    parallel = ParallelConfig(tensor_size=tensor, pipeline_size=pipeline, backend="ray", startup_timeout=60.0)
    launcher = RayLauncher(dataclasses.replace(config, parallel=parallel))
    started = time.monotonic()
    try:
        address = launcher.listen_address()
        token = launcher.token()
        launcher.start(
            Link(endpoint="tcp://127.0.0.1:9", generation=0, token=token), lambda rank, how: say(rank=rank, how=how)
        )
    except ShoalError as error:
        say(error=str(error), seconds=time.monotonic() - started)
        launcher.stop(0.0)
        return
    names = [launcher.describe(rank) for rank in range(parallel.world_size)]
    say(address=address, token=token, names=names, pid=os.getpid())
    for line in sys.stdin:
        started = time.monotonic()
        launcher.stop(float(line))
        launcher.stop(0.0)
        say(stopped=time.monotonic() - started)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
