"""LoRA adapters: how many fit, and what a directory of one says. No torch.

Source: PEFT's `adapter_config.json` beside `adapter_model.safetensors`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from shoal.errors import ConfigError, InvalidRequestError

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
# What PEFT calls the two matrices of a linear layer.
DOWN, UP = ".lora_A.weight", ".lora_B.weight"
_PREFIXES = ("base_model.model.", "base_model.")
_CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_LONGEST_HEADER = 100 << 20
_FLOATS = ("F64", "F32", "F16", "BF16")
# Keys of PEFT's that make an adapter more than two matrices beside a linear layer: any other value is refused.
_PLAIN: dict[str, Any] = {
    "use_dora": False,
    "bias": "none",
    "lora_bias": False,
    "modules_to_save": None,
    "layer_replication": None,
    "trainable_token_indices": None,
    "target_parameters": None,
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "use_qalora": False,
    "use_bdlora": None,
}
# These begin with other weights of the model: what was trained is a difference to those.
_CHANGES_MODEL = ("pissa", "olora", "corda", "loftq")

_Number = TypeVar("_Number", int, float)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """max_loras: adapters that are loaded at a time, all of which may go into one step. max_rank: of the widest."""

    max_loras: int
    max_rank: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterFacts:
    """rank, alpha: of its matrices; B A is scaled by alpha / rank, or alpha / sqrt(rank) (`rank_stabilized`).
    ranks, alphas: of layers whose names match, in place of those."""

    rank: int
    alpha: float
    rank_stabilized: bool
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]

    def rank_of(self, module: str) -> int:
        """module: a layer's name in the model that was adapted."""
        return _matching(self.ranks, module, self.rank)

    def scaling(self, module: str) -> float:
        rank, alpha = self.rank_of(module), _matching(self.alphas, module, self.alpha)
        return alpha / (rank**0.5 if self.rank_stabilized else rank)


def _matching(patterns: Mapping[str, _Number], module: str, default: _Number) -> _Number:
    """As PEFT reads rank_pattern and alpha_pattern: the first that is the end of a name, from a dot on."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def module_name(stored: str) -> str:
    """The layer's name in the model that was adapted, of a tensor's name in the file without its suffix."""
    for prefix in _PREFIXES:
        stored = stored.removeprefix(prefix)
    return stored


def read_adapter(path: str, max_rank: int) -> AdapterFacts:
    """Read and check an adapter's directory. Raises InvalidRequestError: what is wrong, and what would work."""
    directory = Path(path)
    file = directory / _CONFIG_FILE
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
    facts = _read_facts(raw, file)
    widest = max((facts.rank, *facts.ranks.values()))
    if widest > max_rank:
        raise InvalidRequestError(
            f"the adapter in {path!r} has rank {widest}, and there is room for {max_rank}; start the server with "
            f"--max-lora-rank {next((each for each in RANKS if each >= widest), widest)}"
        )
    _check_weights(directory / WEIGHTS_FILE, facts)
    return facts


def digest_adapter(path: str) -> str:
    """SHA-256 of all that is read of an adapter: as long as its files take to read. Raises InvalidRequestError."""
    digest = hashlib.sha256()
    try:
        for name in (_CONFIG_FILE, WEIGHTS_FILE):
            with (Path(path) / name).open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    except OSError as error:
        raise InvalidRequestError(f"the adapter in {path!r} cannot be read: {error}") from None
    return digest.hexdigest()


