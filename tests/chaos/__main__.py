"""The long form of the chaos runs: `scripts/chaos --engine fake --faults 500`. Ends with 1 when anything was lost."""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from pathlib import Path

from tests.chaos.faults import ALL_KINDS, FAULTS
from tests.chaos.harness import ENGINES, Plan, Result, run


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/chaos", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--engine", choices=ENGINES, default="fake", help="real: shoal-tiny, two ranks each")
    parser.add_argument("--faults", type=int, default=len(ALL_KINDS), help="how many, one after the other")
    parser.add_argument("--kinds", nargs="+", choices=sorted(FAULTS), default=list(ALL_KINDS), metavar="KIND",
                        help=f"of {', '.join(sorted(FAULTS))}")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--concurrency", type=int, default=64, help="requests at a time")
    parser.add_argument("--pace", type=float, default=50.0, help="tokens a second of each request (fake engine)")
    parser.add_argument("--pause", type=float, default=1.0, help="most seconds of calm before a fault")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="append to these records and go on behind them")
    parser.add_argument("--no-router", action="store_true", help="one replica, no router, no faults: tries the harness")
    parser.add_argument("--router-flags", nargs=argparse.REMAINDER, default=[], help="more flags of shoal router")
    arguments = parser.parse_args()
    plan = Plan(
        engine=arguments.engine,
        num_faults=arguments.faults,
        kinds=("calm",) if arguments.no_router else tuple(arguments.kinds),
        seed=arguments.seed,
        num_replicas=1 if arguments.no_router else arguments.replicas,
        concurrency=arguments.concurrency,
        pace=arguments.pace,
        pause=arguments.pause,
        with_router=not arguments.no_router,
        router_flags=tuple(arguments.router_flags),
    )
    try:
        result = asyncio.run(_run(plan, arguments.resume))
    except (asyncio.CancelledError, KeyboardInterrupt):
        print("ended before it was through; --resume FILE goes on behind the faults that were written down")
        return 130
    print(result.summary())
    return 0 if result.ok else 1


async def _run(plan: Plan, file: Path | None) -> Result:
    """SIGTERM ends the run as Ctrl-C does: with all that it started."""
    task = asyncio.ensure_future(run(plan, file=file, tell=lambda text: print(text, flush=True)))
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    return await task


if __name__ == "__main__":
    sys.exit(main())
