"""The unquantized linear: packed and plain forms agree, memory is not doubled, quantized checkpoints are refused."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F

from shoal.quantization.base import LinearSpec
from shoal.quantization.registry import create_quantization
from shoal.quantization.unquantized import Unquantized, packing_pays

CPU = torch.device("cpu")


def make_spec(inputs: int, outputs: int, dtype: torch.dtype, **changes: object) -> LinearSpec:
    values: dict = dict(in_features=inputs, out_features=outputs, bias=True, dtype=dtype, device=CPU)
    return LinearSpec(**{**values, **changes})


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("inputs", "outputs"), [(896, 1152), (257, 31), (64, 96), (1, 1)])
@pytest.mark.parametrize("bias", [True, False])
def test_every_form_multiplies(inputs: int, outputs: int, dtype: torch.dtype, deterministic: bool, bias: bool) -> None:
    method = Unquantized().linear(make_spec(inputs, outputs, dtype, bias=bias, deterministic=deterministic))
    loaded = {}
    for tensor in method.tensors():
        tensor.data.normal_()
        loaded[tensor.suffix] = tensor.data.float().clone()
    assert sorted(loaded) == (["bias", "weight"] if bias else ["weight"])
    method.process_after_load()
    for num_rows in (1, 3, 16, 33, 130):
        x = torch.randn(num_rows, inputs).to(dtype)
        expected = F.linear(x.float(), loaded["weight"], loaded.get("bias"))
        tolerance = 1e-4 if dtype is torch.float32 else 2e-2
        found = method.apply(x)
        assert found.dtype is dtype and found.shape == (num_rows, outputs)
        torch.testing.assert_close(found.float(), expected, atol=tolerance * inputs**0.5, rtol=tolerance)


@pytest.mark.parametrize("deterministic", [False, True])
def test_the_plain_copy_goes_when_it_is_packed(deterministic: bool) -> None:
    if not packing_pays(torch.float32, CPU, 512):
        pytest.skip("this build of PyTorch has no oneDNN")
    method = Unquantized().linear(make_spec(512, 512, torch.float32, deterministic=deterministic))
    plain = weakref.ref(method.tensors()[0].data)
    method.process_after_load()
    gc.collect()
    assert plain() is None
    assert method.weight_bytes() == (512 * 512 + 512) * 4


def test_a_tied_weight_stays_and_is_not_loaded() -> None:
    for inputs in (64, 512):
        table = torch.randn(100, inputs)
        method = Unquantized().linear(make_spec(inputs, 100, torch.float32, bias=False), table)
        assert method.tensors() == []
        method.process_after_load()
        x = torch.randn(3, inputs)
        torch.testing.assert_close(method.apply(x), x @ table.T, atol=1e-4, rtol=1e-4)
        packed = packing_pays(torch.float32, CPU, inputs)
        assert method.weight_bytes() == (table.nbytes if packed else 0)


def test_packing_is_for_cpus() -> None:
    assert not packing_pays(torch.float16, CPU, 4096)
    assert not packing_pays(torch.bfloat16, torch.device("cuda"), 4096)


def test_schemes() -> None:
    assert create_quantization(None).name == "none"
