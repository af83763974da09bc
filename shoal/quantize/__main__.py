"""`python -m shoal.quantize`: the program that `shoal quantize` starts, since the command itself loads no torch.

In: one line of JSON on standard input, a QuantizeOrder; then it stays open, and its end ends the program. Out: lines of
JSON on standard output, QuantizeNews.
"""

from __future__ import annotations

import sys

from shoal import log
from shoal.errors import ShoalError
from shoal.network.child_program import read_order, take_over_output
from shoal.quantize.order import QuantizeFailed, QuantizeOrder


def main() -> int:
    """Do the order on standard input; returns the exit code."""
    say = take_over_output()
    log.configure()
    order = read_order(QuantizeOrder)
    try:
        from shoal.quantize.run import quantize

        quantize(order, say)
    except ShoalError as error:
        say(QuantizeFailed(type(error).__name__, str(error)))
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
