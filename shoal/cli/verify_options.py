"""Options of `shoal verify`."""

from __future__ import annotations

import dataclasses

from shoal.config.options import option


@dataclasses.dataclass(frozen=True, kw_only=True)
class VerifyOptions:
    """What is compared."""

    path: str | None = option(None, "A directory, a file, or the Hugging Face name of a downloaded model.")
    check: str | None = option(
        None, "File with the sums that there should be, as sha256sum or BSD's sha256 writes them; -: standard input."
    )
    cluster: bool = option(False, "Let all nodes of the cluster hash the path, and compare them.")
    jobs: int | None = option(None, "Files that are read at a time; default: one a core, up to 16.", minimum=1)
    cache: bool = option(True, "Take the sums of unchanged files (size, times, inode) from earlier runs.")
