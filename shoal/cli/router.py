"""`shoal router`: options in, a running router out; and `shoal router status`, `drain`, `undrain`, which ask one."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from shoal import env, log
from shoal.cli.client_options import CLIENT_SECTIONS, RouterClientOptions, RouterTargetOptions
from shoal.cli.command import Command, CommandGroup
from shoal.cli.router_client import ask_router, show_backends
from shoal.config.options import RouterOptions
from shoal.config.router_settings import SettingsSource
from shoal.config.sources import SERVE_SECTIONS, warn_about_environment
from shoal.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class _RouterCommand(Command):
    """Its options stay bound to their sources: the file is read again whenever it changes."""

    def parse(self, arguments: Sequence[str]) -> list[Any]:
        return [SettingsSource.of(arguments)]


@dataclasses.dataclass(frozen=True)
class _RouterGroup(CommandGroup):
    """A group of which the bare name is a command, too: the first one."""

    def select(self, arguments: Sequence[str]) -> tuple[Command | CommandGroup, list[str]]:
        first = arguments[0] if arguments else ""
        if first in ("-h", "--help"):
            return self, [first]
        if not first or first.startswith("-"):
            return self.commands[0], list(arguments)
        names = [command.name.removeprefix(f"{self.name} ") for command in self.commands[1:]]
        if first not in names:
            raise ConfigError(
                f"{first!r} is not a command of shoal {self.name}; there is {', '.join(names)}, and servers are given "
                f"as --backend {first if '://' in first else 'URL'}"
            )
        return super().select(arguments)


def _run(source: SettingsSource) -> int:
    settings = source.load()
    log.configure(settings.options.log_level)
    env.export_log_level(settings.options.log_level)
    warn_about_environment((*SERVE_SECTIONS, RouterOptions, *CLIENT_SECTIONS))
    # Loaded here: the other commands need no HTTP server.
    from shoal.router.run import route

    route(source, settings)
    return 0


def _status(client: RouterClientOptions) -> int:
    print(show_backends(ask_router(client, "GET", "/router/backends")))
    return 0


def _drain(target: RouterTargetOptions, client: RouterClientOptions) -> int:
    return _set(target, client, "drain")


def _undrain(target: RouterTargetOptions, client: RouterClientOptions) -> int:
    return _set(target, client, "undrain")


def _set(target: RouterTargetOptions, client: RouterClientOptions, verb: str) -> int:
    if target.backend_url is None:
        raise ConfigError(f"which server? shoal router {verb} URL")
    state = ask_router(client, "POST", f"/router/{verb}", {"url": target.backend_url})
    what = "gets no new requests" if state["draining"] else "gets requests again"
    print(f"{state['url']} {what}; {state['num_running']} run there")
    return 0


COMMAND = _RouterGroup(
    name="router",
    description="One entrance to several servers with the OpenAI API: Shoal's, and others.",
    commands=(
        _RouterCommand(
            name="router",
            description="Route requests to the servers of --backend and of the file, and carry on elsewhere what one "
            "of them loses. The file is read again when it changes. Ctrl-C lets running requests finish.",
            sections=(RouterOptions,),
            takes_config=True,
            run=_run,
        ),
        Command(
            name="router status",
            description="Show the servers of a router, and why one gets no requests.",
            sections=(RouterClientOptions,),
            run=_status,
        ),
        Command(
            name="router drain",
            description="Send no new requests to a server; those that run there finish.",
            sections=(RouterTargetOptions, RouterClientOptions),
            positional="backend_url",
            run=_drain,
        ),
        Command(
            name="router undrain",
            description="Send requests to a drained server again.",
            sections=(RouterTargetOptions, RouterClientOptions),
            positional="backend_url",
            run=_undrain,
        ),
    ),
)
