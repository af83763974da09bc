"""Opening a connection on a way that may lose packets. Whoever must tell such a way from a firewall calls `connect`.

TCP sends what opens a connection again after a second, and then ever later, so where packets are lost some connections
take longer than anybody waits, and would pass for dropped ones.
"""

from __future__ import annotations

import contextlib
import errno
import os
import selectors
import socket
import time

# Another attempt begins beside those that have no answer yet, of which so many are kept.
_NEXT_SECONDS = 0.4
_MOST_PENDING = 4
# "No way there" that comes so soon is said by a firewall or a router, which may not say it twice (their answers are
# few a second), and may be about packets of before. Later, the system itself has asked for seconds who has the address,
# and asks again for a new attempt.
_PROMPT_SECONDS = 0.8
_SURE_SECONDS = 1.0
_AGAIN_SECONDS = 0.05
_BURST_SECONDS = 0.1  # in which all attempts end when it gives up
_NO_ANSWER = (errno.EHOSTUNREACH, errno.ETIMEDOUT)


def connect(address: str, port: int, *, timeout: float, bind: str | None = None) -> socket.socket:
    """A TCP connection to address:port, by the first of several attempts that is answered. It waits for ever on reads.

    address: an IP address. timeout: seconds for all attempts. bind: the address of this machine to come from.
    Raises TimeoutError where none was answered, ConnectionRefusedError, and OSError with the system's errno else
    (EHOSTUNREACH: a firewall or a router says so).
    """
    family, kind, _, _, target = socket.getaddrinfo(
        address, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST
    )[0]
    deadline = time.monotonic() + timeout
    begun: dict[socket.socket, float] = {}  # those without an answer, the oldest first
    next_at, late_at, is_unreachable, is_last_look = 0.0, 0.0, False, False
    with contextlib.ExitStack() as stack:
        selector = stack.enter_context(selectors.DefaultSelector())
        while not is_last_look:
            now = time.monotonic()
            is_last_look = now >= deadline
            finished: list[tuple[socket.socket, int]] = []
            if now >= next_at and not is_last_look:
                next_at = now + _NEXT_SECONDS
                if len(begun) == _MOST_PENDING:
                    _forget(next(iter(begun)), begun, selector)
                try:
                    attempt = socket.socket(family, kind)
                except OSError:  # this process has too many open files
                    if not begun:
                        raise
                    continue
                stack.callback(attempt.close)
                begun[attempt] = now
                attempt.setblocking(False)
                if bind is not None:
                    attempt.bind((bind, 0))
                selector.register(attempt, selectors.EVENT_WRITE)
                if (state := attempt.connect_ex(target)) != errno.EINPROGRESS:
                    finished = [(attempt, state)]
            else:
                ready = selector.select(max(min(next_at, deadline) - now, 0.0))
                finished = [(_socket(key), _error_of(_socket(key))) for key, _ in ready]
            waited = time.monotonic() - min(begun.values(), default=now)
            for attempt, state in finished:
                if state == 0:
                    connection = attempt.dup()  # the attempts are closed, this one is not
                    connection.settimeout(None)
                    return connection
                if state not in _NO_ANSWER:
                    raise OSError(state, os.strerror(state))
                _forget(attempt, begun, selector)
                now = time.monotonic()
                next_at = min(next_at, now + _AGAIN_SECONDS)
                if waited >= _PROMPT_SECONDS:
                    late_at = now
                elif state == errno.EHOSTUNREACH and not is_unreachable and now - late_at > _BURST_SECONDS:
                    is_unreachable, deadline = True, min(deadline, now + _SURE_SECONDS)
    if is_unreachable:
        raise OSError(errno.EHOSTUNREACH, os.strerror(errno.EHOSTUNREACH))
    raise TimeoutError(errno.ETIMEDOUT, f"no answer within {timeout:g} s")


def _forget(attempt: socket.socket, begun: dict[socket.socket, float], selector: selectors.BaseSelector) -> None:
    del begun[attempt]
    selector.unregister(attempt)
    attempt.close()


def _socket(key: selectors.SelectorKey) -> socket.socket:
    assert isinstance(key.fileobj, socket.socket)
    return key.fileobj


def _error_of(attempt: socket.socket) -> int:
    return attempt.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
