"""What a router is told: RouterOptions from flags, file and environment, and the lists that only its file holds.

SettingsSource reads it all, at the start and again whenever the file has changed. `shoal router` uses it.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from shoal.config.flags import parse_flags
from shoal.config.knobs import KnobTable
from shoal.config.options import HttpOptions, RouterOptions
from shoal.config.router_file import RouterFile
from shoal.config.sources import split_config, values_from_environment
from shoal.errors import ConfigError

KINDS = ("auto", "shoal", "openai")
# What a change of the file cannot change: it is in use already.
_FIXED = (
    "host", "port", "log_level", "shutdown_timeout", "peer", "peer_key", "replicate_sync",
    *(field.name for field in dataclasses.fields(HttpOptions)),
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class BackendSpec:
    """A server as it was named. url: without /v1 and final slash. models: what it serves; empty: what it says itself.

    kind: "shoal" speaks /internal/v1/continue, "openai" the OpenAI API alone, "auto" is asked.
    """

    url: str
    weight: float = 1.0
    api_key: str | None = None
    models: tuple[str, ...] = ()
    kind: str = "auto"


@dataclasses.dataclass(frozen=True, kw_only=True)
class GoldenSpec:
    """The prompt that servers are tried with. text: the right answer, where it is known beforehand."""

    prompt: str = "1 2 3 4 5 6"
    text: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class RouterSettings:
    """keys: entries as the file has them, which the router's admission reads; None when the file has no list.

    peers: URLs of the other routers.
    """

    options: RouterOptions
    backends: tuple[BackendSpec, ...]
    aliases: Mapping[str, str]
    golden: GoldenSpec
    keys: Any = None
    keys_source: str = ""
    peers: tuple[str, ...] = ()

    def differences_that_wait(self, new: RouterSettings) -> list[str]:
        """The options that differ in `new` and count from the next start on only."""
        return [name for name in _FIXED if getattr(self.options, name) != getattr(new.options, name)]


class SettingsSource:
    """flags, variables: options by field name, already converted. path: the file, if there is one."""

    def __init__(self, flags: Mapping[str, Any], variables: Mapping[str, Any], path: str | None) -> None:
        self.path = path
        self._flags = flags
        self._variables = variables

    @classmethod
    def of(cls, arguments: Sequence[str]) -> SettingsSource:
        """From a command line and the environment. Raises ConfigError for what is wrong in these."""
        table = KnobTable((RouterOptions,))
        rest, path = split_config(arguments)
        return cls(parse_flags(rest, table), values_from_environment(table), path)

    def load(self) -> RouterSettings:
        """Raises ConfigError, which names the file and the line where something is wrong in it."""
        table = KnobTable((RouterOptions,))
        file = RouterFile.read(self.path, table) if self.path is not None else RouterFile.empty()
        options: RouterOptions = table.build({**self._variables, **file.options, **self._flags})[0]
        backends = [parse_backend(text, "--backend") for text in options.backend]
        aliases = dict(_parse_alias(text) for text in options.alias)
        with file.blame("backends"):
            backends += [_backend(entry, f"backends[{index}]") for index, entry in enumerate(file.backends)]
        if not backends:
            where = f" and {self.path} has no backends" if self.path else ""
            raise ConfigError(f"no server to route to: give --backend URL{where}")
        backends = [
            dataclasses.replace(spec, api_key=options.backend_api_key) if spec.api_key is None else spec
            for spec in backends
        ]
        urls = [spec.url for spec in backends]
        if twice := sorted({url for url in urls if urls.count(url) > 1}):
            raise ConfigError(f"{twice[0]} is named twice as a backend; give it once, with a higher weight")
        with file.blame("aliases"):
            aliases |= _aliases(file.aliases)
        with file.blame("golden"):
            golden = _golden(file.golden)
        return RouterSettings(
            options=options,
            backends=tuple(backends),
            aliases=aliases,
            golden=golden,
            keys=file.keys,
            keys_source=file.where("keys"),
            peers=tuple(dict.fromkeys(_url(text, "--peer") for text in options.peer)),
        )

    def fingerprint(self) -> tuple[int, int, int] | None:
        """Differs when the file has changed; None while there is none."""
        if self.path is None:
            return None
        try:
            status = os.stat(self.path)
        except OSError:
            return None
        return status.st_mtime_ns, status.st_ino, status.st_size


def parse_backend(text: str, source: str) -> BackendSpec:
    """ "http://10.0.0.1:8000" or "http://10.0.0.1:8000=2.5". Raises ConfigError."""
    url, equals, weight = text.rpartition("=")
    if not equals:
        return BackendSpec(url=_url(text, source))
    return BackendSpec(url=_url(url, source), weight=_weight(weight, f"{source} {text}: the weight"))


def normal_url(text: str) -> str:
    """As backends are named: without /v1 and the final slash."""
    return text.strip().rstrip("/").removesuffix("/v1").rstrip("/")


def _url(text: Any, source: str) -> str:
    if not isinstance(text, str):
        raise ConfigError(f"{source} must be a URL such as http://10.0.0.1:8000; got {text!r}")
    url = normal_url(text)
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        valid = False
    if not valid or parts.query or parts.fragment:
        raise ConfigError(f"{source} must be a URL such as http://10.0.0.1:8000; got {text!r}")
    return url


def _weight(value: Any, source: str) -> float:
    try:
        weight = float(value) if not isinstance(value, bool) else float("nan")
    except (TypeError, ValueError):
        weight = float("nan")
    if not 0 < weight < float("inf"):
        raise ConfigError(f"{source} must be a number above 0; got {value!r}")
    return weight


def _backend(entry: Any, source: str) -> BackendSpec:
    if isinstance(entry, str):
        return parse_backend(entry, source)
    names = [field.name for field in dataclasses.fields(BackendSpec)]
    entry = _mapping(entry, names, source)
    if "url" not in entry:
        raise ConfigError(f"{source} has no url")
    kind = entry.get("kind", "auto")
    if kind not in KINDS:
        raise ConfigError(f"{source}.kind must be one of {', '.join(KINDS)}; got {kind!r}")
    models = entry.get("models", [])
    if isinstance(models, str):
        models = [models]
    if not isinstance(models, list) or not all(isinstance(model, str) and model for model in models):
        raise ConfigError(f"{source}.models must be a list of names; got {models!r}")
    api_key = entry.get("api_key")
    if api_key is not None and not (isinstance(api_key, str) and api_key.isprintable() and api_key):
        raise ConfigError(f"{source}.api_key must be a string")
    return BackendSpec(
        url=_url(entry["url"], f"{source}.url"),
        weight=_weight(entry.get("weight", 1.0), f"{source}.weight"),
        api_key=api_key,
        models=tuple(models),
        kind=kind,
    )


def _parse_alias(text: str) -> tuple[str, str]:
    name, equals, model = text.partition("=")
    if not (name and equals and model):
        raise ConfigError(f"--alias must be NAME=MODEL; got {text!r}")
    return name, model


def _aliases(entries: Any) -> dict[str, str]:
    if entries is None:
        return {}
    if not isinstance(entries, dict) or not all(
        isinstance(name, str) and isinstance(model, str) and name and model for name, model in entries.items()
    ):
        raise ConfigError(f"aliases must be `name: model` lines; got {entries!r}")
    return entries


def _golden(entry: Any) -> GoldenSpec:
    if entry is None:
        return GoldenSpec()
    entry = _mapping(entry, ("prompt", "text"), "golden")
    for name, value in entry.items():
        if not isinstance(value, str) or not value:
            raise ConfigError(f"golden.{name} must be a string; got {value!r}")
    if "text" in entry and "prompt" not in entry:
        raise ConfigError("golden.text needs golden.prompt: the right answer to which prompt?")
    return GoldenSpec(**entry)


def _mapping(entry: Any, names: Sequence[str], source: str) -> dict[str, Any]:
    if not isinstance(entry, dict):
        raise ConfigError(f"{source} must have lines of {', '.join(names)}; got {entry!r}")
    if unknown := [key for key in entry if key not in names]:
        raise ConfigError(f"{source}.{unknown[0]} is not known; there are {', '.join(names)}")
    return entry
