"""The engine core's process: `python -m shoal.engine --input ENDPOINT --output ENDPOINT`, started by engine/client.

The first line of standard input is the EngineConfig as JSON; its end means that the parent is gone, and so is this.
"""

from __future__ import annotations

import argparse
import math
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable

import msgspec
import zmq

from shoal.config.engine_config import EngineConfig
from shoal.engine.core import EngineCore
from shoal.engine.parent import end_with_parent
from shoal.errors import EngineDeadError, ShoalError
from shoal.executor.base import Executor
from shoal.executor.registry import make_executor
from shoal.garbage import spare_what_lives
from shoal.log import configure, get_logger
from shoal.messages import ClientMessage, CoreFailed, CoreMessage

logger = get_logger(__name__)


class SocketChannel:
    """The core's end of the two sockets."""

    def __init__(self, input_endpoint: str, output_endpoint: str) -> None:
        self._context = zmq.Context()
        self._input = self._context.socket(zmq.PULL)
        self._output = self._context.socket(zmq.PUSH)
        for socket in (self._input, self._output):
            socket.set_hwm(0)  # the client bounds what it queues; nothing is dropped here
        self._input.connect(input_endpoint)
        self._output.connect(output_endpoint)
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)  # open to the end: a late step may still wake
        self._poller = zmq.Poller()
        self._poller.register(self._input, zmq.POLLIN)
        self._poller.register(self._wake, zmq.POLLIN)
        self._decoder = msgspec.msgpack.Decoder(ClientMessage)
        self._encoder = msgspec.msgpack.Encoder()
        self._failure: EngineDeadError | None = None

    def receive(self, block: bool, seconds: float | None = None) -> list[ClientMessage]:
        messages: list[ClientMessage] = []
        until = None if seconds is None else time.monotonic() + seconds
        while block and self._failure is None and not self._input.poll(0):
            left = None if until is None else until - time.monotonic()
            if left is not None and left <= 0:
                break
            self.wait(left)
        if self._failure is not None:
            raise self._failure
        while True:
            try:
                messages.append(self._decoder.decode(self._input.recv(zmq.NOBLOCK)))
            except zmq.Again:
                break
        return messages

    def wait(self, seconds: float | None = None) -> None:
        milliseconds = None if seconds is None else math.ceil(seconds * 1000)
        if any(ready == self._wake for ready, _ in self._poller.poll(milliseconds)):
            os.eventfd_read(self._wake)

    def wake(self) -> None:
        os.eventfd_write(self._wake, 1)

    def fail(self, failure: EngineDeadError) -> None:
        """Have `receive` raise this, now or the next time; called from any thread."""
        self._failure = failure
        self.wake()

    def send(self, message: CoreMessage) -> None:
        self._output.send(self._encoder.encode(message))

    def close(self) -> None:
        """Hand over what is still queued, for a second at most."""
        self._context.destroy(linger=1000)


def main(make: Callable[[EngineConfig], Executor] = make_executor) -> int:
    """make: what a test or a benchmark puts in the place of real workers."""
    parser = argparse.ArgumentParser(prog="python -m shoal.engine", description=__doc__)
    parser.add_argument("--input", required=True, help="endpoint that brings requests")
    parser.add_argument("--output", required=True, help="endpoint that takes tokens")
    arguments = parser.parse_args()
    config = EngineConfig.from_json(sys.stdin.buffer.readline())
    configure(role="engine", rank=config.parallel.data_rank, world_size=config.parallel.data_size)
    # Ctrl-C, the end of a terminal and a service manager's SIGTERM reach the parent too: it decides when running
    # requests have finished, and its end is this process's.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    executor: Executor | None = None

    def say_last_words() -> None:
        if executor is not None:
            executor.abandon()

    endpoints = [arguments.input, arguments.output]
    threading.Thread(target=end_with_parent, args=(endpoints, say_last_words), name="parent-watch", daemon=True).start()
    channel = SocketChannel(arguments.input, arguments.output)
    try:
        executor = make(config)
        executor.watch(channel.fail)
        core = EngineCore(config, executor, channel)
        core.start(spare_what_lives)
        core.run()
    except Exception as error:
        known = isinstance(error, ShoalError)
        text = str(error) if known else f"{type(error).__name__}: {error}"
        if not known:
            traceback.print_exc()
        channel.send(CoreFailed(type(error).__name__ if known else "EngineError", text))
        return 1
    finally:
        if executor is not None:
            executor.shutdown()  # whatever happened, no worker is left
        channel.close()
    return 0


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # threads of a failed step may never end
