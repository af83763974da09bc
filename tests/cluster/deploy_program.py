"""`shoal deploy FILE` with deploy_server in place of `shoal serve`. deployed.py runs it."""

from __future__ import annotations

import sys
from pathlib import Path

from shoal.cli.main import main
from shoal.cluster.deploy.client import Deployer

if __name__ == "__main__":
    Deployer.program = (sys.executable, str(Path(__file__).parent / "deploy_server.py"))
    sys.exit(main(["deploy", *sys.argv[1:]]))
