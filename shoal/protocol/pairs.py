"""Pairs of texts to score, as clients and scripts give them."""

from __future__ import annotations

from shoal.errors import InvalidRequestError


def make_pairs(first: str | list[str], second: str | list[str], names: tuple[str, str]) -> list[tuple[str, str]]:
    """1:1, 1:N or N:N texts as pairs. Raises InvalidRequestError for other numbers."""
    firsts = [first] if isinstance(first, str) else first
    seconds = [second] if isinstance(second, str) else second
    for name, texts in zip(names, (firsts, seconds), strict=True):
        if not texts:
            raise InvalidRequestError(f"{name} is an empty list; send at least one text", name)
    if len(firsts) == 1:
        firsts = firsts * len(seconds)
    if len(firsts) != len(seconds):
        raise InvalidRequestError(
            f"{len(firsts)} texts in {names[0]} and {len(seconds)} in {names[1]}; 1 and any number go together, or as "
            "many as there are of the other",
            names[1],
        )
    return list(zip(firsts, seconds, strict=True))
