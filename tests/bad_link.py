"""A cable with faults: joins two network interfaces that it makes (TAP), and delays, loses or keeps back frames.

`python -m tests.bad_link NEAR FAR SECONDS SHARE LARGEST` prints "up" when both are there. Frames are held for SECONDS
in each direction, SHARE of them are lost, and so are those of more than LARGEST bytes of payload (0: none). The
kernel's own netem does the same, but is not in every kernel.
"""

from __future__ import annotations

import contextlib
import fcntl
import heapq
import itertools
import os
import random
import select
import struct
import sys
import time

# linux/if_tun.h
_TUNSETIFF, _TAP_WITHOUT_HEADER = 0x400454CA, 0x0002 | 0x1000
_ETHERNET_BYTES = 14
_LONGEST_FRAME = 1 << 16


def open_tap(name: str) -> int:
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(descriptor, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _TAP_WITHOUT_HEADER))
    return descriptor


def run(near: int, far: int, seconds: float, share: float, largest: int) -> None:
    """Until it is killed."""
    other = {near: far, far: near}
    dice = random.Random(1)
    waiting: list[tuple[float, int, int, bytes]] = []  # when, order, to whom, frame
    order = itertools.count()
    while True:
        wait = max(waiting[0][0] - time.monotonic(), 0.0) if waiting else None
        for side in select.select([near, far], [], [], wait)[0]:
            for _ in range(64):
                try:
                    frame = os.read(side, _LONGEST_FRAME)
                except BlockingIOError:
                    break
                if dice.random() < share or 0 < largest < len(frame) - _ETHERNET_BYTES:
                    continue
                heapq.heappush(waiting, (time.monotonic() + seconds, next(order), other[side], frame))
        now = time.monotonic()
        while waiting and waiting[0][0] <= now:
            _, _, side, frame = heapq.heappop(waiting)
            with contextlib.suppress(OSError):  # the interface is not up yet, or its queue is full
                os.write(side, frame)


if __name__ == "__main__":
    ends = [open_tap(name) for name in sys.argv[1:3]]
    print("up", flush=True)
    run(*ends, float(sys.argv[3]), float(sys.argv[4]), int(sys.argv[5]))
