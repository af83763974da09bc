"""A program that stands in for `shoal serve`: python -m tests.cli.fake_serve PORT BEHAVIOUR. SIGTERM ends it."""

from __future__ import annotations

import signal
import sys
import threading

from tests.cli.fake_server import fake_server

if __name__ == "__main__":
    port, behaviour = int(sys.argv[1]), sys.argv[2]
    print("loading weights", file=sys.stderr, flush=True)
    if behaviour == "fails":
        print("no memory for the KV cache", file=sys.stderr, flush=True)
        sys.exit(3)
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    with fake_server(port) as server:
        if behaviour == "silent":
            server.pieces = []
        print(f"tiny is served at {server.url}\nCtrl-C stops it", flush=True)
        while not ended.wait(0.05):
            pass
    print("ended in order", file=sys.stderr, flush=True)
