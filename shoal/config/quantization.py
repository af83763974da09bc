"""QuantizationConfig: how a checkpoint holds its matrices, read from config.json (or quantize_config.json), normalised.

Read by the resolver; the schemes of quantization/ and the planner take what it says. Sources: the `quantization_config`
that AutoGPTQ, GPTQModel, AutoAWQ, llm-compressor (compressed-tensors) and the makers of FP8 checkpoints write; that of
AutoRound is auto_round.py's.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal

from shoal.config.auto_round import as_gptq
from shoal.errors import ConfigError, ModelError

# What --quantization takes, and what a config's quant_method may be; the first of a line is the method's name.
METHODS = {
    "gptq": ("gptq", "gptq_marlin", "auto-round"),
    "awq": ("awq", "awq_marlin"),
    "fp8": ("fp8", "fbgemm_fp8"),
    "int8": ("int8", "w8a8_int8"),
    "compressed-tensors": ("compressed-tensors", "compressed_tensors"),
    "mxfp4": ("mxfp4",),
}
CHOICES = tuple(name for names in METHODS.values() for name in names if name != "compressed_tensors")
# Methods that quantize a plain checkpoint while it is loaded.
ON_THE_FLY = ("fp8", "int8")

# Last parts of modules' names: tables of embeddings, which a head may be tied to and nobody quantizes, and heads.
_EMBEDDINGS = ("embed_tokens", "word_embeddings", "embed_in", "wte")
_HEADS = ("lm_head", "embed_out")

Kind = Literal["int", "float"]
Scales = Literal["tensor", "channel", "group", "block"]
Activations = Literal["none", "dynamic_token", "dynamic_group", "static_tensor"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizationConfig:
    """One format for all matrices but those that are kept.

    method: which layout the tensors have, a key of METHODS. kind, bits: of a weight. scales: what one scale is for: the
    matrix, an output ("channel"), `group_size` inputs of an output ("group", -1: all of them), a `block` of outputs ×
    inputs. symmetric: no zero points. desc_act: inputs were quantized in another order, which g_idx tells (GPTQ).
    activations: in what the inputs are quantized, "none": they stay. kept: modules left as they are, by name, part of a
    name, or regular expression ("re:…"). targets: likewise those that this is the format of; (): all. others: further
    formats, for modules that are not among the targets; what none is for is kept. on_the_fly: the checkpoint is plain,
    the loader quantizes. raw: the whole object, for what only one method has.
    """

    method: str
    kind: Kind
    bits: int
    scales: Scales
    group_size: int = 0
    block: tuple[int, int] = (0, 0)
    symmetric: bool = True
    desc_act: bool = False
    activations: Activations = "none"
    kept: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()
    others: tuple[QuantizationConfig, ...] = ()
    quantizes_head: bool = False
    on_the_fly: bool = False
    raw: dict[str, Any] = dataclasses.field(default_factory=dict)

    def keeps(self, module: str) -> bool:
        """module: its full name, such as model.layers.3.self_attn.q_proj."""
        last = module.rpartition(".")[2]
        if last in _EMBEDDINGS or (last in _HEADS and not self.quantizes_head):
            return True
        return any(_matches(pattern, module) for pattern in self.kept) or self.format_of(module) is None

    def format_of(self, module: str) -> int | None:
        """Which of (self, *others) it has, if it is quantized; None: there is none for it."""
        for index, config in enumerate((self, *self.others)):
            if not config.targets or any(_matches(pattern, module) for pattern in config.targets):
                return index
        return None

    @property
    def input_unit(self) -> int:
        """Inputs of a row-parallel layer are cut at multiples of it. A group of integers in words may be cut."""
        if self.method == "awq":  # packed along the outputs
            return 1
        if self._numbers_in_words:
            return self._numbers_in_words
        if self.scales == "block":
            return self.block[1]
        if self.scales == "group" and self.group_size > 0:
            return self.group_size
        return 1

    @property
    def output_unit(self) -> int:
        """Outputs of a column-parallel layer are cut at multiples of it."""
        if self._numbers_in_words and not (self.method == "compressed-tensors" and self.symmetric):
            return self._numbers_in_words
        return self.block[0] if self.scales == "block" else 1

    @property
    def _numbers_in_words(self) -> int:
        """How many integers fill words of 32 bits, in three words those of 3 bits; 0: they lie in no words."""
        if self.method in ("gptq", "awq") or self.raw.get("format") == "pack-quantized":
            return {2: 16, 3: 32, 4: 8, 8: 4}[self.bits]
        return 0

    def describe(self) -> str:
        each = {
            "group": "a scale an output" if self.group_size < 0 else f"groups of {self.group_size}",
            "block": "blocks of {} × {}".format(*self.block),
            "channel": "a scale an output",
            "tensor": "a scale a matrix",
        }[self.scales]
        return f"{self.method}, {self.bits}-bit {self.kind}, {each}{', quantized while loading' * self.on_the_fly}"


def _matches(pattern: str, module: str) -> bool:
    if pattern.startswith("re:"):
        return re.match(pattern[3:], module) is not None
    return f".{pattern.strip('.')}." in f".{module}."


def method_of(name: str) -> str:
    """The method of a name that --quantization takes. Raises ConfigError."""
    for method, names in METHODS.items():
        if name in names:
            return method
    raise ConfigError(f"quantization {name!r} is not known; known: {', '.join(CHOICES)}")


def read_quantization(found: Any, wanted: str | None = None) -> QuantizationConfig | None:
    """found: the `quantization_config` of a config.json; wanted: what --quantization says.

    Raises ModelError naming what is unknown or inconsistent, ConfigError where the wish contradicts the checkpoint.
    """
    if found is None or found == {}:
        return None if wanted is None else _on_the_fly(wanted)
    if not isinstance(found, dict):
        raise ModelError(f"quantization_config must be an object; found {found!r}")
    name = str(found.get("quant_method", ""))
    if not any(name in names for names in METHODS.values()):
        raise ModelError(
            f"quantization_config: quant_method {name!r} is not supported; supported: {', '.join(METHODS)}; "
            "or use the unquantized model (float32, bfloat16 or float16 safetensors)"
        )
    config = _READERS[method_of(name)](found)
    if wanted is not None and method_of(wanted) != config.method:
        raise ConfigError(
            f"--quantization {wanted} contradicts the checkpoint, which is quantized by {name}; leave the option out"
        )
    return config


def _on_the_fly(wanted: str) -> QuantizationConfig:
    method = method_of(wanted)
    if method == "fp8":
        return QuantizationConfig(
            method="fp8", kind="float", bits=8, scales="channel", activations="dynamic_token", on_the_fly=True
        )
    if method == "int8":
        return QuantizationConfig(
            method="int8", kind="int", bits=8, scales="channel", activations="dynamic_token", on_the_fly=True
        )
    raise ConfigError(
        f"--quantization {wanted}: the checkpoint is not quantized (its config has no quantization_config, and there "
        f"is no quantize_config.json); while loading, Shoal can quantize by {', '.join(ON_THE_FLY)}, and "
        "`shoal quantize` makes checkpoints of the other kinds"
    )


def _gptq(found: Mapping[str, Any]) -> QuantizationConfig:
    if found["quant_method"] == "auto-round":
        given, targets = as_gptq(found, _HEADS)
        return dataclasses.replace(_gptq(given), targets=targets)
    bits = _integer(found, "bits", None, known=(2, 3, 4, 8))
    if str(found.get("checkpoint_format", "gptq")) not in ("gptq", "gptq_v2"):
        raise ModelError(
            f"quantization_config: checkpoint_format {found['checkpoint_format']!r} is not supported; "
            "supported: gptq, gptq_v2"
        )
    if found.get("is_marlin_format"):
        raise ModelError(
            "quantization_config: is_marlin_format: tensors that were packed for one kernel are not read; "
            "the checkpoint that they were made from is"
        )
    quantizes_head = _flag(found, "lm_head", False)
    return QuantizationConfig(
        method="gptq",
        kind="int",
        bits=bits,
        scales="group",
        group_size=_group_size(found, "group_size", 128),
        symmetric=_flag(found, "sym", True),
        desc_act=_flag(found, "desc_act", False),
        kept=_patterns(found),
        targets=_modules_of_blocks(found, quantizes_head),
        quantizes_head=quantizes_head,
        raw=dict(found),
    )


def _modules_of_blocks(found: Mapping[str, Any], quantizes_head: bool) -> tuple[str, ...]:
    """modules_in_block_to_quantize of Transformers and Optimum: names within a layer, in lists of lists or in one."""
    given = found.get("modules_in_block_to_quantize")
    if not given:
        return ()
    lists = given if isinstance(given, list) else [given]
    names = [name for part in lists for name in (part if isinstance(part, list) else [part])]
    _check_names("modules_in_block_to_quantize", names)
    return (*(f"re:.*\\.{re.escape(name)}$" for name in names), *_HEADS * quantizes_head)


def _awq(found: Mapping[str, Any]) -> QuantizationConfig:
    # AutoAWQ's own names stand beside those of the Hugging Face config.
    bits = _integer(found, "bits" if "bits" in found else "w_bit", 4, known=(4,))
    version = str(found.get("version", "gemm")).lower()
    if version != "gemm":
        raise ModelError(f"quantization_config: version {version!r} of AWQ is not supported; supported: gemm")
    return QuantizationConfig(
        method="awq",
        kind="int",
        bits=bits,
        scales="group",
        group_size=_group_size(found, "group_size" if "group_size" in found else "q_group_size", 128),
        symmetric=not _flag(found, "zero_point", True),
        kept=_patterns(found),
        raw=dict(found),
    )


def _fp8(found: Mapping[str, Any]) -> QuantizationConfig:
    scheme = str(found.get("activation_scheme", "dynamic"))
    if scheme not in ("dynamic", "static"):
        raise ModelError(f"quantization_config: activation_scheme {scheme!r} is not supported; known: dynamic, static")
    fmt = str(found.get("fmt", "e4m3"))
    if fmt != "e4m3":
        raise ModelError(f"quantization_config: fmt {fmt!r} is not supported; supported: e4m3")
    scales: Scales = "channel" if found["quant_method"] == "fbgemm_fp8" else "tensor"
    block = (0, 0)
    activations: Activations = "dynamic_token" if scheme == "dynamic" else "static_tensor"
    if (given := found.get("weight_block_size")) is not None:
        scales, block, activations = "block", _block(given, "weight_block_size"), "dynamic_group"
        if scheme == "static":
            raise ModelError("quantization_config: weight_block_size does not go with activation_scheme static")
    return QuantizationConfig(
        method="fp8",
        kind="float",
        bits=8,
        scales=scales,
        block=block,
        activations=activations,
        kept=_patterns(found),
        raw=dict(found),
    )


def _int8(found: Mapping[str, Any]) -> QuantizationConfig:
    return QuantizationConfig(
        method="int8",
        kind="int",
        bits=8,
        scales="channel",
        activations="dynamic_token" if _flag(found, "quantizes_activations", True) else "none",
        kept=_patterns(found),
        raw=dict(found),
    )


def _mxfp4(found: Mapping[str, Any]) -> QuantizationConfig:
    """gpt-oss: 4-bit floats (e2m1) in groups of 32 with scales of powers of two (OCP Microscaling, 2023)."""
    return QuantizationConfig(
        method="mxfp4", kind="float", bits=4, scales="group", group_size=32, kept=_patterns(found), raw=dict(found)
    )


_KINDS_OF_FORMATS = {
    "pack-quantized": ("int",),
    "int-quantized": ("int",),
    "float-quantized": ("float",),
    "naive-quantized": ("int", "float"),
}


def _compressed(found: Mapping[str, Any]) -> QuantizationConfig:
    status = str(found.get("quantization_status", "compressed"))
    if status not in ("compressed", "frozen"):
        raise ModelError(f"quantization_config: quantization_status {status!r} is not supported; known: compressed")
    sparsity = found.get("sparsity_config") or {}
    if not isinstance(sparsity, dict) or sparsity.get("format", "dense") != "dense":
        raise ModelError(
            f"quantization_config: sparsity_config {sparsity!r} is not supported: weights whose zeros are left out are "
            "not read; format dense is"
        )
    groups = found.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise ModelError(f"quantization_config: config_groups must be an object with a group; found {groups!r}")
    configs = [_compressed_group(found, name, group) for name, group in groups.items()]
    # Modules that are named come before those of a class.
    first, *others = sorted(configs, key=lambda config: not config.targets)
    if len([config for config in configs if not config.targets]) > 1:
        raise ModelError("quantization_config: several config_groups are for all linear modules; one can be")
    heads = any(config.quantizes_head for config in configs)
    return dataclasses.replace(first, others=tuple(others), quantizes_head=heads)


def _compressed_group(found: Mapping[str, Any], name: str, group: Any) -> QuantizationConfig:
    if not isinstance(group, dict):
        raise ModelError(f"quantization_config: the config_group {name} must be an object; found {group!r}")
    fmt = str(group.get("format") or found.get("format", ""))
    if fmt not in _KINDS_OF_FORMATS:
        raise ModelError(
            f"quantization_config: format {fmt!r} of compressed-tensors is not supported; supported: "
            f"{', '.join(_KINDS_OF_FORMATS)}"
        )
    weights = group.get("weights")
    if not isinstance(weights, dict):
        raise ModelError(f"quantization_config: the config_group {name} has no weights")
    kind = str(weights.get("type", "int"))
    if kind not in ("int", "float"):
        raise ModelError(f"quantization_config: weights of type {kind!r} are not supported; supported: int, float")
    bits = _integer(weights, "num_bits", 8, known=(4, 8))
    if kind not in _KINDS_OF_FORMATS[fmt] or (bits == 4 and fmt != "pack-quantized"):
        raise ModelError(f"quantization_config: {bits}-bit {kind} weights in format {fmt!r} are not supported")
    scales = str(weights.get("strategy") or ("group" if weights.get("group_size") else "tensor"))
    if scales not in ("tensor", "channel", "group", "block"):
        raise ModelError(
            f"quantization_config: scales by {scales!r} are not supported; supported: tensor, channel, group, block"
        )
    targets = group.get("targets") or ["Linear"]
    _check_names("targets", targets)
    return QuantizationConfig(
        method="compressed-tensors",
        kind=kind,  # type: ignore[arg-type]
        bits=bits,
        scales=scales,  # type: ignore[arg-type]
        group_size=_group_size(weights, "group_size", 128) if scales == "group" else 0,
        block=_block(weights.get("block_structure") or [128, 128], "block_structure") if scales == "block" else (0, 0),
        symmetric=_flag(weights, "symmetric", True),
        desc_act=_is_ordered(weights.get("actorder")),
        activations=_compressed_activations(group.get("input_activations")),
        kept=_patterns(found),
        targets=() if "Linear" in targets else tuple(targets),
        quantizes_head=any(_matches(pattern, "lm_head") for pattern in targets),
        raw=dict(found) | {"config_groups": {name: group}, "format": fmt},
    )


def _is_ordered(actorder: Any) -> bool:
    """Whether the inputs stand in another order than their groups. Raises ModelError."""
    if actorder in ("group", "dynamic", True):
        return True
    if actorder in ("weight", "static", False, None):
        return False
    raise ModelError(f"quantization_config: actorder {actorder!r} is not supported; known: group, weight")


def _compressed_activations(found: Any) -> Activations:
    if not found:
        return "none"
    if not isinstance(found, dict):
        raise ModelError(f"quantization_config: input_activations must be an object; found {found!r}")
    if not _flag(found, "dynamic", True):
        return "static_tensor"
    strategy = str(found.get("strategy", "token"))
    if strategy not in ("token", "group"):
        raise ModelError(
            f"quantization_config: dynamic activations by {strategy!r} are not supported; token, group are"
        )
    return "dynamic_group" if strategy == "group" else "dynamic_token"


_READERS: dict[str, Callable[[Mapping[str, Any]], QuantizationConfig]] = {
    "gptq": _gptq,
    "awq": _awq,
    "fp8": _fp8,
    "int8": _int8,
    "compressed-tensors": _compressed,
    "mxfp4": _mxfp4,
}


def _integer(found: Mapping[str, Any], name: str, default: int | None, known: tuple[int, ...] = ()) -> int:
    value = found.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool):
        raise ModelError(f"quantization_config: {name} must be an integer; found {value!r}")
    if known and value not in known:
        raise ModelError(
            f"quantization_config: {name} {value} is not supported; supported: {', '.join(map(str, known))}"
        )
    return value


def _group_size(found: Mapping[str, Any], name: str, default: int) -> int:
    value = _integer(found, name, default)
    if value != -1 and (value < 1 or value % 8):
        raise ModelError(f"quantization_config: {name} must be -1 or a positive multiple of 8; found {value}")
    return value


def _flag(found: Mapping[str, Any], name: str, default: bool) -> bool:
    value = found.get(name, default)
    if not isinstance(value, bool):
        raise ModelError(f"quantization_config: {name} must be true or false; found {value!r}")
    return value


def _block(value: Any, name: str) -> tuple[int, int]:
    if not isinstance(value, list) or len(value) != 2 or not all(type(size) is int and size > 0 for size in value):
        raise ModelError(f"quantization_config: {name} must be two sizes; found {value!r}")
    return value[0], value[1]


def _patterns(found: Mapping[str, Any]) -> tuple[str, ...]:
    for name in ("modules_to_not_convert", "ignored_layers", "ignore"):
        if found.get(name):
            _check_names(name, found[name])
            return tuple(found[name])
    return ()


def _check_names(what: str, given: Any) -> None:
    """Raise ModelError unless it is a list of names and of regular expressions ("re:…")."""
    if not isinstance(given, list) or not all(isinstance(name, str) for name in given):
        raise ModelError(f"quantization_config: {what} must be a list of names; found {given!r}")
    for name in given:
        if name.startswith("re:"):
            check_expression(what, name[3:])


def check_expression(what: str, expression: str) -> None:
    """Raise ModelError for what is no regular expression."""
    try:
        re.compile(expression)
    except re.error as error:
        raise ModelError(
            f"quantization_config: {what} has {expression!r}, which is no regular expression: {error}"
        ) from None
