"""Ten times what the servers can do, for a few seconds; `scripts/bench router overload` does it for a minute."""

from __future__ import annotations

import pytest

from benchmarks.router import overload

MIB = 2**20


@pytest.mark.timeout(180)
async def test_what_is_accepted_is_whole_and_the_rest_is_told_when_to_come_back():
    figures = await overload(4.0)
    kinds = dict(figures["kinds"])
    assert kinds.pop("accepted and whole", 0) >= 64, "the queue alone holds so many"
    refused = sum(kinds.pop(f"{status} with Retry-After", 0) for status in (429, 503))
    assert refused > figures["requests"] / 2, "it was no overload"
    assert not kinds, "some requests ended in another way"
    assert figures["rss at most"] - figures["rss at the start"] < 64 * MIB
