"""Norms, activations and rotary embeddings: right, and in deterministic mode a matter of the row alone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from shoal.attention.registry import create_attention_backend
from shoal.config.rope import RopeConfig
from shoal.errors import ModelError
from shoal.layers.activation import activation, gated
from shoal.layers.context import BuildContext
from shoal.layers.norm import LayerNorm, RMSNorm
from shoal.layers.rotary import RotaryEmbedding

CPU = torch.device("cpu")


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_new", "relu"])
@pytest.mark.parametrize("width", [512, 100, 40000])
def test_deterministic_activations(name: str, width: int, threads: int) -> None:
    function = activation(name, deterministic=True)
    generator = torch.Generator().manual_seed(width)
    x = torch.randn(200 if width < 1000 else 5, 2 * width, generator=generator) * 3
    whole = gated(function, x)
    gate, up = x.chunk(2, dim=-1)
    # Kernels differ in the last bits of an exponential, which the gate and the other half then multiply.
    assert ((whole - gated(activation(name), x)).abs() <= 1e-6 * (gate * up).abs() + 1e-7).all()
    for first, last in ((0, 1), (3, 5), (1, len(x) - 1)):
        assert torch.equal(gated(function, x[first:last]), whole[first:last])


def test_unknown_activation() -> None:
    with pytest.raises(ModelError, match="activation 'tanhexp' is not supported; supported: silu, swish, relu"):
        activation("tanhexp")


@pytest.mark.parametrize("size", [64, 100, 896])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms(size: int, dtype: torch.dtype, threads: int) -> None:
    context = BuildContext(dtype=dtype, device=CPU, attention_backend=create_attention_backend("torch_paged"))
    rms, layer = RMSNorm(context, "a", size, 1e-6), LayerNorm(context, "b", size, 1e-5)
    for tensor in [*rms.checkpoint_tensors(), *layer.checkpoint_tensors()]:
        tensor.destination.normal_()
    x, residual = torch.randn(2, 300, size).to(dtype).unbind(0)
    normed, total = rms.add_and_norm(x, residual)
    assert torch.equal(total, x + residual) and torch.equal(rms(total), normed)
    assert rms.add_and_norm(x, None)[1] is x
    wide = total.float()
    expected = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6) * rms.weight.float()
    tolerance = 1e-5 if dtype is torch.float32 else 3e-2
    torch.testing.assert_close(normed.float(), expected, atol=tolerance, rtol=tolerance)
    for first, last in ((0, 1), (7, 9), (3, 20), (1, 299)):
        assert torch.equal(rms(total[first:last]), normed[first:last])
        assert torch.equal(layer(x[first:last]), layer(x)[first:last])


def test_rotation_keeps_lengths_and_relative_angles() -> None:
    rotary = RotaryEmbedding(RopeConfig(theta=10000.0, scaling=None, parameters={}), 16, 500, CPU)
    x = torch.randn(1, 2, 16).expand(400, -1, -1)
    turned = rotary.rotate(x, rotary.lookup(torch.arange(400)))
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(turned[0], x[0])
    products = torch.einsum("thd,thd->th", turned[:-7], turned[7:])
    torch.testing.assert_close(products, products[:1].expand_as(products), atol=1e-4, rtol=1e-4)


def test_a_row_turns_alike_in_any_company(threads: int) -> None:
    rotary = RotaryEmbedding(RopeConfig(theta=10000.0, scaling=None, parameters={}), 20, 500, CPU)
    x, positions = torch.randn(400, 13, 20), torch.randperm(500)[:400]
    whole = rotary.rotate(x, rotary.lookup(positions))
    for first, last in ((0, 1), (7, 9), (1, 399)):
        assert torch.equal(rotary.rotate(x[first:last], rotary.lookup(positions[first:last])), whole[first:last])


def test_half_precision_is_rotated_in_full() -> None:
    rotary = RotaryEmbedding(RopeConfig(theta=10000.0, scaling=None, parameters={}), 64, 5000, CPU)
    x, angles = torch.randn(8, 2, 64).bfloat16(), rotary.lookup(torch.arange(4000, 4008))
    assert torch.equal(rotary.rotate(x, angles), rotary.rotate(x.float(), angles).bfloat16())
    half = F.cosine_similarity(rotary.rotate(x, angles).float(), rotary.rotate(x.float(), angles), dim=-1)
    assert half.min() > 0.999
