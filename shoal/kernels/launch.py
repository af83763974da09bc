"""Programmatic dependent launch: a kernel may start while the one before it in its stream still runs. For all kernels.

A kernel that is launched so loads what no kernel writes that may still run (weights), then calls `gdc_wait`, and only
then touches anything else. Every kernel of a chain must wait, whether it reads or not: the next one relies on it. A
kernel that lets the next one start only after it has waited itself (decode attention, sums over ranks) says more: what
was written before the kernel in front of the next one is in place. Decode attention's EARLY rests on that.
"""

from __future__ import annotations

import functools

import torch


@functools.cache
def has_dependent_launch(device: torch.device) -> bool:
    """Whether the device can do it: sm_90 and later."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def launch_options(device: torch.device) -> dict[str, bool]:
    """What to pass beside `num_warps`; the interpreter does not know the option."""
    return {"launch_pdl": True} if has_dependent_launch(device) else {}
