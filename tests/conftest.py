"""What holds for all tests: one computing thread a process, no settings of the user's, no deadlines."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Iterator

# Before torch is imported anywhere: two test processes with two threads each are many times slower than with one.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"
# Before triton is imported anywhere, which libraries do: without a GPU its interpreter runs the kernels.
if not os.path.exists("/dev/nvidiactl"):
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
from hypothesis import settings

# nohup, and a shell that starts this behind `&`, have them ignored by all processes that are started here too, and some
# of these are to end by them.
for number, handler in ((signal.SIGHUP, signal.SIG_DFL), (signal.SIGINT, signal.default_int_handler)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)

# Timing is no test on a busy machine: only pytest's own time limit per test stands.
settings.register_profile("shoal", deadline=None)
settings.load_profile("shoal")


@pytest.fixture(autouse=True)
def no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """A developer's SHOAL_* variables must not change what the tests see."""
    for name in list(os.environ):
        if name.startswith("SHOAL_"):
            monkeypatch.delenv(name)
    # `shoal serve` sets it for its children; so it is put back after each test.
    monkeypatch.setenv("SHOAL_LOG_LEVEL", "info")
    monkeypatch.delenv("SHOAL_LOG_LEVEL")


@pytest.fixture(autouse=True)
def the_same_random_tensors_each_time() -> None:
    """A test that fails can be run again; tests without torch do not import it for this."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(autouse=True)
def logging_as_found() -> Iterator[None]:
    """What a test configures (the CLI does) must not hide records from the next one's caplog."""
    logger = logging.getLogger("shoal")
    handlers, level, propagate = list(logger.handlers), logger.level, logger.propagate
    yield
    logger.handlers[:] = handlers
    logger.setLevel(level)
    logger.propagate = propagate
