"""Adapters beside a linear layer: each token gets its own one's product, whatever the others would make of it."""

from __future__ import annotations

import torch

from shoal.layers.linear import Part
from shoal.layers.lora import AdaptedLinear, AdapterSlots
from shoal.quantization.base import LinearSpec
from shoal.quantization.unquantized import Unquantized

INPUTS, OUTPUTS, NAME = 32, 24, "layer"


def make(dtype: torch.dtype) -> tuple[AdapterSlots, AdaptedLinear, torch.Tensor]:
    """Two places of rank 4, the layer, and its weight."""
    generator = torch.Generator().manual_seed(1)
    weight = (torch.randn(OUTPUTS, INPUTS, generator=generator) / 8).to(dtype)
    spec = LinearSpec(
        in_features=INPUTS,
        out_features=OUTPUTS,
        bias=False,
        dtype=dtype,
        device=torch.device("cpu"),
        deterministic=False,
        all_in_features=INPUTS,
        names=(NAME,),
        part_sizes=(OUTPUTS,),
    )
    slots = AdapterSlots(2, 4, 16, dtype, torch.device("cpu"))
    method = Unquantized().linear(spec, weight)
    layer = slots.adapt(method, spec, [Part(NAME, OUTPUTS, slice(0, OUTPUTS))], slice(0, INPUTS))
    layer.process_after_load()
    return slots, layer, weight


def test_each_token_has_its_own() -> None:
    slots, layer, weight = make(torch.float32)
    adapters = [(torch.randn(rank, INPUTS), torch.randn(OUTPUTS, rank)) for rank in (4, 2)]
    for slot, adapter in enumerate(adapters):
        assert slots.fill(slot, {NAME: adapter}) == {NAME}
    x = torch.randn(5, INPUTS)
    slots.is_used = True
    slots.put_tokens(torch.tensor([1, -1, 0, 1, 0]))
    wanted = x @ weight.t()
    for row, slot in ((0, 1), (2, 0), (3, 1), (4, 0)):
        down, up = adapters[slot]
        wanted[row] += up @ (down @ x[row])
    torch.testing.assert_close(layer.apply(x), wanted, atol=1e-4, rtol=1e-4)


def test_what_overflows_in_another_adapter_is_not_in_the_way() -> None:
    """Products with all adapters are made for every token; one may be infinite on a token that is not its own."""
    slots, layer, weight = make(torch.float16)
    slots.fill(0, {NAME: (torch.full((4, INPUTS), 3e4).half(), torch.ones(OUTPUTS, 4).half())})
    slots.fill(1, {NAME: (torch.zeros(4, INPUTS).half(), torch.zeros(OUTPUTS, 4).half())})
    x = torch.ones(2, INPUTS).half()
    assert not (x @ layer.down.t()).isfinite().all()
    slots.is_used = True
    slots.put_tokens(torch.tensor([1, -1]))
    torch.testing.assert_close(layer.apply(x), x @ weight.t())
