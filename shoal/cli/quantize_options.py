"""Options of `shoal quantize`."""

from __future__ import annotations

import dataclasses

from shoal.config.options import EMBEDDED_MODEL, option
from shoal.quantize.order import METHODS


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizeOptions:
    """What is made of what."""

    model: str = option(EMBEDDED_MODEL, "The plain model: a Hugging Face directory with safetensors, or shoal-tiny.")
    out: str | None = option(
        None, "The directory to write; that of a run which was ended is gone on with. Also as a second bare argument."
    )
    method: str | None = option(
        None,
        "gptq, awq: integers of --bits, as AutoGPTQ and AutoAWQ lay them out; fp8, int8: a byte a weight, activations "
        "quantized while the model runs (compressed-tensors).",
        choices=METHODS,
    )
    overwrite: bool = option(False, "Start again in a directory that holds a checkpoint, whose files are removed.")
    device: str = option("auto", "Where the layers run.", choices=("auto", "cpu", "cuda"))
    json: str | None = option(None, "Write the report to this file too; quantize_report.json of OUT has it anyway.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CalibrationOptions:
    """The text that shows what the layers are given."""

    calibration: str | None = option(
        None,
        "A text file (UTF-8) of the kind that the model will see. gptq and awq need it; fp8 and int8 measure by it.",
    )
    num_samples: int = option(128, "Pieces of it that are read, from its beginning.", minimum=1)
    sequence_length: int = option(2048, "Tokens of a piece.", minimum=2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GridOptions:
    """What weights become."""

    bits: int | None = option(None, "Of a weight by gptq: 4 or 8; default: 4. awq has 4, fp8 and int8 have 8.")
    group_size: int | None = option(
        None, "Inputs of an output that share a scale, by gptq and awq; -1: all of them. Default: 128."
    )
    sym: bool = option(False, "No zero points. By default so for gptq; awq always has them.")
    asym: bool = option(False, "Zero points for gptq.")
    desc_act: bool = option(False, "gptq: the inputs of the largest activations first. Better, slower to serve.")
    damp: float = option(
        0.01, "gptq: added to the Hessian's diagonal, as a share of its mean.", minimum=0.0001, maximum=1
    )
    granularity: str = option(
        "channel", "fp8: a scale for each output, or for the matrix.", choices=("channel", "tensor")
    )
    prune: str | None = option(
        None,
        "Set weights of small magnitude to zero besides: 2:4 (two of each four inputs), or a share of each output's, "
        "such as 0.5. gptq makes up for it as for rounding.",
    )
    ignore: list[str] = option([], "Names, or parts between dots, of matrices that stay as they are: down_proj.")
