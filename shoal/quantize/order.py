"""What `shoal quantize` and its program say to each other: an order, then news as lines of JSON. Without torch."""

from __future__ import annotations

import msgspec

METHODS = ("gptq", "awq", "fp8", "int8")
# Methods that look at what the layers are given, and so cannot do without a text.
CALIBRATED = ("gptq", "awq")


class QuantizeOrder(msgspec.Struct, frozen=True, kw_only=True):
    """What to make. model, out, calibration: absolute paths. All but `out` and `device` decide what comes out.

    bits, group_size, symmetric, desc_act, damp: of gptq and awq. granularity: "channel" or "tensor", of fp8. sparsity:
    share of the weights that become zero; 2:4 where `two_of_four`. ignore: parts of names of matrices that stay.
    """

    model: str
    out: str
    method: str
    calibration: str | None
    num_samples: int
    sequence_length: int
    bits: int
    group_size: int
    symmetric: bool
    desc_act: bool
    damp: float
    granularity: str
    sparsity: float
    two_of_four: bool
    ignore: tuple[str, ...]
    device: str


class MatrixRow(msgspec.Struct, frozen=True, kw_only=True):
    """One matrix. error: ‖XW − XŴ‖ / ‖XW‖ over the calibration text, or ‖W − Ŵ‖ / ‖W‖ without one; nearest: the same
    of rounding each weight to the nearest number of the same grid. sparsity: share of zeros."""

    layer: int
    name: str
    nearest: float
    error: float
    sparsity: float


class QuantizeProgress(msgspec.Struct, tag="quantize_progress"):
    """done: of all the work, 0 to 1. layer: counted from 1; phase: what is done to it."""

    layer: int
    num_layers: int
    phase: str
    done: float


class QuantizeLayer(msgspec.Struct, tag="quantize_layer"):
    """A layer lies in its file. resumed: since an earlier run."""

    layer: int
    num_layers: int
    rows: list[MatrixRow]
    resumed: bool


class QuantizeNote(msgspec.Struct, tag="quantize_note"):
    """Something that the user should know."""

    text: str


class QuantizeFailed(msgspec.Struct, tag="quantize_failed"):
    """kind: the name of an error of shoal.errors."""

    kind: str
    error: str


class QuantizeDone(msgspec.Struct, tag="quantize_done"):
    """The checkpoint is whole. bytes_before, bytes_after: of the tensors."""

    bytes_before: int
    bytes_after: int


QuantizeNews = QuantizeProgress | QuantizeLayer | QuantizeNote | QuantizeFailed | QuantizeDone
