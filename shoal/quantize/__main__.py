"""`python -m shoal.quantize`: the program that `shoal quantize` starts, since the command itself loads no torch.

In: one line of JSON on standard input, a QuantizeOrder; then it stays open, and its end ends the program. Out: lines of
JSON on standard output, QuantizeNews.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

from shoal import log
from shoal.network.child_program import do_order
from shoal.quantize.order import QuantizeFailed, QuantizeNews, QuantizeOrder


def main() -> int:
    """Do the order on standard input; returns the exit code."""
    log.configure()
    return do_order(QuantizeOrder, _quantize, QuantizeFailed)


def _quantize(order: QuantizeOrder, say: Callable[[QuantizeNews], None]) -> None:
    from shoal.quantize.run import quantize  # torch, once the order is read

    quantize(order, say)


if __name__ == "__main__":
    sys.exit(main())
