"""`serve` on the fake core, as a process of its own: `python -m tests.server.serve_program MODEL SERVER N CORE…`.

MODEL, SERVER: fields of ModelOptions and ServerOptions as JSON. N: how many replicas. CORE: arguments of the fake core.
Ends as `shoal serve` does.
"""

from __future__ import annotations

import json
import sys

from shoal import log
from shoal.config.options import ModelOptions, ServerOptions
from shoal.config.resolve import make_engine_config
from shoal.engine.client import SubprocessClient
from shoal.errors import ShoalError
from shoal.server.run import serve


def main() -> int:
    model = ModelOptions(**json.loads(sys.argv[1]))
    options = ServerOptions(**json.loads(sys.argv[2]))
    num_replicas = int(sys.argv[3])
    core = sys.argv[4:]

    class FakeCoreClient(SubprocessClient):
        program = (sys.executable, "-m", "tests.server.fake_core", *core)

    log.configure("info")
    try:
        config = make_engine_config(model=model.model, device="cpu", max_model_len=512, data_parallel_size=num_replicas)
        serve(config, options, model, make_core=FakeCoreClient)
    except ShoalError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
