"""gpt-oss checkpoints with MXFP4 experts, made from plain ones, and the same ones dequantized.

Written from OCP Microscaling Formats 1.0 (e2m1 numbers, e8m0 scales, groups of 32) and the layout of gpt-oss: numbers
two a byte, the first in the lower half, [experts, outputs, inputs / 32, 16]; nothing of shoal/quantization.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

CONFIG = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
}


def e2m1(code: int) -> float:
    sign, exponent, mantissa = code >> 3, (code >> 1) & 3, code & 1
    magnitude = mantissa * 0.5 if exponent == 0 else 2.0 ** (exponent - 1) * (1 + mantissa / 2)
    return -magnitude if sign else magnitude


def write_mxfp4(plain: Path, directory: Path) -> Path:
    """`directory`/quantized, and beside it `reference`: fp32, of what the numbers stand for. Returns the first."""
    tensors = load_file(plain / "model.safetensors")
    quantized: dict[str, torch.Tensor] = {}
    reference: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            quantized[name] = reference[name] = tensor
            continue
        blocks, scales, dequantized = encode(tensor.transpose(1, 2))
        quantized[f"{name}_blocks"], quantized[f"{name}_scales"] = blocks, scales
        reference[name] = dequantized.transpose(1, 2).contiguous()
    for form, content, extra in (
        ("quantized", quantized, {"quantization_config": CONFIG}),
        ("reference", reference, {}),
    ):
        write(plain, directory / form, content, extra)
    return directory / "quantized"


def write(plain: Path, target: Path, tensors: dict[str, torch.Tensor], extra: dict[str, Any]) -> None:
    target.mkdir(parents=True)
    for file in plain.iterdir():
        if file.suffix == ".json" and file.name != "config.json":
            (target / file.name).write_bytes(file.read_bytes())
    raw = json.loads((plain / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**raw, **extra}))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, target / "model.safetensors")


def encode(matrices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """matrices [E, N, K] -> blocks, scales, and what they stand for [E, N, K]."""
    groups = matrices.float().unflatten(-1, (-1, 32))
    # The largest of a group is to lie in the topmost binade, 4 to 6 (OCP MX, 6.3).
    exponents = torch.floor(torch.log2(groups.abs().amax(dim=-1).clamp(min=2.0**-100))) - 2
    values = torch.tensor([e2m1(code) for code in range(16)])
    scaled = groups / torch.exp2(exponents)[..., None]
    codes = (scaled[..., None] - values).abs().argmin(dim=-1)
    dequantized = (values[codes] * torch.exp2(exponents)[..., None]).flatten(-2)
    blocks = (codes[..., 0::2] + 16 * codes[..., 1::2]).to(torch.uint8)
    return blocks, (exponents + 127).to(torch.uint8), dequantized
