"""`python -m shoal.cluster.daemon DIRECTORY`: the daemon of this machine's node, which is recorded with that directory.

`shoal node start` starts it, with the cluster's token in its environment; what it says goes to DIRECTORY/daemon.log.
"""

from __future__ import annotations

import sys

from shoal import log, network
from shoal.cluster.daemon.daemon import Daemon
from shoal.cluster.ray_node import read_plan
from shoal.errors import ShoalError, StartupError
from shoal.network.node_record import read_record


def main(directory: str) -> int:
    log.configure(role="daemon")
    try:
        record = read_record()
        if record is None or record.directory != directory:
            raise StartupError(f"{directory} is not the directory of this machine's node")
        Daemon(read_plan(directory, network.load_token()), record).run()
    except ShoalError as error:
        print(f"shoal: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