def _read_facts(raw: dict[str, Any], file: Path) -> AdapterFacts:
    if str(raw.get("peft_type", "LORA")).upper() != "LORA":
        raise InvalidRequestError(f"{file}: peft_type {raw['peft_type']!r} is not supported; LORA is")
    for name, plain in _PLAIN.items():
        value = raw.get(name)
        if value and value != plain:
            raise InvalidRequestError(f"{file}: {name} {value!r} is not supported; it must be {plain!r} or absent")
    begun = raw.get("init_lora_weights")
    if isinstance(begun, str) and begun.lower().startswith(_CHANGES_MODEL):
        raise InvalidRequestError(
            f"{file}: init_lora_weights {begun!r} is not supported: it changes the model's own weights. Have PEFT "
            "convert the adapter (path_initial_model_for_weight_conversion), or write true there if the model that is "
            "served has the changed weights"
        )
    rank: Any = raw.get("r")
    alpha: Any = raw.get("lora_alpha")
    if not _is_rank(rank):
        raise InvalidRequestError(f"{file}: r must be a positive integer; found {rank!r}")
    if not _is_alpha(alpha):
        raise InvalidRequestError(f"{file}: lora_alpha must be a number above 0; found {alpha!r}")
    patterns: dict[str, dict[str, Any]] = {}
    for name, is_right in (("rank_pattern", _is_rank), ("alpha_pattern", _is_alpha)):
        patterns[name] = pattern = raw.get(name) or {}
        try:
            right = all(re.compile(key) and is_right(value) for key, value in pattern.items())
        except (AttributeError, re.error):
            right = False
        if not right:
            raise InvalidRequestError(
                f"{file}: {name} must give positive numbers to names of layers; found {pattern!r}"
            )
    return AdapterFacts(
        rank=rank,
        alpha=float(alpha),
        rank_stabilized=bool(raw.get("use_rslora", False)),
        ranks=patterns["rank_pattern"],
        alphas=patterns["alpha_pattern"],
    )


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_alpha(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0


def _check_weights(path: Path, facts: AdapterFacts) -> None:
    """Whether the file is there, whole, and holds pairs of matrices of their ranks: the header tells."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(size, _LONGEST_HEADER):
                raise ValueError("its header is longer than the file")
            header: dict[str, Any] = json.loads(file.read(length))
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        end = 8 + length + max((int(entry["data_offsets"][1]) for entry in tensors.values()), default=0)
        shapes = {name: [int(size) for size in entry["shape"]] for name, entry in tensors.items()}
        types = {name: str(entry["dtype"]) for name, entry in tensors.items()}
    except FileNotFoundError:
        has_pickle = path.with_name("adapter_model.bin").exists()
        hint = "; adapter_model.bin is an old pickle format: save it as safetensors" if has_pickle else ""
        raise InvalidRequestError(f"{path} is missing{hint}") from None
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, struct.error) as error:
        raise InvalidRequestError(f"{path} cannot be read: {error}; save it again") from None
    if size < end:
        raise InvalidRequestError(f"{path} has {size} bytes of {end}; copy it again")
    if not tensors:
        raise InvalidRequestError(f"{path} holds no tensors")
    for name, dtype in types.items():
        if not name.endswith((DOWN, UP)):
            raise InvalidRequestError(f"{path}: tensor {name} is not supported; an adapter has …{DOWN} and …{UP}")
        if dtype not in _FLOATS:
            raise InvalidRequestError(f"{path}: tensor {name} is of type {dtype}; supported: {', '.join(_FLOATS)}")
    for layer in sorted({name.removesuffix(DOWN).removesuffix(UP) for name in tensors}):
        _check_pair(path, shapes, layer, facts.rank_of(module_name(layer)))


def _check_pair(path: Path, shapes: Mapping[str, list[int]], layer: str, rank: int) -> None:
    """layer: as the file calls it."""
    for own, other in ((DOWN, UP), (UP, DOWN)):
        if layer + own not in shapes:
            raise InvalidRequestError(f"{path}: {layer}{other} has no {layer}{own}")
    down, up = shapes[layer + DOWN], shapes[layer + UP]
    if len(down) != 2 or len(up) != 2 or down[0] != rank or up[1] != rank:
        raise InvalidRequestError(
            f"{path}: {layer} has matrices of shapes {down} and {up}; its rank in adapter_config.json is {rank}, so "
            f"[{rank}, inputs] and [outputs, {rank}] are wanted"
        )


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
