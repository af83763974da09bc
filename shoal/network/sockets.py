"""Listening sockets: one that works, or an error that says why not. The server and the CLI call it."""

from __future__ import annotations

import contextlib
import errno
import socket

import psutil

from shoal.errors import ConfigError, StartupError

_BACKLOG = 2048


def listen(
    host: str, port: int, *, way_out: str = "choose another with --port (0 takes any free one)"
) -> socket.socket:
    """A TCP socket that listens on host:port (0: any free port), IPv4 or IPv6.

    way_out: what a user can do about a port that is taken.
    Raises ConfigError for a host that does not resolve, StartupError for a port that is taken or not allowed.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (socket.gaierror, OverflowError, UnicodeError) as error:
        raise ConfigError(
            f"cannot listen on {host}:{port}: the host does not resolve ({error}); try 127.0.0.1"
        ) from error
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise StartupError(_why_not(host, port, error, way_out)) from error
    listener.setblocking(False)
    return listener


def listen_preferably(host: str, port: int) -> socket.socket:
    """As `listen`, but on any free port when this one is taken. The caller says which it became (`port_of`)."""
    try:
        return listen(host, port)
    except StartupError:
        return listen(host, 0)


def port_of(listener: socket.socket) -> int:
    """The port that a listening socket was given."""
    return int(listener.getsockname()[1])


def free_port(host: str = "127.0.0.1") -> int:
    """A port that was free a moment ago. Prefer `listen(host, 0)`, which keeps it."""
    with contextlib.closing(listen(host, 0)) as listener:
        return port_of(listener)


def format_url(host: str, port: int, scheme: str = "http") -> str:
    """The URL under which a client on this machine reaches a server that listens on `host`."""
    if host in ("0.0.0.0", "::", ""):
        host = "127.0.0.1"
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def format_endpoint(host: str, port: int) -> str:
    """ "10.0.0.1:6379", "[fd00::1]:6379"."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def split_endpoint(endpoint: str, default_port: int | None = None) -> tuple[str, int]:
    """Host and port of "host:port" or "[fd00::1]:port"; the port may be left out where there is a default.

    Raises ConfigError.
    """
    host, colon, port = endpoint.rpartition(":")
    if not colon or "]" in port or (":" in host and not host.startswith("[")):
        host, port = endpoint, ""  # no port, or an IPv6 address alone
    if not port and default_port is not None:
        port = str(default_port)
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ConfigError(f"{endpoint!r} is no HOST:PORT; 10.0.0.1:6379, head.example:6379 and [fd00::1]:6379 are")
    return host, int(port)


def _why_not(host: str, port: int, error: OSError, way_out: str) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {port} on {host} is taken{_holder(port)}; {way_out}"
    if error.errno == errno.EACCES:
        return f"port {port} on {host} is not allowed for this user; ports from 1024 on are"
    if error.errno == errno.EADDRNOTAVAIL:
        return f"no interface of this machine has the address {host}; 127.0.0.1 (this machine) and 0.0.0.0 (all) work"
    return f"cannot listen on {host}:{port}: {error.strerror or error}"


def _holder(port: int) -> str:
    """ " by python3 (pid 4711)" where the system lets us see it."""
    try:
        for connection in psutil.net_connections(kind="tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr and connection.laddr.port == port:
                if connection.pid is None:
                    break
                return f" by {psutil.Process(connection.pid).name()} (pid {connection.pid})"
    except (OSError, psutil.Error):
        pass
    return ""
