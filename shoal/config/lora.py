"""LoRA adapters: how many fit, and what a directory of one says. No torch.

Source: PEFT's `adapter_config.json` beside `adapter_model.safetensors`.
"""

from __future__ import annotations

import dataclasses
import json
import struct
from pathlib import Path
from typing import Any

from shoal.errors import ConfigError, InvalidRequestError

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_LONGEST_HEADER = 100 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """max_loras: adapters that are loaded at a time, all of which may go into one step. max_rank: of the widest."""

    max_loras: int
    max_rank: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterFacts:
    """rank, alpha: of all its matrices; B A is scaled by alpha / rank, or alpha / sqrt(rank) (`rank_stabilized`)."""

    rank: int
    alpha: float
    rank_stabilized: bool

    def scaling(self, rank: int) -> float:
        """rank: of one matrix, which may have its own."""
        return self.alpha / (rank**0.5 if self.rank_stabilized else rank)


def read_adapter(path: str, max_rank: int) -> AdapterFacts:
    """Read and check an adapter's directory. Raises InvalidRequestError: what is wrong, and what would work."""
    directory = Path(path)
    file = directory / "adapter_config.json"
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except OSError:
        raise InvalidRequestError(
            f"there is no adapter in {path!r}: adapter_config.json is missing; give a directory that PEFT saved"
        ) from None
    except ValueError as error:
        raise InvalidRequestError(f"{file} cannot be read as JSON: {error}") from None
    if not isinstance(raw, dict):
        raise InvalidRequestError(f"{file} must hold a JSON object; found {type(raw).__name__}")
    if str(raw.get("peft_type", "LORA")).upper() != "LORA":
        raise InvalidRequestError(f"{file}: peft_type {raw['peft_type']!r} is not supported; LORA is")
    for name, plain in (("use_dora", False), ("bias", "none"), ("modules_to_save", None), ("alpha_pattern", None)):
        value = raw.get(name)
        if value and value != plain:
            raise InvalidRequestError(f"{file}: {name} {value!r} is not supported; it must be {plain!r} or absent")
    rank, alpha = raw.get("r"), raw.get("lora_alpha")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise InvalidRequestError(f"{file}: r must be a positive integer; found {rank!r}")
    if not isinstance(alpha, (int, float)) or isinstance(alpha, bool) or not alpha > 0:
        raise InvalidRequestError(f"{file}: lora_alpha must be a number above 0; found {alpha!r}")
    widest = max([rank, *(int(value) for value in (raw.get("rank_pattern") or {}).values())])
    if widest > max_rank:
        raise InvalidRequestError(
            f"the adapter in {path!r} has rank {widest}, and there is room for {max_rank}; start the server with "
            f"--max-lora-rank {next((each for each in RANKS if each >= widest), widest)}"
        )
    _check_weights(directory)
    return AdapterFacts(rank=rank, alpha=float(alpha), rank_stabilized=bool(raw.get("use_rslora", False)))


def _check_weights(directory: Path) -> None:
    """Whether the file is there, whole, and holds what adapters have: the header tells."""
    path = directory / "adapter_model.safetensors"
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(size, _LONGEST_HEADER):
                raise ValueError("its header is longer than the file")
            header: dict[str, Any] = json.loads(file.read(length))
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        end = 8 + length + max((int(entry["data_offsets"][1]) for entry in tensors.values()), default=0)
    except FileNotFoundError:
        has_pickle = (directory / "adapter_model.bin").exists()
        hint = "; adapter_model.bin is an old pickle format: save it as safetensors" if has_pickle else ""
        raise InvalidRequestError(f"{path} is missing{hint}") from None
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, struct.error) as error:
        raise InvalidRequestError(f"{path} cannot be read: {error}; save it again") from None
    if size < end:
        raise InvalidRequestError(f"{path} has {size} bytes of {end}; copy it again")
    if not tensors:
        raise InvalidRequestError(f"{path} holds no tensors")


def parse_modules(given: list[str]) -> dict[str, str]:
    """--lora-modules: paths by name, from NAME=PATH or {"name": NAME, "path": PATH}. Raises ConfigError."""
    modules: dict[str, str] = {}
    for entry in given:
        name, path = _parse_module(entry)
        if name in modules:
            raise ConfigError(f"--lora-modules names {name!r} twice")
        modules[name] = path
    return modules


def _parse_module(entry: str) -> tuple[str, str]:
    if entry.lstrip().startswith("{"):
        try:
            content = json.loads(entry)
            return str(content["name"]), str(content["path"])
        except (ValueError, KeyError, TypeError):
            raise ConfigError(f'--lora-modules: {{"name": ..., "path": ...}} is wanted; got {entry!r}') from None
    name, equals, path = entry.partition("=")
    if not equals or not name.strip() or not path.strip():
        raise ConfigError(f"--lora-modules must be NAME=PATH; got {entry!r}")
    return name.strip(), path.strip()
