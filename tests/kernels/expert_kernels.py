"""Print the shared memory, in bytes, and the bytes of a thread's stack (registers that did not suffice) of the kernels
of quantized experts, compiled for a GPU that need not be there: `python -m tests.kernels.expert_kernels CAPABILITY`."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from typing import Any

import torch
import triton
from triton.runtime.jit import JITFunction

import shoal.kernels.expert_weights as expert_weights
import shoal.kernels.moe as moe
import shoal.kernels.packed_experts as packed_experts
from shoal.kernels.expert_weights import ExpertWeight
from shoal.kernels.moe_routing import PairOrder
from shoal.kernels.packed_experts import PackedExpertWeight
from shoal.kernels.packed_weight import slab_inputs
from tests.kernels.offline import compile_only

E, F, H = 8, 768, 2048


def byte_weight(capability: int, form: str, rows: int, inputs: int, kind: int) -> ExpertWeight:
    fp8 = torch.float8_e4m3fn if capability >= 89 else torch.uint8
    weight = torch.zeros(E, rows, inputs, dtype=torch.int8 if form == "int8" else fp8)
    block = (128, 128) if form == "fp8-block" else None
    scales = torch.zeros(E, rows) if block is None else torch.zeros(E, rows // 128, inputs // 128)
    return ExpertWeight(weight=weight, scales=scales, block=block, kind=kind)


def packed_weight(bits: int, group: int, zeros: bool, rows: int, inputs: int, kind: int) -> PackedExpertWeight:
    slab = slab_inputs(bits)
    scales = torch.zeros(E, inputs // group, rows, dtype=torch.float16)
    return PackedExpertWeight(
        words=torch.zeros(E, inputs // slab, rows, 16, dtype=torch.int32), scales=scales,
        zeros=scales.to(torch.uint8) if zeros else None, bits=bits, group_size=group, num_inputs=inputs, kind=kind,
    )  # fmt: skip


def stack_bytes(kernel: Any) -> int:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"STACK:(\d+)", usage)
    assert found is not None, usage
    return int(found[1])


def main(capability: int) -> None:
    label = ""
    compile_only(
        capability,
        lambda name, kernel: print(f"{label}, {name}: {kernel.metadata.shared} {stack_bytes(kernel)}", flush=True),
    )
    compile_for = JITFunction.run
    expert_weights.has_wgmma = packed_experts.has_wgmma = lambda device: capability // 10 == 9

    def run(kernel: Any, *arguments: Any, **options: Any) -> None:
        """Tensors are on the CPU, kernels those of the GPU."""
        options |= {name: True for name in ("ASSEMBLES", "ASSEMBLY") if name in options}
        if capability >= 90:
            options |= {"DEPENDENT": True, "launch_pdl": True}
        compile_for(kernel, *arguments, **options)

    JITFunction.run = run  # type: ignore[method-assign]
    ids, weights, tokens = torch.zeros(2, 8, dtype=torch.int32), torch.zeros(2, 8), torch.zeros(E, dtype=torch.int64)
    order = PairOrder(*(torch.zeros(16, dtype=torch.int32) for _ in range(4)))
    x, hidden = torch.zeros(2, H, dtype=torch.bfloat16), torch.zeros(16, F, dtype=torch.bfloat16)
    cases: list[tuple[str, Any, Any, Any]] = [
        (form, moe, byte_weight(capability, form, 2 * F, H, 1), byte_weight(capability, form, H, F, 0))
        for form in ("fp8-channel", "fp8-block", "int8")
    ]
    # The second product may have smaller groups, which ranks cut, and other bits.
    for bits, group, down_bits, down_group, zeros in (
        (4, 128, 4, 128, False),
        (4, 128, 4, 128, True),
        (4, 128, 4, 32, True),
        (4, 32, 4, 32, True),
        (8, 64, 8, 32, True),
        (8, 64, 4, 64, False),
    ):
        gate_up = packed_weight(bits, group, zeros, 2 * F, H, 1)
        down = packed_weight(down_bits, down_group, zeros, H, F, 0)
        form = f"{bits} and {down_bits} bits by {group} and {down_group}{' with zeros' * zeros}"
        cases.append((form, packed_experts, gate_up, down))
    for form, products, gate_up, down in cases:
        label = f"{form}, few"
        products.few_up(x, gate_up, ids, tokens)
        products.few_down(hidden, down, ids, weights)
        leading = min(gate_up, down, key=lambda product: getattr(product, "has_whole_slabs", True))
        for tiles in leading.every_tiles(torch.bfloat16):
            label = f"{form}, blocks of {tiles.block_m} by {tiles.block_n}, up"
            products.grouped_matmul(x, gate_up.apart() if tiles.gates_apart else gate_up, order, 16, 8, tiles)
            label = f"{form}, blocks of {tiles.block_m} by {tiles.block_n}, down"
            products.grouped_matmul(hidden, down, order, 16, 1, tiles)


if __name__ == "__main__":
    main(int(sys.argv[1]))
