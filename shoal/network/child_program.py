"""A program beside this one, for what this process shall not load: one order goes to it, and news come back, in lines
of JSON over its standard streams. It ends when its input does, so when this process is gone, however that died.

Used by `shoal bench` and `shoal quantize`, and by their programs.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import msgspec

from shoal import env, errors
from shoal.errors import EngineError, ShoalError

Order = TypeVar("Order")


@contextlib.contextmanager
def child_program(
    module: str, order: Any, *, end_seconds: float, environment: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """`python -m module`, running, which has read the order; it is gone afterwards, whatever happened.

    end_seconds: how long it may take to end by itself. environment: changes to its variables.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", module],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=env.subprocess_environment(environment),
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        with contextlib.suppress(BrokenPipeError):  # then its exit code says more
            process.stdin.write(msgspec.json.encode(order) + b"\n")
            process.stdin.flush()
        yield process
    finally:
        # The end of its input ends it.
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        process.stdout.close()
        try:
            process.wait(end_seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def lines_of(process: subprocess.Popen[bytes]) -> Iterator[bytes]:
    """The news, each still JSON, until the program ends."""
    assert process.stdout is not None
    yield from process.stdout


def error_of(kind: str, message: str) -> ShoalError:
    """The error of shoal.errors with that name; EngineError for one that is not there."""
    found = getattr(errors, kind, None)
    is_ours = isinstance(found, type) and issubclass(found, ShoalError)
    return found(message) if is_ours else EngineError(message)  # type: ignore[no-any-return, misc]


# --- the program's side ------------------------------------------------------------------------------------------


def do_order(
    kind: type[Order], work: Callable[[Order, Callable[[Any], None]], None], failed: Callable[[str, str], Any]
) -> int:
    """What the program's main does: `work` on the order of standard input, with a function that sends news. From here
    on whatever libraries print goes to standard error, and the end of the input ends this process.

    failed: the news of an error of ours, from its name and text. Returns the exit code.
    """
    output = os.dup(1)
    os.dup2(2, 1)

    def say(news: Any) -> None:
        os.write(output, msgspec.json.encode(news) + b"\n")

    order = msgspec.json.decode(sys.stdin.buffer.readline(), type=kind)
    threading.Thread(target=_end_with_input, name="program-input", daemon=True).start()
    try:
        work(order, say)
    except ShoalError as error:
        say(failed(type(error).__name__, str(error)))
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _end_with_input() -> None:
    # Not sys.stdin: its lock, held by a thread that waits, would not let the interpreter end.
    while os.read(0, 4096):
        pass
    os._exit(3)
