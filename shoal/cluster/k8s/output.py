"""Manifests as YAML: one stream, or a file for each object in a directory."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from shoal.cluster.k8s.pods import Manifest
from shoal.errors import ConfigError

_HEAD = "# Made by `shoal k8s render`: change its options rather than this file.\n"
_WIDTH = 120


class _Dumper(yaml.SafeDumper):
    """Texts of several lines as blocks; lists indented as people write them; nothing by reference."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)


_Dumper.add_representer(str, _text)


def to_yaml(manifests: Sequence[Manifest]) -> str:
    """One stream for `kubectl apply -f -`."""
    documents = [yaml.dump(each, Dumper=_Dumper, sort_keys=False, width=_WIDTH) for each in manifests]
    return _HEAD + "---\n".join(documents)


def write_files(manifests: Sequence[Manifest], directory: Path) -> list[str]:
    """A file for each object, named so that `kubectl apply -f DIRECTORY` takes them in order. Returns what to say.

    A Secret that lies there stays, since what runs has its keys. Raises ConfigError where nothing can be written.
    """
    said = []
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for number, manifest in enumerate(manifests):
            path = directory / f"{number:02}-{manifest['kind'].lower()}-{manifest['metadata']['name']}.yaml"
            if manifest["kind"] == "Secret":
                said.append(_write_secret(manifest, path))
            else:
                path.write_text(to_yaml([manifest]), encoding="utf-8")
                said.append(str(path))
    except OSError as error:
        raise ConfigError(f"cannot write to {directory}: {error.strerror or error}") from error
    return said


def _write_secret(manifest: Manifest, path: Path) -> str:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return f"{path} (it was there, and stays: what runs has its keys)"
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(to_yaml([manifest]))
    return f"{path} (mode 0600: it holds the keys)"
