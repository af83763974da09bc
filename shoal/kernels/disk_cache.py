"""Measured choices kept between runs: one small JSON file for each environment. Used by kernels/tuning.py. And a look
at where Triton keeps what it compiles, by the worker.

Several ranks and servers may share the directory: who writes adds to what is there and puts a whole new file in its
place. What two write at the same moment may be lost, and is then measured again.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import torch

from shoal import env
from shoal.log import get_logger
from shoal.version import __version__

_FORMAT = 1
# A full disk takes an empty file. All kernels of a model are some MiB.
_PROBE_BYTES = 8 << 20
# What Triton calls the directory of a kernel: a SHA-256 in base 32.
_ENTRY = re.compile(r"[A-Z2-7]{52}")
_ELF = b"\x7fELF"
# Of the file that lists the files of a kernel.
_GROUP_PREFIX = "__grp__"
_logger = get_logger(__name__)


def environment_of(device: torch.device) -> dict[str, str]:
    """What a measurement on this device holds for: another GPU or version measures anew."""
    import triton

    major, minor = torch.cuda.get_device_capability(device)
    return {
        "gpu": torch.cuda.get_device_name(device),
        "capability": f"{major}.{minor}",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": str(torch.version.cuda),
        "shoal": __version__,
    }


def find_compiler_cache() -> None:
    """Have Triton keep its kernels elsewhere where it could not write: it would fail at the first of them. What is
    damaged there is dropped: it would fail at each start."""
    directory = env.triton_cache_directory()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory) as file:
            file.write(bytes(_PROBE_BYTES))
        _drop_damaged(directory)
    except OSError as error:
        other = Path(tempfile.mkdtemp(prefix="shoal-triton-"))
        env.set_triton_cache_directory(other)
        _logger.warning(
            "kernels are compiled anew at each start: Triton cannot keep them in %s (%s); set TRITON_CACHE_DIR to a "
            "directory that can be written to",
            directory,
            error.strerror,
        )


def _drop_damaged(directory: Path) -> None:
    """Remove files of Triton's that a power cut or a full disk left cut short, and what refers to them: their kernels
    are compiled anew. Everything else stays as it is."""
    num_kernels = 0
    for entry in directory.iterdir():
        if not _ENTRY.fullmatch(entry.name):
            continue
        try:
            files = [file for file in entry.iterdir() if file.suffix in (".json", ".cubin")]
        except OSError:  # gone meanwhile, or not ours to read
            continue
        damaged = [file for file in files if _is_damaged(file)]
        if damaged:
            num_kernels += 1
            # Without its list of files Triton takes a kernel for one that it has not compiled yet.
            for file in {*damaged, *(file for file in files if file.name.startswith(_GROUP_PREFIX))}:
                file.unlink(missing_ok=True)
    if num_kernels:
        _logger.warning(
            "%d compiled kernels in %s were damaged, as after a power cut or on a full disk: they are compiled anew",
            num_kernels,
            directory,
        )


def _is_damaged(file: Path) -> bool:
    try:
        if file.suffix == ".json":
            json.loads(file.read_bytes())
            return False
        with file.open("rb") as binary:
            return binary.read(len(_ELF)) != _ELF
    except ValueError:
        return True
    except OSError:
        return False


class ChoiceCache:
    """Choices by key, JSON values. Nothing here raises because of the disk: it warns once and goes on without."""

    def __init__(self, directory: Path, environment: dict[str, str]) -> None:
        self._header = {"format": _FORMAT, **environment}
        digest = hashlib.sha256(json.dumps(self._header, sort_keys=True).encode()).hexdigest()[:12]
        name = re.sub(r"[^a-z0-9]+", "-", environment.get("gpu", "device").lower()).strip("-")
        self.path = directory / f"{name}-{digest}.json"
        self._choices = self._read(warns=True)
        self._writable = True

    def get(self, key: str) -> Any | None:
        return self._choices.get(key)

    def put(self, key: str, value: Any) -> None:
        """Keep it, on disk too where that works."""
        self._choices = {**self._read(warns=False), **self._choices, key: value}
        if not self._writable:
            return
        try:
            self._write()
        except OSError as error:
            self._writable = False
            _logger.warning("measured choices are not kept for the next start: %s", error)

    def _read(self, *, warns: bool) -> dict[str, Any]:
        try:
            content = json.loads(self.path.read_text())
            if not isinstance(content, dict) or content.get("environment") != self._header:
                raise ValueError("it is not of this environment")
            choices = content["choices"]
            if not isinstance(choices, dict):
                raise ValueError("it has no choices")
            return choices
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError) as error:
            if warns:
                _logger.warning("%s is not used (%s); it will be written anew", self.path, error)
            return {}

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"environment": self._header, "choices": self._choices}, indent=1, sort_keys=True)
        handle, temporary = tempfile.mkstemp(dir=self.path.parent, prefix=f".{self.path.name}.")
        try:
            with os.fdopen(handle, "w") as file:
                file.write(text + "\n")
            os.replace(temporary, self.path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
