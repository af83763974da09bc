"""On a GPU: the same noise bits and tokens as on the CPU, and not one wait for the device in a step."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from shoal.sampling.logprobs import to_host
from shoal.sampling.random import noise_bits, token_hashes
from shoal.sampling.sampler import SampledTokens, Sampler
from shoal.sampling.state import SamplingState
from shoal.types import SamplingParams

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]

VOCAB_SIZE = 32_001
BATCH = [
    SamplingParams(temperature=0, logprobs=3),
    SamplingParams(seed=1),
    SamplingParams(seed=2, top_k=40, top_p=0.9),
    SamplingParams(seed=3, top_p=0.9, min_p=0.01, logprobs=0),
    SamplingParams(seed=4, repetition_penalty=1.2, frequency_penalty=0.3, presence_penalty=0.1),
    SamplingParams(seed=5, allowed_token_ids=[5, 6, 7], logit_bias={6: 2.0}),
    SamplingParams(seed=6, bad_words_token_ids=[1, 2], min_tokens=8, max_tokens=20, eos_token_ids=[3]),
    SamplingParams(seed=7, temperature=0.6, min_p=0.05),
]


@pytest.fixture
def never_waiting() -> Iterator[None]:
    """Any call that waits for the device is an error."""
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def run_steps(device: torch.device, batch: list[SamplingParams], num_steps: int) -> list[SampledTokens]:
    logits = torch.randn(num_steps, len(batch), VOCAB_SIZE, generator=torch.Generator().manual_seed(0)) * 3
    state, sampler, results = SamplingState(len(batch), VOCAB_SIZE, device), Sampler(), []
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("default")
    logits = logits.to(device)
    for slot, params in enumerate(batch):
        state.assign(slot, params, [9, 8, 7, 9], 2)
    sampler.sample(logits[0].clone(), state.prepare(list(range(len(batch))), [4] * len(batch)))
    torch.cuda.set_sync_debug_mode(mode)
    for step in range(num_steps):
        metadata = state.prepare(list(range(len(batch))), [4 + step] * len(batch))
        results.append(sampler.sample(logits[step].clone(), metadata))
        state.commit(metadata, results[-1].token_ids)
    return results


def test_noise_bits_are_those_of_the_cpu() -> None:
    keys = torch.randint(-(2**31), 2**31, (64,), dtype=torch.int64).to(torch.int32)
    on_cpu = noise_bits(keys, token_hashes(VOCAB_SIZE, torch.device("cpu")))
    on_gpu = noise_bits(keys.cuda(), token_hashes(VOCAB_SIZE, torch.device("cuda")))
    assert torch.equal(on_cpu, on_gpu.cpu())


def test_tokens_and_logprobs_are_those_of_the_cpu() -> None:
    on_cpu, on_gpu = (run_steps(torch.device(name), BATCH, 20) for name in ("cpu", "cuda"))
    for cpu, gpu in zip(on_cpu, on_gpu, strict=True):
        assert cpu.token_ids.tolist() == gpu.token_ids.tolist()
        assert cpu.logprobs is not None and gpu.logprobs is not None
        for one, other in zip(to_host(cpu.logprobs), to_host(gpu.logprobs), strict=True):
            assert (one is None) is (other is None)
            if one is not None and other is not None:
                assert one.token_ids == other.token_ids and one.rank == other.rank
                assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


def test_no_step_waits_for_the_device(never_waiting: None) -> None:
    run_steps(torch.device("cuda"), BATCH, 5)


def test_a_row_does_not_depend_on_the_others() -> None:
    batch = [params.clone(seed=100 + i) for i, params in enumerate(BATCH * 8)]
    state, sampler, device = SamplingState(64, VOCAB_SIZE, torch.device("cuda")), Sampler(), torch.device("cuda")
    for slot, params in enumerate(batch):
        state.assign(slot, params, [9, 8, 7, 9], 2)
    logits = torch.randn(64, VOCAB_SIZE, device=device) * 3

    def draw(rows: list[int]) -> list[int]:
        return sampler.sample(logits[rows], state.prepare(rows, [4] * len(rows))).token_ids.tolist()

    together = draw(list(range(64)))
    assert together == [draw([row])[0] for row in range(64)]
    order = torch.randperm(64).tolist()
    assert draw(order) == [together[row] for row in order]


def test_a_captured_choice_follows_its_inputs() -> None:
    """Greedy, drawn and min_p rows change places between two replays of one graph."""
    choose = pytest.importorskip("shoal.kernels.sampling").choose_tokens
    num_rows = 12
    logits = torch.randn(num_rows, VOCAB_SIZE, device="cuda").to(torch.bfloat16)
    temperatures, min_ps = torch.zeros(num_rows, device="cuda"), torch.zeros(num_rows, device="cuda")
    keys = torch.zeros(num_rows, dtype=torch.int32, device="cuda")
    choose(logits, temperatures, min_ps, keys, 0, VOCAB_SIZE)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _, found = choose(logits, temperatures, min_ps, keys, 0, VOCAB_SIZE)
    for step in range(6):
        logits.normal_().mul_(1 + step)
        temperatures.copy_(torch.tensor([0.0, 1.0, 0.7, 2.0] * 3).roll(step))
        min_ps.copy_(torch.tensor([0.0, 0.0, 0.1]).repeat(4).roll(step))
        keys.random_()
        graph.replay()
        _, expected = choose(logits, temperatures, min_ps, keys, 0, VOCAB_SIZE)
        assert found.tolist() == expected.tolist()
        greedy = temperatures == 0
        assert torch.equal(found[greedy], logits.argmax(dim=-1)[greedy])
