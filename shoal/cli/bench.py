"""`shoal bench`: how fast an engine or a server is."""

from __future__ import annotations

from shoal.cli.bench_offline import OFFLINE_COMMANDS
from shoal.cli.bench_serve import SERVE_COMMAND
from shoal.cli.command import CommandGroup

COMMAND = CommandGroup(
    name="bench",
    description="Measure any server with an OpenAI API (serve), or an engine of this machine without a server "
    "(latency, throughput, startup).",
    commands=(SERVE_COMMAND, *OFFLINE_COMMANDS),
)
