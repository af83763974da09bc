"""Warm up as `serve --enforce-eager` does, then serve, and print which kernels would be compiled only then, one a line:
`python -m tests.worker.compiled_variants worker BACKEND DTYPE CHECKPOINT`, or `… sampling DTYPE` for two ranks that
share a vocabulary, or `… norms DTYPE` for norms alone, which few rows have in the product after them: one number of
rows stands for all, and `… experts DTYPE FORM`. No GPU is needed: launches note what they would compile; results are
whatever was in memory.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

import torch

import shoal.layers.activation
import shoal.layers.norm
import shoal.sampling.plan
from shoal.attention.registry import create_attention_backend
from shoal.config.quantization import read_quantization
from shoal.distributed.group import GroupCoordinator
from shoal.distributed.vocabulary import VocabularySlice
from shoal.kernels.moe_routing import softmax_top_k
from shoal.kernels.norm import add_rms_norm, rms_norm
from shoal.quantization import grouped_experts
from shoal.quantization.base import ExpertActivation, ExpertsSpec
from shoal.quantization.byte_experts import ByteExperts
from shoal.quantization.grouped_experts import GroupedExperts
from shoal.quantization.packed_experts import PackedExperts
from shoal.quantization.registry import create_quantization
from shoal.quantization.stacked_experts import StackedExperts
from shoal.sampling.rehearse import rehearse_sampling
from shoal.sampling.sampler import Sampler
from shoal.sampling.state import SamplingState
from shoal.types import SamplingParams
from shoal.worker import worker as worker_module
from tests.checkpoints import VOCAB_SIZE
from tests.kernels.offline import record_variants
from tests.rank_threads import on_ranks
from tests.worker.random_schedule import RandomSchedule, Request
from tests.worker.test_pipeline import Alone, make_config

NUM_SLOTS, NUM_BLOCKS, MAX_TOKENS, MAX_LEN = 140, 4000, 600, 512
# Most of a step are plain, so that other rows leave any number of plain ones.
PLAIN: list[dict] = [{"temperature": 0.0}, {"seed": 1}, {"seed": 2, "min_p": 0.1}]
OTHERS: list[dict] = [
    {"seed": 3, "top_p": 0.9},
    {"seed": 4, "top_k": 20, "min_p": 0.1},
    {"temperature": 0.0, "logprobs": 3},
    {"temperature": 0.0, "repetition_penalty": 1.3},
    {"seed": 5, "logit_bias": {3: 4.0}},
    {"seed": 6, "allowed_token_ids": [1, 2, 3]},
    {"seed": 7, "min_tokens": 2, "stop_token_ids": [7]},
]
VARIANTS: set[tuple[str, str]] = set()


def choose(generator: random.Random) -> dict:
    return generator.choice(PLAIN if generator.random() < 0.97 else OTHERS)


def serve(worker: Alone, generator: random.Random) -> None:
    requests = []
    for _ in range(300):
        num_outputs = generator.choice([1, 2, 5, 9])
        prompt = [generator.randrange(VOCAB_SIZE) for _ in range(generator.choice([1, 2, 15, 100, 400]))]
        requests.append(Request(prompt, SamplingParams(max_tokens=num_outputs, **choose(generator)), num_outputs))
    schedule = RandomSchedule(
        requests, num_slots=NUM_SLOTS, num_blocks=NUM_BLOCKS, block_size=16, max_tokens=MAX_TOKENS, seed=1
    )
    while (batch := schedule.next_batch()) is not None:
        worker.step(batch)
        schedule.take(worker.result())
    assert all(request.ended for request in requests)


def serve_a_worker(backend: str, dtype: str, checkpoint: str) -> None:
    worker_module.make_backend = lambda *_: create_attention_backend(backend)
    shoal.layers.norm.has_kernels = shoal.layers.activation.has_kernels = lambda _: True
    config = make_config(
        Path(checkpoint), 1, 1, dtype=dtype, deterministic=False, max_model_len=MAX_LEN, max_num_seqs=NUM_SLOTS,
        num_gpu_blocks_override=NUM_BLOCKS, max_num_batched_tokens=MAX_TOKENS,
    )  # fmt: skip
    worker = Alone(config)
    worker.worker.runner._rehearse_sampling()
    warm = set(VARIANTS)
    serve(worker, random.Random(1))
    report(warm)


def sample_on_two_ranks(dtype: str) -> None:
    def make_logits(group: GroupCoordinator, num_rows: int) -> torch.Tensor:
        return torch.zeros(num_rows, VocabularySlice(VOCAB_SIZE, group).width, dtype=getattr(torch, dtype))

    def rehearse(group: GroupCoordinator) -> None:
        state = SamplingState(NUM_SLOTS, VOCAB_SIZE, torch.device("cpu"), group)
        rehearse_sampling(Sampler(), state, NUM_SLOTS, lambda num_rows: make_logits(group, num_rows))

    def sample(group: GroupCoordinator) -> None:
        generator, sampler = random.Random(1), Sampler()
        for _ in range(100):
            num_rows = generator.choice([1, 2, 3, 5, 8, 20, 31, 32, 60, 128, NUM_SLOTS])
            state = SamplingState(NUM_SLOTS, VOCAB_SIZE, torch.device("cpu"), group)
            for slot in range(num_rows):
                state.assign(slot, SamplingParams(**choose(generator)), [1], 1)
            sampler.sample(make_logits(group, num_rows), state.prepare(list(range(num_rows)), [1] * num_rows))

    on_ranks(2, rehearse)
    warm = set(VARIANTS)
    on_ranks(2, sample)
    report(warm)


def normalise(dtype: str) -> None:
    weight = torch.ones(256, dtype=getattr(torch, dtype))

    def run(num_rows: int) -> None:
        x = torch.zeros(num_rows, 256, dtype=weight.dtype)
        rms_norm(x, weight, 1e-6)
        add_rms_norm(x, x, weight, 1e-6)

    run(64)
    warm = set(VARIANTS)
    for num_rows in (1, 2, 17, 100, 250, 272):
        run(num_rows)
    report(warm)


def multiply_by_experts(dtype: str, form: str) -> None:
    """One step stands for all, as it is compiled ahead. form: "plain", or a quant_method, with "fp8-block" for scales
    of blocks and "awq-32" for groups of which several are in a slab."""
    activation = ExpertActivation(
        apply=lambda gate_up: torch.nn.functional.silu(gate_up[:, :128]) * gate_up[:, 128:], kind="silu"
    )
    spec = ExpertsSpec(
        num_experts=12,
        hidden_size=256,
        intermediate_size=128,
        activation=activation,
        dtype=getattr(torch, dtype),
        device=torch.device("cpu"),
    )
    method: GroupedExperts = StackedExperts(spec)
    if form != "plain":
        quant_method, _, more = form.partition("-")
        group_size = int(more) if more.isdigit() else 128
        config = read_quantization(
            {"quant_method": quant_method, "bits": 4, "group_size": group_size, "zero_point": True}
            | ({"weight_block_size": [128, 128], "activation_scheme": "dynamic"} if more == "block" else {})
        )
        method = (PackedExperts if quant_method == "awq" else ByteExperts)(spec, create_quantization(config))
        for found in method.tensors():
            found.tensor.data.fill_(0 if found.tensor.suffix in ("qweight", "bias") else 1)
        method.process_after_load()

    def run(num_rows: int) -> None:
        x = torch.zeros(num_rows, 256, dtype=method.spec.dtype)
        method.apply(x, *softmax_top_k(torch.zeros(num_rows, 12, dtype=x.dtype), 4, True))

    grouped_experts.is_compiling_ahead = lambda: True
    for num_rows in (1, 16, 8192):
        run(num_rows)
    grouped_experts.is_compiling_ahead = lambda: False
    warm = set(VARIANTS)
    for num_rows in (1, 2, 3, 4, 5, 7, 8, 17, 31, 40, 61, 100, 250, 272, 601, 1000, 2047, 2100, 3000, 8000):
        run(num_rows)
    report(warm)


def report(warm: set[tuple[str, str]]) -> None:
    print(f"{len(warm)} at the start")
    for name, key in sorted(VARIANTS - warm):
        print(name, key)


if __name__ == "__main__":
    record_variants(VARIANTS)
    shoal.sampling.plan.has_kernels = lambda _: True
    programs = {
        "worker": serve_a_worker,
        "sampling": sample_on_two_ranks,
        "norms": normalise,
        "experts": multiply_by_experts,
    }
    programs[sys.argv[1]](*sys.argv[2:])
