"""What was measured of links, kept in Shoal's cache directory: `shoal plan` predicts with it."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from shoal import env
from shoal.cluster.doctor.facts import LinkFacts
from shoal.cluster.plan.links import FILE_NAME


def write_links(links: Sequence[LinkFacts], directory: Path | None = None) -> Path | None:
    """The pairs that were measured in full; others that the file had stay. None where there was nothing to write.

    Raises OSError.
    """
    measured = {
        (link.source, link.target): {
            "from": link.source,
            "to": link.target,
            "bandwidth_bytes_per_s": link.bandwidth_bytes_per_s,
            "round_trip_s": link.round_trip_seconds,
        }
        for link in links
        if link.bandwidth_bytes_per_s and not link.error
    }
    if not measured:
        return None
    path = (directory or env.cache_directory()) / FILE_NAME
    before: list[dict[str, object]] = []
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        before = [pair for pair in json.loads(path.read_bytes())["pairs"] if isinstance(pair, dict)]
    pairs = [pair for pair in before if (pair.get("from"), pair.get("to")) not in measured]
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".links-")
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        json.dump({"pairs": [*pairs, *measured.values()]}, file, indent=1)
    os.replace(temporary, path)
    return path
