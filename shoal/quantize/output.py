"""The directory that a quantized checkpoint is written to: what may be there before, and the state of a run. No torch.

While a run is under way, quantize_state.json says by what order, and which layers lie in their files. A file is written
under another name first, so that what has its name is whole.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from shoal.errors import ConfigError
from shoal.quantize.order import MatrixRow, QuantizeOrder
from shoal.quantize.source import SourceCheckpoint

STATE = "quantize_state.json"
REPORT = "quantize_report.json"
# What a run writes, and --overwrite removes.
_OWN = ("*.safetensors", "model.safetensors.index.json", "config.json", "quantize_config.json", STATE, REPORT)
# Bytes beside the numbers of a quantized matrix: scales, zeros, the order of inputs.
_OVERHEAD = 1.15


class State(msgspec.Struct):
    """order: that of the run, less what does not change the result; source: the fingerprint of the model's files. rows:
    of finished layers."""

    order: dict[str, Any]
    source: str
    rows: list[list[MatrixRow]]


def order_key(order: QuantizeOrder) -> dict[str, Any]:
    found: dict[str, Any] = msgspec.to_builtins(order)
    del found["out"], found["device"]
    if order.calibration is not None:
        # Another text in the same file is another order, and the same one elsewhere is the same.
        del found["calibration"]
        found["calibration_sha256"] = _digest(Path(order.calibration))
    return found


def _digest(file: Path) -> str:
    """Raises ConfigError where it cannot be read."""
    try:
        with file.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise ConfigError(f"--calibration {file} cannot be read: {error}") from error


@contextlib.contextmanager
def held_output(out: Path) -> Iterator[None]:
    """The directory is this run's alone; one that is empty afterwards goes. Raises ConfigError where another run has
    it, or it cannot be made."""
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file; OUT must be a directory that is not there yet")
    try:
        out.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(out, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise ConfigError(f"{out} cannot be written: {error}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise ConfigError(f"{out} is being written by another run ({error}); wait for it, or end it") from error
    try:
        yield
    finally:
        if not any(out.iterdir()):
            out.rmdir()
        os.close(descriptor)


def prepare_output(order: QuantizeOrder, source: SourceCheckpoint, overwrite: bool) -> State:
    """Of a directory that is held: the state of the run that goes on there, or a new one. Raises ConfigError."""
    out = Path(order.out)
    if out.resolve() == source.directory.resolve():
        raise ConfigError(f"{out} is MODEL itself; give another directory for the quantized one")
    state = State(order_key(order), _fingerprint(source), [])
    if out.is_dir() and any(out.iterdir()):
        if overwrite:
            for path in (path for pattern in _OWN for path in out.glob(pattern)):
                path.unlink()
        else:
            state = _resumed(out, state)
    _check_disk(order, source, out, len(state.rows))
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / STATE, msgspec.to_builtins(state))
    except OSError as error:
        raise ConfigError(f"{out} cannot be written: {error}") from error
    return state


def _resumed(out: Path, wanted: State) -> State:
    if not (out / STATE).is_file():
        what = "a finished checkpoint" if (out / REPORT).is_file() else "files that no unfinished run left"
        raise ConfigError(f"{out} holds {what}; another directory would work, or --overwrite")
    try:
        found = msgspec.json.decode((out / STATE).read_bytes(), type=State)
    except msgspec.DecodeError as error:
        raise ConfigError(f"{out / STATE} cannot be read: {error}; --overwrite starts again") from error
    if not found.rows:
        return wanted  # it came to nothing: any options may follow
    if found.source != wanted.source:
        raise ConfigError(f"{out} holds an unfinished run of another model; --overwrite starts again")
    names = [name for name in wanted.order if found.order.get(name) != json.loads(json.dumps(wanted.order[name]))]
    if names:
        differences = ", ".join(f"{name} was {found.order.get(name)!r}, is {wanted.order[name]!r}" for name in names)
        raise ConfigError(f"{out} holds an unfinished run by other options ({differences}); --overwrite starts again")
    return found


def _fingerprint(source: SourceCheckpoint) -> str:
    """Of the files' names, sizes and dates, and of the config: enough to tell that the model is another."""
    files = sorted({tensor.file for tensor in source.tensors.values()})
    parts = [f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files]
    return hashlib.sha256("\n".join([*parts, json.dumps(source.config, sort_keys=True)]).encode()).hexdigest()


def _check_disk(order: QuantizeOrder, source: SourceCheckpoint, out: Path, num_done: int) -> None:
    """As if every matrix but embeddings became numbers of the method's bits."""
    bits = order.bits if order.method in ("gptq", "awq") else 8
    needed = 0.0
    for name, tensor in source.tensors.items():
        if len(tensor.shape) == 2 and "embed" not in name and "lm_head" not in name:
            needed += tensor.shape[0] * tensor.shape[1] * bits / 8 * _OVERHEAD
        else:
            needed += tensor.num_bytes
    present = sum(file.stat().st_size for file in out.glob("*.safetensors")) if num_done else 0
    parent = next(path for path in (out, *out.absolute().parents) if path.exists())
    free = shutil.disk_usage(parent).free
    if needed - present > free:
        raise ConfigError(
            f"the quantized checkpoint takes about {(needed - present) / 1e9:.2f} GB, and {parent} has "
            f"{free / 1e9:.2f} GB free"
        )


def write_json(path: Path, content: Any) -> None:
    """Whole or not at all."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(part, path)
