"""Stands in for `shoal serve` in tests of deployments: its flags, and behind them the fake server without a model.

The model "broken" does not come up.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from pathlib import Path

# It is started by its path: on a node the repository's root is not where Python looks.
sys.path[0] = str(Path(__file__).parents[2])

from shoal import env, log  # noqa: E402
from shoal.config.options import ServerOptions  # noqa: E402
from tests.router.fakes.core import Pace  # noqa: E402
from tests.router.fakes.native import FakeService  # noqa: E402


async def _serve(options: ServerOptions, pace: Pace) -> None:
    await FakeService(options, pace).run()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--served-model-name", required=True)
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--max-num-seqs", type=int, default=4)
    parser.add_argument("--shutdown-timeout", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    if arguments.model == "broken":
        sys.exit("shoal: error: the weights of broken are broken")
    log.configure("error")
    options = ServerOptions(
        host=arguments.host,
        port=arguments.port,
        served_model_name=[arguments.served_model_name],
        api_key=[key] if (key := env.api_key()) else [],
        shutdown_timeout=arguments.shutdown_timeout,
        disable_log_requests=True,
    )
    asyncio.run(_serve(options, Pace(tokens_per_second=40.0, max_num_seqs=arguments.max_num_seqs)))


if __name__ == "__main__":
    main()
