"""API keys of the router: who a request is from, and what it may. Read once at the start and when the file changes."""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import math
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import yaml

from shoal.errors import AuthenticationError, ConfigError, NotFoundError


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ApiKey:
    """What one key may. Its secret is not in here, so that it cannot come into a log.

    priority: lower goes first. weight: its share of what is left to its priority. models: None for all.
    """

    name: str
    priority: int = 0
    weight: float = 1.0
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    max_concurrent: int | None = None
    models: tuple[str, ...] | None = None

    def check_model(self, model: str) -> None:
        """Raises NotFoundError when this key may not use the model."""
        if self.models is not None and model not in self.models:
            allowed = ", ".join(self.models) or "none"
            raise NotFoundError(
                f"the API key {self.name!r} may not use the model {model[:200]!r}; it may use: {allowed}",
                "model",
                "model_not_found",
            )


ANONYMOUS = ApiKey(name="")


class _KeyEntry(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """An entry as it stands in the file."""

    key: str
    name: str
    priority: int = 0
    weight: float = 1.0
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    max_concurrent: int | None = None
    models: list[str] | None = None


_FIELDS = ", ".join(_KeyEntry.__struct_fields__)


class ApiKeys:
    """The keys by their secrets, of which only hashes are kept."""

    def __init__(self, keys: Mapping[str, ApiKey] | None = None) -> None:
        """keys: by secret; none: everybody may come in, as ANONYMOUS."""
        # Secrets are looked up by a hash under a key that nobody else knows: how long that takes says nothing of them.
        self._salt = secrets.token_bytes(32)
        self._keys = {self._digest(secret): key for secret, key in (keys or {}).items()}

    def __len__(self) -> int:
        return len(self._keys)

    @property
    def names(self) -> list[str]:
        return [key.name for key in self._keys.values()]

    @classmethod
    def parse(cls, content: Any, source: str) -> ApiKeys:
        """The keys of a list of mappings (or of a mapping with such a list under `keys`).

        Raises ConfigError that names `source`, and the key by its name or place, never by its secret.
        """
        if isinstance(content, Mapping):
            unknown = [str(name) for name in content if name != "keys"]
            if unknown or "keys" not in content:
                raise ConfigError(
                    f"{source}: expected a list of keys, or it under `keys:`; found {', '.join(unknown) or 'nothing'}"
                )
            content = content["keys"]
        if not isinstance(content, list):
            raise ConfigError(
                f"{source}: expected a list of keys, each with `key` and `name`; found a {type(content).__name__}"
            )
        keys: dict[str, ApiKey] = {}
        names: set[str] = set()
        for number, entry in enumerate(content, 1):
            secret, key = _read_entry(entry, f"{source}: key {number}")
            if key.name in names:
                raise ConfigError(
                    f"{source}: the name {key.name!r} is there twice; names tell keys apart in limits and logs"
                )
            if secret in keys:
                raise ConfigError(
                    f"{source}: {key.name!r} and {keys[secret].name!r} have the same secret; each needs its own"
                )
            names.add(key.name)
            keys[secret] = key
        if not keys:
            raise ConfigError(f"{source}: the list of keys is empty; leave the file away to let everybody in")
        return cls(keys)

    def authenticate(self, authorization: str | None) -> ApiKey:
        """Whose request it is, by its Authorization header ("Bearer SECRET").

        Raises AuthenticationError when there are keys and this is none of them.
        """
        if not self._keys:
            return ANONYMOUS
        kind, _, secret = (authorization or "").strip().partition(" ")
        secret = secret.strip()
        if kind.lower() != "bearer" or not secret:
            raise AuthenticationError("an API key is missing; send the header Authorization: Bearer KEY")
        key = self._keys.get(self._digest(secret))
        if key is None:
            raise AuthenticationError("the API key is wrong; send the header Authorization: Bearer KEY")
        return key

    def _digest(self, secret: str) -> bytes:
        return hmac.digest(self._salt, secret.encode("utf-8", "surrogatepass"), hashlib.sha256)


def read_api_keys(path: str | Path) -> ApiKeys:
    """The keys of a YAML or JSON file. Raises ConfigError, naming the file, for what is wrong with it."""
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"cannot read the file of API keys {path}: {getattr(error, 'strerror', None) or error}"
        ) from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        # The parser quotes what it found, which may be a secret.
        raise ConfigError(f"{path}{where} is neither YAML nor JSON") from None
    return ApiKeys.parse(content, str(path))


def _read_entry(entry: Any, where: str) -> tuple[str, ApiKey]:
    """The secret and what it opens. Raises ConfigError without the secret in it."""
    name = entry.get("name") if isinstance(entry, Mapping) else None
    if isinstance(name, str) and name:
        where = f"{where} ({name})"
    try:
        read = msgspec.convert(entry, _KeyEntry)
    except msgspec.ValidationError as error:
        # msgspec names types and fields, never values.
        hint = "; put a key of digits into quotes" if "$.key" in str(error) else f"; fields are: {_FIELDS}"
        raise ConfigError(f"{where}: {str(error)[:1].lower()}{str(error)[1:]}{hint}") from None
    if not read.name:
        raise ConfigError(f"{where}: name is empty; limits, metrics and errors speak of a key by its name")
    if not read.key or not all("!" <= character <= "~" for character in read.key):
        raise ConfigError(f"{where}: key must be of visible ASCII characters without spaces, as headers carry them")
    for field in ("weight", "requests_per_minute", "tokens_per_minute"):
        value = getattr(read, field)
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(f"{where}: {field} must be above 0; got {value:g}{_no_limit(field)}")
    if read.max_concurrent is not None and read.max_concurrent < 1:
        raise ConfigError(f"{where}: max_concurrent must be 1 or more; got {read.max_concurrent}{_no_limit('')}")
    values = {field: getattr(read, field) for field in read.__struct_fields__ if field not in ("key", "models")}
    return read.key, ApiKey(**values, models=None if read.models is None else tuple(read.models))


def _no_limit(field: str) -> str:
    return "" if field == "weight" else "; leave it away for no limit"
