"""The version, in one place: the package's metadata, `shoal version` and /version read it."""

from __future__ import annotations

__version__ = "0.1.0"
