"""A value as an error message quotes it. Used by whoever checks what a client sent."""

from __future__ import annotations


def quoted(value: object, most: int = 100) -> str:
    """Its repr, cut to `most` characters."""
    try:
        text = repr(value)
    except ValueError:  # Python writes out no integer of more than 4,300 digits
        return "an integer of thousands of digits"
    return text if len(text) <= most else f"{text[:most]}…"
