"""AutoRound's config in the words of GPTQ, whose layout its packing `auto_gptq` is. quantization.py calls it.

Source: the `quantization_config` that AutoRound (Cheng et al. 2023, arXiv:2309.05516) writes for `--format auto_round`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from shoal.errors import ModelError

PACKINGS = ("auto_round:auto_gptq", "auto_gptq")
# Of this many bits and more a module is plain.
_PLAIN_BITS = 16
# With one of these a key of extra_config is an expression, without it a module's name.
_SPECIAL = frozenset("*+?^$()[]{}|\\")


def as_gptq(found: Mapping[str, Any], heads: tuple[str, ...]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """(The same as `quant_method: gptq`, names and expressions ("re:…") of what is quantized, (): everything).

    heads: last parts of heads' names, which are plain unless extra_config says otherwise. Raises ModelError.
    """
    packing = found.get("packing_format")
    if packing not in PACKINGS:
        raise ModelError(
            f"quantization_config: packing_format {packing!r} of auto-round is not supported; supported: "
            f"{', '.join(PACKINGS)}; of AutoRound's other formats auto_gptq and auto_awq are read"
        )
    _check_integers(found, "")
    plain, changed, expressions, quantized = [], {}, {}, []
    for name, own in _extra(found).items():
        is_expression = not _SPECIAL.isdisjoint(name)
        where = f"extra_config of {name!r}: "
        is_plain = _bits(own, where) >= _PLAIN_BITS
        if not is_plain:
            _check_integers(own, where)
            quantized.append(f"re:{_anywhere(name)}" if is_expression else name)
        changes = {key: own[key] for key in ("bits", "group_size", "sym") if key in own}
        if is_expression:
            expressions[("-:" if is_plain else "+:") + _anywhere(name)] = changes
        elif is_plain:
            plain.append(name)
        else:
            changed[f"+:{re.escape(name)}$"] = changes
    blocks = _blocks(found)
    has_head = any(_names(pattern, head) for pattern in quantized for head in heads)
    given = {**found, "quant_method": "gptq", "lm_head": has_head}
    given["modules_to_not_convert"] = [*(found.get("modules_to_not_convert") or []), *plain]
    # A module's own entry counts before expressions, of which the first that it matches does.
    given["dynamic"] = changed | expressions
    return given, (*blocks, *quantized) if blocks else ()


def _anywhere(expression: str) -> str:
    """For `match`: AutoRound looks for expressions within names."""
    return f".*?(?:{expression})"


def _names(pattern: str, head: str) -> bool:
    if pattern.startswith("re:"):
        return re.match(pattern[3:], head) is not None
    return pattern.rpartition(".")[2] == head


def _bits(found: Mapping[str, Any], where: str) -> int:
    """Of one module; 0 where it says nothing of them, which are those of all then."""
    bits = found.get("bits", _PLAIN_BITS if found.get("data_type") == "float" else 0)
    if not isinstance(bits, int) or isinstance(bits, bool):
        raise ModelError(f"quantization_config: {where}bits must be an integer; found {bits!r}")
    return bits


def _check_integers(found: Mapping[str, Any], where: str) -> None:
    """Raise ModelError unless weights are integers, and activations stay as they are."""
    kind = found.get("data_type", "int")
    if kind != "int":
        raise ModelError(
            f"quantization_config: {where}data_type {kind!r} of auto-round is not supported; supported: int"
        )
    bits = found.get("act_bits")
    if bits is not None and (not isinstance(bits, int) or bits < _PLAIN_BITS):
        raise ModelError(
            f"quantization_config: {where}act_bits {bits!r}: activations that auto-round quantizes are not supported; "
            f"those of {_PLAIN_BITS} bits are"
        )


def _extra(found: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    extra = found.get("extra_config") or {}
    if not isinstance(extra, dict) or not all(isinstance(own, dict) for own in extra.values()):
        raise ModelError(f"quantization_config: extra_config must be an object of objects; found {str(extra)[:200]}")
    for name in extra:
        try:
            re.compile(name)
        except re.error as error:
            raise ModelError(
                f"quantization_config: extra_config has {name!r}, which is no regular expression: {error}"
            ) from None
    return extra


def _blocks(found: Mapping[str, Any]) -> list[str]:
    """Names that what is quantized begins with: a list, lists in a list, or one string with commas."""
    given = found.get("block_name_to_quantize") or found.get("to_quant_block_names") or []
    if isinstance(given, str):
        return [name.strip() for name in given.split(",") if name.strip()]
    lists = given if isinstance(given, list) else [given]
    names = [name for part in lists for name in (part if isinstance(part, list) else [part])]
    if not all(isinstance(name, str) for name in names):
        raise ModelError(f"quantization_config: block_name_to_quantize must be names; found {str(given)[:200]}")
    return names
