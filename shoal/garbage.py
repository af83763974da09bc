"""Python's garbage collector in processes that serve: it leaves alone what was made while they started.

A full collection looks at every object, and torch's modules alone are 200,000: every stream of a server stands still
for an eighth of a second then (2026-11), at a time of the collector's choosing.
"""

from __future__ import annotations

import gc


def spare_what_lives() -> None:
    """Collect once, then keep all objects of this moment out of every later collection. Called at the end of a start,
    in processes of our own alone: what of it becomes a cycle of garbage afterwards stays."""
    gc.collect()
    gc.freeze()
