"""Quantized checkpoints in the layouts that others write, made from small plain ones, and the same ones dequantized.

Written from the layouts' descriptions, with nothing of shoal/quantization. Each writer takes a matrix [N, K] and
returns (what is stored for it, by suffix; what it stands for, fp32).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Stored = dict[str, torch.Tensor]
Writer = Callable[[torch.Tensor], tuple[Stored, torch.Tensor]]


def write_quantized(
    plain: Path,
    directory: Path,
    config: dict[str, Any],
    writer: Writer,
    keep: str | tuple[str, ...] = "lm_head",
    others: Mapping[str, Writer] | None = None,
) -> Path:
    """Quantize all matrices of `plain` but the embedding and those whose name holds (one of) `keep`, into
    `directory`/quantized; `directory`/reference is the dequantized one, fp32. others: writers of matrices whose name
    holds their key. Returns the first."""
    kept = (keep,) if isinstance(keep, str) else keep
    tensors = load_file(plain / "model.safetensors")
    quantized, reference = {}, {}
    for name, tensor in tensors.items():
        module, _, suffix = name.rpartition(".")
        if suffix != "weight" or tensor.dim() != 2 or "embed" in name or any(k in name for k in kept):
            quantized[name] = reference[name] = tensor
            continue
        own = next((other for part, other in (others or {}).items() if part in name), writer)
        stored, reference[name] = own(tensor.float())
        quantized |= {f"{module}.{key}": value.contiguous() for key, value in stored.items()}
    raw = json.loads((plain / "config.json").read_text())
    for form, content, extra in (
        ("quantized", quantized, {"quantization_config": config}),
        ("reference", reference, {}),
    ):
        target = directory / form
        target.mkdir(parents=True, exist_ok=True)
        for file in plain.iterdir():
            if file.name not in ("config.json", "model.safetensors"):
                (target / file.name).write_bytes(file.read_bytes())
        (target / "config.json").write_text(json.dumps(raw | extra))
        save_file(content, target / "model.safetensors", metadata={"format": "pt"})
    return directory / "quantized"


def _to_fp8(values: torch.Tensor) -> torch.Tensor:
    return values.clamp(-448, 448).to(torch.float8_e4m3fn)


def fp8_by_tensor(scale_shape: tuple[int, ...] = (), *, name: str = "weight_scale", inputs: str = "") -> Writer:
    def write(weight: torch.Tensor) -> tuple[Stored, torch.Tensor]:
        scale = weight.abs().max() / 448
        numbers = _to_fp8(weight / scale)
        stored = {"weight": numbers, name: scale.reshape(scale_shape)}
        if inputs:
            stored[inputs] = torch.tensor(0.05).reshape(scale_shape)
        return stored, numbers.float() * scale

    return write


def fp8_by_channel(scale_dims: int = 2, scale_dtype: torch.dtype = torch.float32) -> Writer:
    def write(weight: torch.Tensor) -> tuple[Stored, torch.Tensor]:
        scale = (weight.abs().amax(1, keepdim=True) / 448).to(scale_dtype)
        numbers = _to_fp8(weight / scale.float())
        return {"weight": numbers, "weight_scale": scale if scale_dims == 2 else scale[:, 0]}, (
            numbers.float() * scale.float()
        )

    return write


def fp8_by_block(outputs: int, inputs: int, name: str = "weight_scale_inv") -> Writer:
    def write(weight: torch.Tensor) -> tuple[Stored, torch.Tensor]:
        num_rows, num_columns = weight.shape
        scales = torch.zeros(-(-num_rows // outputs), -(-num_columns // inputs))
        numbers = torch.zeros(weight.shape, dtype=torch.float8_e4m3fn)
        reference = torch.zeros_like(weight)
        for row in range(scales.shape[0]):
            for column in range(scales.shape[1]):
                own = slice(row * outputs, (row + 1) * outputs), slice(column * inputs, (column + 1) * inputs)
                scales[row, column] = weight[own].abs().max() / 448
                numbers[own] = _to_fp8(weight[own] / scales[row, column])
                reference[own] = numbers[own].float() * scales[row, column]
        return {"weight": numbers, name: scales}, reference

    return write


def int8_by_channel(scale_dims: int = 2, *, inputs: bool = False) -> Writer:
    def write(weight: torch.Tensor) -> tuple[Stored, torch.Tensor]:
        scale = weight.abs().amax(1, keepdim=True) / 127
        numbers = (weight / scale).round().clamp(-128, 127)
        stored = {"weight": numbers.to(torch.int8), "weight_scale": scale if scale_dims == 2 else scale[:, 0]}
        if inputs:
            stored["input_scale"] = torch.tensor([0.05])
        return stored, numbers * scale

    return write


def packed(bits: int, group: int, *, symmetric: bool = True, ordered: bool = False) -> Writer:
    """group -1: one for each output."""

    def pack(numbers: torch.Tensor) -> torch.Tensor:
        """Along the last dimension, number by number."""
        per_word = 32 // bits
        words = torch.zeros(numbers.shape[0], -(-numbers.shape[1] // per_word), dtype=torch.int64)
        for index in range(numbers.shape[1]):
            unsigned = numbers[:, index].to(torch.int64) + (1 << (bits - 1))
            words[:, index // per_word] |= unsigned << (bits * (index % per_word))
        return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)

    def write(weight: torch.Tensor) -> tuple[Stored, torch.Tensor]:
        num_columns = weight.shape[1]
        size = num_columns if group < 0 else group
        group_of = torch.arange(num_columns) // size
        if ordered:
            group_of = group_of[torch.randperm(num_columns, generator=torch.Generator().manual_seed(num_columns))]
        num_groups = int(group_of.max()) + 1
        lowest, highest = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
        scales, zeros = torch.zeros(weight.shape[0], num_groups), torch.zeros(weight.shape[0], num_groups)
        for each in range(num_groups):
            own = weight[:, group_of == each]
            if symmetric:
                scales[:, each] = own.abs().amax(1) / highest
            else:
                scales[:, each] = (own.amax(1) - own.amin(1)) / (highest - lowest)
                zeros[:, each] = (lowest - own.amin(1) / scales[:, each]).round().clamp(lowest, highest)
        by_input, zero_by_input = scales[:, group_of], zeros[:, group_of]
        numbers = (weight / by_input + zero_by_input).round().clamp(lowest, highest)
        stored = {
            "weight_packed": pack(numbers),
            "weight_scale": scales,
            "weight_shape": torch.tensor(list(weight.shape)),
        }
        if not symmetric:
            stored["weight_zero_point"] = pack(zeros.t()).t()
        if ordered:
            stored["weight_g_idx"] = group_of.to(torch.int32)
        return stored, (numbers - zero_by_input) * by_input

    return write


def compressed(form: str, weights: dict[str, Any], inputs: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    """The quantization_config that llm-compressor writes."""
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": inputs}},
        "ignore": ["lm_head"],
        **more,
    }
