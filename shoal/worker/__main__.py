"""A worker's process: `python -m shoal.worker --link ENDPOINT --rank R --generation G`, started by a launcher.

The first line of standard input is JSON with the token of the link; its end means that the parent is gone: so
is this then. Imports neither transformers nor a web framework, and torch only when the environment for it is complete.
"""

from __future__ import annotations

import argparse
import ctypes
import faulthandler
import importlib
import json
import os
import signal
import sys
import threading
import time
from typing import Any

from shoal import env
from shoal.log import configure
from shoal.messages import WorkerSetup
from shoal.worker.process import MakeRank, OnProgress, Rank, Seat, run

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main(make_rank: MakeRank | None = None) -> int:
    """make_rank: what a benchmark or a test puts in the place of a model."""
    parser = argparse.ArgumentParser(prog="python -m shoal.worker", description=__doc__)
    parser.add_argument("--link", required=True, help="the executor's ZeroMQ endpoint")
    parser.add_argument("--rank", type=int, required=True, help="which rank this is")
    parser.add_argument("--generation", type=int, required=True, help="of the engine")
    parser.add_argument("--model-path", help="of the model on this host, where that is not the executor's")
    parser.add_argument("--end-with-thread", action="store_true", help="end with the thread that started this")
    arguments = parser.parse_args()
    if arguments.end_with_thread:
        _end_with_thread()
    first_line = sys.stdin.buffer.readline()
    if not first_line:
        return 3  # the parent is gone already
    token = json.loads(first_line)["token"]
    threading.Thread(target=_end_with_parent, name="parent-watch", daemon=True).start()
    configure(role=f"worker {arguments.rank}")
    # Ctrl-C, or its end, reaches all processes of a terminal: the core decides when running requests have finished.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    faulthandler.register(signal.SIGUSR1)
    make_rank = make_rank or _model_rank_maker(arguments.model_path)
    return run(arguments.link, arguments.rank, arguments.generation, token, make_rank)


def _model_rank_maker(model_path: str | None) -> MakeRank:
    def make(setup: WorkerSetup, seat: Seat, on_progress: OnProgress) -> Rank:
        started = time.monotonic()
        for name, value in setup.environment.items():
            env.set_default(name, value)
        if setup.several_hosts:
            # By themselves these libraries may take an interface that the other hosts do not reach.
            for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
                env.set_default(name, seat.interface)
        # torch warns of every peer whose address no name server knows, which is usual and means nothing here.
        env.set_default("TORCH_CPP_LOG_LEVEL", "ERROR")
        # torch and its libraries read their environment when they are loaded, so not before.
        module: Any = importlib.import_module("shoal.worker.rank")
        return module.make_model_rank(setup, seat, model_path, started, on_progress)

    return make


def _end_with_thread() -> None:
    """Have the kernel kill this process with the thread that started it; that works on a stopped process, too."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _end_with_parent() -> None:
    """Standard input ends when the parent has closed it, or died."""
    while os.read(sys.stdin.fileno(), 4096):
        pass
    os._exit(3)


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # threads of a failed step may never end, and libraries may crash as they are taken down
