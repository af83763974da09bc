"""One decoder layer from plain to quantized: what its file will hold, and what that cost."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import nn

from shoal.errors import ModelError
from shoal.quantize.awq import find_scales, fold
from shoal.quantize.calibration import Inputs
from shoal.quantize.gptq import quantize_gptq
from shoal.quantize.grid import round_bytes, round_to_nearest
from shoal.quantize.order import CALIBRATED, MatrixRow, QuantizeOrder
from shoal.quantize.packing import Stored, dense_of, pack_awq, pack_gptq
from shoal.quantize.pruning import prune_mask


@dataclasses.dataclass
class QuantizedLayer:
    """matrices: by name within the layer, the tensors that stand for it. rows: what each cost."""

    matrices: dict[str, Stored]
    rows: list[MatrixRow]


def quantize_layer(
    order: QuantizeOrder,
    index: int,
    layer: nn.Module,
    linears: dict[str, nn.Linear],
    groups: list[Inputs],
    run: Callable[[], torch.Tensor] | None,
    scale_dtype: torch.dtype,
    progress: Callable[[str, float], None],
) -> QuantizedLayer:
    """groups: what the matrices are given; empty without a calibration text. run: one sample through the layer, for
    AWQ, which changes norms and matrices of `layer` besides. Raises ModelError."""
    plain = {name: module.weight.data for name, module in linears.items()}
    masks = {name: prune_mask(weight, order.sparsity, order.two_of_four) for name, weight in plain.items()}
    inputs = {name: group for group in groups for name in group.names}
    hessians = {name: group.hessian for name, group in inputs.items()}
    nearest = {
        name: _error(
            weight,
            round_to_nearest(weight, order.bits, order.group_size, order.symmetric, masks[name]).values(),
            hessians.get(name),
        )
        for name, weight in plain.items()
        if order.method in CALIBRATED  # others round to the nearest
    }
    started = 0.0
    if order.method == "awq":
        assert run is not None
        for number, group in enumerate(groups):
            progress("scales", 0.8 * number / len(groups))
            weights, own_masks = [linears[name].weight.data for name in group.names], [masks[n] for n in group.names]
            scales = find_scales(group, weights, own_masks, order.group_size, order.symmetric)
            if fold(layer, linears, group, scales, run):
                group.hessian /= scales[:, None] * scales[None, :]
        started = 0.8
    matrices, rows = {}, []
    for number, (name, module) in enumerate(linears.items()):
        progress(name, started + (1 - started) * number / len(linears))
        weight = module.weight.data
        stored = _quantize(order, weight, hessians.get(name), masks[name], scale_dtype)
        dense = dense_of(stored, order.bits)
        if not bool(dense.isfinite().all()):
            raise ModelError(f"layer {index}: {name} has weights that are not finite, or too large for {order.method}")
        matrices[name] = stored
        error = _error(weight, dense, hessians.get(name))
        rows.append(
            MatrixRow(
                layer=index,
                name=name,
                nearest=nearest.get(name, error),
                error=error,
                sparsity=float((dense == 0).float().mean()),
            )
        )
    return QuantizedLayer(matrices, rows)


def _quantize(
    order: QuantizeOrder,
    weight: torch.Tensor,
    hessian: torch.Tensor | None,
    mask: torch.Tensor | None,
    scale_dtype: torch.dtype,
) -> Stored:
    if order.method == "gptq" and hessian is None:  # of an expert that no token of the text reached
        return pack_gptq(round_to_nearest(weight, order.bits, order.group_size, order.symmetric, mask))
    if order.method == "gptq":
        return pack_gptq(
            quantize_gptq(
                weight,
                hessian,
                bits=order.bits,
                group_size=order.group_size,
                symmetric=order.symmetric,
                desc_act=order.desc_act,
                damp=order.damp,
                mask=mask,
            )
        )
    if order.method == "awq":
        return pack_awq(round_to_nearest(weight, order.bits, order.group_size, order.symmetric, mask))
    if mask is not None:
        weight = weight.masked_fill(mask, 0)
    dtype = torch.float8_e4m3fn if order.method == "fp8" else torch.int8
    numbers, scales = round_bytes(weight, dtype, order.granularity == "channel", scale_dtype)
    return {"weight": numbers, "weight_scale": scales}


def _error(weight: torch.Tensor, dense: torch.Tensor, hessian: torch.Tensor | None) -> float:
    """‖X(W − Ŵ)ᵀ‖ / ‖XWᵀ‖ by H = XᵀX; of the weights themselves without one."""
    change = dense - weight
    if hessian is None:
        lost, whole = change.square().sum(), weight.square().sum()
    else:
        lost, whole = (change @ hessian).mul_(change).sum(), (weight @ hessian).mul_(weight).sum()
    return float((lost.clamp(min=0) / whole.clamp(min=1e-30)).sqrt())
