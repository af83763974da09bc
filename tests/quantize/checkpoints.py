"""Quantizes small random checkpoints in the test's own process, and reads them by the layouts' descriptions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from shoal.quantize.order import QuantizeNews, QuantizeOrder
from shoal.quantize.output import prepare_output
from shoal.quantize.run import quantize
from shoal.quantize.source import read_source

TEXT = Path(__file__).read_text(encoding="utf-8") + Path(__file__).with_name("test_run.py").read_text(encoding="utf-8")


def order_for(model: Path, out: Path, method: str, **changes: Any) -> QuantizeOrder:
    text = out.parent / "calibration.txt"
    text.write_text(TEXT, encoding="utf-8")
    values: dict[str, Any] = {
        "calibration": str(text), "num_samples": 12, "sequence_length": 64, "bits": 4, "group_size": 32,
        "symmetric": method == "gptq", "desc_act": False, "damp": 0.01, "granularity": "channel", "sparsity": 0.0,
        "two_of_four": False, "ignore": (), "device": "cpu",
    }  # fmt: skip
    return QuantizeOrder(model=str(model), out=str(out), method=method, **(values | changes))


def run_order(order: QuantizeOrder, *, overwrite: bool = False) -> list[QuantizeNews]:
    news: list[QuantizeNews] = []
    prepare_output(order, read_source(Path(order.model)), overwrite)
    quantize(order, news.append)
    return news


def rows_of(out: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((out / "quantize_report.json").read_text())["matrices"]
    return found


def tensors_of(out: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted(out.glob("*.safetensors")):
        found |= load_file(path)
    return found


def plain_copy(model: Path, out: Path, target: Path) -> Path:
    """The checkpoint of `out` with plain fp32 matrices, in `target`: for Transformers."""
    from safetensors.torch import save_file

    tensors = tensors_of(out)
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    dense: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        module, _, suffix = name.rpartition(".")
        if suffix == "qweight":
            dense[f"{module}.weight"] = _integers(module, tensors, config)
        elif f"{module}.weight_scale" in tensors and suffix == "weight":
            dense[name] = tensor.float() * tensors[f"{module}.weight_scale"].float()
        elif suffix not in ("qzeros", "scales", "g_idx", "weight_scale"):
            dense[name] = tensor.float()
    target.mkdir()
    save_file(dense, target / "model.safetensors", metadata={"format": "pt"})
    raw = json.loads((model / "config.json").read_text()) | {"dtype": "float32"}
    (target / "config.json").write_text(json.dumps(raw))
    return target


def _integers(module: str, tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> torch.Tensor:
    """[N, K], number by number as the layouts are described."""
    bits = config["bits"]
    words, zero_words = tensors[f"{module}.qweight"].long(), tensors[f"{module}.qzeros"].long()
    scales = tensors[f"{module}.scales"].float()
    per_word, most = 32 // bits, (1 << bits) - 1
    outputs = torch.arange(scales.shape[1])
    if config["quant_method"] == "gptq":
        inputs = torch.arange(words.shape[0] * per_word)
        numbers = (words[inputs // per_word] >> (inputs % per_word * bits)[:, None]) & most
        zeros = ((zero_words[:, outputs // per_word] >> (outputs % per_word * bits)) & most) + 1
        groups = tensors[f"{module}.g_idx"].long()
    else:
        places = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])[outputs % 8] * 4
        numbers = (words[:, outputs // 8] >> places) & most
        zeros = (zero_words[:, outputs // 8] >> places) & most
        groups = torch.arange(len(numbers)) // config["group_size"]
    return ((numbers - zeros[groups]).float() * scales[groups]).t().contiguous()
