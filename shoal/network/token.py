"""The cluster's token: what a machine shows to join. Node commands make it; those that open connections load it.

Routers and servers make their own secret from it, so that the token itself crosses no wire.

A flag's file counts first, then SHOAL_CLUSTER_TOKEN, then ~/.shoal/cluster-token.
"""

from __future__ import annotations

import contextlib
import hmac
import os
import secrets
import tempfile
from pathlib import Path

from shoal import env
from shoal.errors import ConfigError
from shoal.log import get_logger

_NUM_RANDOM_BYTES = 32
_SHORTEST = 16

logger = get_logger(__name__)


def default_token_path() -> Path:
    """~/.shoal/cluster-token."""
    return Path.home() / ".shoal" / "cluster-token"


def load_token(token_file: str | None = None) -> str:
    """The token, from `token_file` (a flag's), SHOAL_CLUSTER_TOKEN or the file that the head of a cluster writes.

    Raises ConfigError when there is none, saying where one comes from, or when it is no token; also for a default file
    that others can read. (A file of the user's own choice is only warned about: mounted secrets are often readable.)
    """
    if token_file is not None:
        path = Path(token_file).expanduser()
        if _others_can_read(path):
            logger.warning("other users of this machine can read the token in %s; chmod 600 %s keeps it", path, path)
        return _check(_read(path), str(path))
    token = env.cluster_token()
    if token is not None:
        return _check(token, "SHOAL_CLUSTER_TOKEN")
    path = default_token_path()
    if not path.exists():
        raise ConfigError(
            "there is no cluster token here, and all machines of one model need the same: one that `openssl rand -hex "
            "32` printed, or the one that `shoal node start --head` made on the head. Give it in one of three ways: "
            f"SHOAL_CLUSTER_TOKEN=TOKEN in the environment, --token-file FILE, or the file {path} (mode 0600)"
        )
    if _others_can_read(path):
        raise ConfigError(
            f"other users of this machine can read the cluster token in {path}; chmod 600 {path} mends it (and make a "
            "new token if somebody else may have read it)"
        )
    return _check(_read(path), str(path))


def internal_secret(given: str | None, token_file: str | None = None) -> str | None:
    """What a router shows its servers at /internal/…: `given` (--internal-token), else one made from the cluster's
    token; None where there is neither.

    Raises ConfigError for a secret, or a token, that is none.
    """
    if given is not None:
        return _check(given, "--internal-token", "internal token")
    if token_file is None and env.cluster_token() is None and not default_token_path().exists():
        return None
    return hmac.digest(load_token(token_file).encode(), b"shoal internal", "sha256").hex()


def create_token(path: Path | None = None, token: str | None = None) -> str:
    """Write a token (a random one unless given) to `path`, mode 0600, unless there is one; return what is there then.

    path: default ~/.shoal/cluster-token. Of several that do this at once one wins, and all return the same.
    """
    path = path or default_token_path()
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    # mkstemp makes files of mode 0600; the link either gives it its name, complete, or finds one there.
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".cluster-token-")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write((token or secrets.token_hex(_NUM_RANDOM_BYTES)) + "\n")
        with contextlib.suppress(FileExistsError):
            os.link(temporary, path)
    finally:
        os.unlink(temporary)
    return load_token(str(path))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the cluster token in {path}: {error}") from error


def _check(token: str, source: str, what: str = "cluster token") -> str:
    """A token goes into one line of text and into HTTP headers."""
    if len(token) < _SHORTEST or not token.isascii() or not token.isprintable() or " " in token:
        raise ConfigError(
            f"the {what} in {source} must be {_SHORTEST} or more printable ASCII characters without spaces "
            f"(it has {len(token)}); `openssl rand -hex 32` makes one"
        )
    return token


def _others_can_read(path: Path) -> bool:
    try:
        return bool(path.stat().st_mode & 0o077)
    except OSError:
        return False  # reading it says what is wrong
