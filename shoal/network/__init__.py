"""Where this process listens, how it connects, under which address others reach it, and the token that lets them in."""

from shoal.network.addresses import (
    Interface,
    format_interfaces,
    host_address,
    interface_of,
    interfaces,
    is_loopback,
    named_by,
    resolve_head,
    sends_from,
)
from shoal.network.connecting import connect
from shoal.network.curve import admit_token, present_token
from shoal.network.sockets import (
    format_endpoint,
    format_url,
    free_port,
    listen,
    listen_preferably,
    port_of,
    split_endpoint,
)
from shoal.network.token import create_token, default_token_path, internal_secret, load_token

__all__ = [
    "Interface",
    "admit_token",
    "connect",
    "create_token",
    "default_token_path",
    "format_endpoint",
    "format_interfaces",
    "format_url",
    "free_port",
    "host_address",
    "interface_of",
    "internal_secret",
    "interfaces",
    "is_loopback",
    "listen",
    "listen_preferably",
    "load_token",
    "named_by",
    "port_of",
    "present_token",
    "resolve_head",
    "sends_from",
    "split_endpoint",
]
