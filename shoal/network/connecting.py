"""Opening a connection on a way that may lose packets. Whoever must tell such a way from a firewall calls `connect`.

TCP sends what opens a connection again after 1, 3 and 7 s only, so where packets are lost some connections take longer
than anybody waits, and would pass for dropped ones.
"""

from __future__ import annotations

import contextlib
import errno
import os
import selectors
import socket
import time

# Another attempt begins beside those that have no answer yet.
_NEXT_SECONDS = 0.4
# What says so early that there is no way is a firewall, or a router; the system itself asks for seconds who has an
# address, and where these questions are lost asks again only for a new attempt.
_PROMPT_SECONDS = 0.2
_AGAIN_SECONDS = 0.05


def connect(address: str, port: int, *, timeout: float, bind: str | None = None) -> socket.socket:
    """A TCP connection to address:port, by the first of several attempts that is answered. It waits for ever on reads.

    address: an IP address. timeout: seconds for all attempts. bind: the address of this machine to come from.
    Raises TimeoutError where none was answered, ConnectionRefusedError, and OSError with the system's errno else.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    deadline = time.monotonic() + timeout
    begun: dict[socket.socket, float] = {}
    next_at, num_prompt = 0.0, 0
    with contextlib.ExitStack() as stack:
        selector = stack.enter_context(selectors.DefaultSelector())
        while (now := time.monotonic()) < deadline:
            if now >= next_at:
                attempt = stack.enter_context(contextlib.closing(socket.socket(family, socket.SOCK_STREAM)))
                begun[attempt], next_at = now, now + _NEXT_SECONDS
                attempt.setblocking(False)
                if bind is not None:
                    attempt.bind((bind, 0))
                state = attempt.connect_ex((address, port))
                finished = [(attempt, state)] if state != errno.EINPROGRESS else []
                if not finished:
                    selector.register(attempt, selectors.EVENT_WRITE)
            else:
                ready = selector.select(min(next_at, deadline) - now)
                finished = [(_socket(key), _error_of(_socket(key))) for key, _ in ready]
                for attempt, _ in finished:
                    selector.unregister(attempt)
            for attempt, state in finished:
                if state == 0:
                    connection = attempt.dup()  # the attempts are closed, this one is not
                    connection.settimeout(None)
                    return connection
                if state != errno.EHOSTUNREACH:
                    raise OSError(state, os.strerror(state))
                now = time.monotonic()
                num_prompt += now - begun[attempt] < _PROMPT_SECONDS
                if num_prompt > 1:
                    raise OSError(state, os.strerror(state))
                next_at = min(next_at, now + _AGAIN_SECONDS)
    raise TimeoutError(errno.ETIMEDOUT, f"no answer within {timeout:g} s")


def _socket(key: selectors.SelectorKey) -> socket.socket:
    assert isinstance(key.fileobj, socket.socket)
    return key.fileobj


def _error_of(attempt: socket.socket) -> int:
    return attempt.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
