"""An engine core whose workers are stand-ins: `python -m tests.executor.core_program BEHAVIOUR DIRECTORY --input …`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from shoal.engine.__main__ import main
from shoal.executor.distributed import DistributedExecutor
from tests.executor.engines import StandInLauncher

if __name__ == "__main__":
    behaviour, directory = sys.argv.pop(1), Path(sys.argv.pop(1))
    status = main(lambda config: DistributedExecutor(config, StandInLauncher(config, behaviour, directory)))
    sys.stderr.flush()
    os._exit(status)
