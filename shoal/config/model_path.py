"""From what a user calls a model to its directory: the embedded model, a path, or what the hub's cache holds."""

from __future__ import annotations

import difflib
import importlib.resources
import re
from pathlib import Path

from shoal import env
from shoal.config.options import EMBEDDED_MODEL
from shoal.errors import ModelError

_REPO_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def resolve_model_path(model: str) -> Path:
    """The absolute directory of a model or a tokenizer. Nothing is ever downloaded.

    model: "shoal-tiny"; a path; or a Hugging Face name ("org/name") that was downloaded before.
    Raises ModelError that says what was found and what would work.
    """
    if model == EMBEDDED_MODEL:
        return embedded_model_path()
    path = Path(model).expanduser()
    if path.is_dir():
        return path.resolve()
    if path.exists():
        raise ModelError(
            f"the model {model} is a file; a Hugging Face directory (config.json, *.safetensors, tokenizer.json) "
            "would work"
        )
    if _REPO_NAME.fullmatch(model):
        return _downloaded(model)
    raise ModelError(
        f"the model directory {model} does not exist{_nearest_parent(path)}; a downloaded Hugging Face directory or "
        f"{EMBEDDED_MODEL} (embedded) would work"
    )


def embedded_model_path() -> Path:
    """The directory of the model that comes with Shoal."""
    path = Path(str(importlib.resources.files("shoal"))) / "assets" / EMBEDDED_MODEL
    if not (path / "config.json").is_file():
        raise ModelError(f"the embedded model is missing from this installation ({path}); install Shoal again")
    return path


def _downloaded(repo: str) -> Path:
    """The snapshot of `repo` in the local Hugging Face cache: refs/main's, or the only one."""
    folder = env.hub_cache() / f"models--{repo.replace('/', '--')}"
    snapshots = folder / "snapshots"
    reference = folder / "refs" / "main"
    if reference.is_file():
        snapshot = snapshots / reference.read_text(encoding="utf-8").strip()
        if snapshot.is_dir():
            return snapshot
    found = sorted(snapshot.name for snapshot in snapshots.iterdir()) if snapshots.is_dir() else []
    if len(found) == 1:
        return snapshots / found[0]
    if found:
        raise ModelError(
            f"the cache holds {len(found)} snapshots of {repo} and no refs/main; name one by its path: "
            f"{snapshots / found[0]}"
        )
    raise ModelError(
        f"{repo} is neither a directory nor a model in the local Hugging Face cache ({env.hub_cache()}); Shoal "
        f"downloads nothing by itself: `hf download {repo}` brings it; a directory or {EMBEDDED_MODEL} (embedded) "
        "works too"
    )


def _nearest_parent(path: Path) -> str:
    """ " (/models exists and holds Qwen2-7B)": where a wrong path stops being right, and what may have been meant."""
    missing = path.absolute()
    for parent in missing.parents:
        if parent.is_dir() and parent != parent.parent:
            names = [entry.name for entry in parent.iterdir() if entry.is_dir()]
            near = difflib.get_close_matches(missing.name, names, n=3)
            return f" ({parent} exists" + (f" and holds {', '.join(near)})" if near else ")")
        missing = parent
    return ""
