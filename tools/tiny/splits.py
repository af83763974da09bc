"""Decides what is held out: the same rule for the generator, the evaluation and the test that proves them disjoint."""

import zlib

TRAIN = "train"
HELD_OUT = "held_out"

_NUM_BUCKETS = {"range": 8}  # there are few ranges, so one in eight of them


def is_held_out(family: str, *parts: object) -> bool:
    """Whether an item goes to the evaluation: one in sixteen, by a checksum of its operands, numbers or words.

    Items of one family with the same parts always land on the same side, whatever sentence surrounds them.
    """
    text = family + "\x1f" + "\x1f".join(map(str, parts))
    return zlib.crc32(text.encode()) % _NUM_BUCKETS.get(family, 16) == 0


def matches(split: str, family: str, *parts: object) -> bool:
    """Whether an item belongs to `split`."""
    return is_held_out(family, *parts) == (split == HELD_OUT)
