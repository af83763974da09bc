"""`python -m shoal.quantize`: the program that `shoal quantize` starts, since the command itself loads no torch.

In: one line of JSON on standard input, a QuantizeOrder; then it stays open, and its end ends the program. Out: lines of
JSON on standard output, QuantizeNews.
"""

from __future__ import annotations

import os
import sys
import threading

import msgspec

from shoal import log
from shoal.errors import ShoalError
from shoal.quantize.order import QuantizeFailed, QuantizeNews, QuantizeOrder


def main() -> int:
    """Do the order on standard input; returns the exit code."""
    # What libraries print goes to standard error, so that our lines are alone on standard output.
    output = os.dup(1)
    os.dup2(2, 1)

    def say(news: QuantizeNews) -> None:
        os.write(output, msgspec.json.encode(news) + b"\n")

    log.configure()
    order = msgspec.json.decode(sys.stdin.buffer.readline(), type=QuantizeOrder)
    threading.Thread(target=_end_with_input, name="shoal-quantize-input", daemon=True).start()
    try:
        from shoal.quantize.run import quantize

        quantize(order, say)
    except ShoalError as error:
        say(QuantizeFailed(type(error).__name__, str(error)))
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _end_with_input() -> None:
    """Standard input ends when the command has closed it or died."""
    # Not sys.stdin: its lock, held by a thread that waits, would not let the interpreter end.
    while os.read(0, 4096):
        pass
    os._exit(3)


if __name__ == "__main__":
    sys.exit(main())
