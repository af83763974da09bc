"""Starts this machine's ranks of an all-reduce that is tried, each as a process, and ends them at a deadline."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import time
from collections.abc import Sequence

import msgspec

from shoal import env
from shoal.messages import TrialOrder

# Loading torch, on a machine that is busy.
_LOAD_SECONDS = 30.0


class Outcome(msgspec.Struct, frozen=True):
    """error: "" when it worked. skipped: why it could not be tried. network: what NCCL said that it takes."""

    error: str = ""
    skipped: str = ""
    seconds: float = 0.0
    num_bytes: int = 0
    network: str = ""


def run_ranks(ranks: Sequence[TrialOrder], *, use_rdma: bool | None = None) -> list[Outcome]:
    """All at once; returns when all have ended, or have been ended. use_rdma: NCCL shall, or shall not, use RDMA."""
    if importlib.util.find_spec("torch") is None:
        return [Outcome(skipped="torch is not installed")] * len(ranks)
    variables = {"OMP_NUM_THREADS": "1"}
    if any(rank.backend == "nccl" for rank in ranks):
        variables["NCCL_DEBUG"] = "INFO"
    if use_rdma is not None:
        variables["NCCL_IB_DISABLE"] = "0" if use_rdma else "1"
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "shoal.distributed.trial", msgspec.json.encode(rank).decode()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=env.subprocess_environment(variables),
            start_new_session=True,
        )
        for rank in ranks
    ]
    # Each rank keeps the deadline of a phase itself, and says which one passed; this ends one that cannot.
    deadline = time.monotonic() + _LOAD_SECONDS + 2 * ranks[0].timeout
    try:
        return [_outcome(process, deadline) for process in running]
    finally:
        for process in running:
            process.kill()
            process.wait()


def _outcome(process: subprocess.Popen[str], deadline: float) -> Outcome:
    try:
        output, _ = process.communicate(timeout=max(deadline - time.monotonic(), 0.1))
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return Outcome(error="it hangs, and was ended at its deadline")
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    network = "RDMA" if "Using network IB" in output else "TCP" if "Using network Socket" in output else ""
    for line in reversed(lines):
        if line.startswith("{"):
            try:
                return msgspec.structs.replace(msgspec.json.decode(line, type=Outcome), network=network)
            except msgspec.MsgspecError:
                continue
    how = f"killed by signal {-process.returncode}" if process.returncode < 0 else f"exit code {process.returncode}"
    return Outcome(error=f"it ended without a result ({how}): {lines[-1] if lines else 'and said nothing'}")
