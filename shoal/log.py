"""Loggers: one line a record on stderr, with a prefix that says which process or rank speaks.

Every process calls `configure` once at its start; modules take `get_logger(__name__)` at import.
"""

from __future__ import annotations

import functools
import logging
import sys

from shoal import env

_ROOT = "shoal"
_COLORS = {
    logging.DEBUG: "\033[2m",
    logging.WARNING: "\033[33m",
    logging.ERROR: "\033[31m",
    logging.CRITICAL: "\033[31m",
}
_RESET = "\033[0m"


class _Handler(logging.StreamHandler):  # type: ignore[type-arg]
    """The one handler of the "shoal" loggers. A class of its own, so that a second `configure` finds it again."""

    @property
    def stream(self) -> object:  # stderr as it is now: tests and notebooks replace it
        return sys.stderr

    @stream.setter
    def stream(self, value: object) -> None:
        pass


class _Formatter(logging.Formatter):
    def __init__(self, role: str, color: bool) -> None:
        self.role = role
        prefix = f"[{role}] " if role else ""
        super().__init__(f"%(asctime)s %(levelname)-7s {prefix}%(message)s", datefmt="%H:%M:%S")
        self.color = color

    def format(self, record: logging.LogRecord) -> str:
        line = super().format(record)
        if self.color and record.levelno in _COLORS:
            return f"{_COLORS[record.levelno]}{line}{_RESET}"
        return line


def get_logger(name: str) -> logging.Logger:
    """The logger of a module of Shoal. Before `configure` it shows warnings and errors, by Python's own default."""
    return logging.getLogger(name if name.split(".")[0] == _ROOT else f"{_ROOT}.{name}")


@functools.cache
def warn_once(logger: logging.Logger, message: str) -> None:
    """For what each of many layers would say: the first one's in this process."""
    logger.warning("%s", message)


def configure(level: str | None = None, *, role: str = "", rank: int | None = None, world_size: int = 1) -> None:
    """Send Shoal's records to stderr, once however often it is called; the last call decides.

    level: "debug", "info", "warning" or "error"; None takes SHOAL_LOG_LEVEL, else "info".
    role: who speaks ("engine"); with `world_size` > 1 the rank is added ("worker 3/8").
    """
    if rank is not None and world_size > 1:
        role = f"{role} {rank}/{world_size}".strip()
    logger = logging.getLogger(_ROOT)
    handlers = [handler for handler in logger.handlers if isinstance(handler, _Handler)]
    handler = handlers[0] if handlers else _Handler()
    if not handlers:
        logger.addHandler(handler)
    handler.setFormatter(_Formatter(role, color=sys.stderr.isatty() and not env.no_color()))
    logger.setLevel((level or env.log_level() or "info").upper())
    logger.propagate = False
