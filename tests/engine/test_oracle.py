"""The engine against Hugging Face Transformers: greedy tokens and log-probabilities on random fp32 checkpoints."""

from __future__ import annotations

import random
from functools import lru_cache
from pathlib import Path

import pytest
import torch
import transformers

from shoal.config.engine_config import EngineConfig
from shoal.config.resolve import make_engine_config
from shoal.types import EngineRequest, SamplingParams
from shoal.worker.worker import Worker
from tests.checkpoints import make_checkpoint
from tests.engine.local_engine import run_engine

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "opt"]
LENGTHS = [1, 2, 3, 7, 15, 16, 17, 31, 33, 64, 100, 127, 129, 200, 255, 300]
NUM_OUTPUT = 12
VOCAB_SIZE = 512


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: make_checkpoint(tmp_path_factory.mktemp(family), family) for family in FAMILIES}


@lru_cache(maxsize=1)
def prompts() -> tuple[tuple[int, ...], ...]:
    """32 prompts of 1 to 300 tokens; the later half begins as the earlier one does, so that prefixes hit."""
    generator = random.Random(7)
    first = [[generator.randrange(VOCAB_SIZE) for _ in range(length)] for length in LENGTHS]
    second = [p[: max(1, len(p) * 2 // 3)] + [generator.randrange(VOCAB_SIZE) for _ in range(5)] for p in first]
    return tuple(tuple(p[:300]) for p in first + second)


@lru_cache(maxsize=8)
def reference(path: Path) -> list[tuple[list[int], list[list[float]]]]:
    """Per prompt: Transformers' greedy tokens, and the log-probabilities of each step's whole vocabulary."""
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    answers = []
    with torch.inference_mode():
        for prompt in prompts():
            ids, cache, tokens, rows = torch.tensor([prompt]), None, [], []
            for _ in range(NUM_OUTPUT):
                output = model(ids, past_key_values=cache, use_cache=True)
                cache = output.past_key_values
                rows.append(torch.log_softmax(output.logits[0, -1].float(), dim=-1).tolist())
                tokens.append(int(output.logits[0, -1].argmax()))
                ids = torch.tensor([[tokens[-1]]])
            answers.append((tokens, rows))
    return answers


def make_config(path: Path, **options: object) -> EngineConfig:
    values: dict = dict(model=str(path), dtype="float32", device="cpu", max_model_len=384, max_num_seqs=32)
    values.update(num_gpu_blocks_override=1200, max_num_batched_tokens=2048)
    values.update(options)
    return make_engine_config(**values)


def make_requests(count: int = 32, **sampling: object) -> list[EngineRequest]:
    params = SamplingParams(**{"temperature": 0.0, "max_tokens": NUM_OUTPUT, **sampling})  # type: ignore[arg-type]
    return [EngineRequest(f"r{index}", list(prompt), params) for index, prompt in enumerate(prompts()[:count])]


SETTINGS = {
    "whole prompts": {},
    "no prefix caching": {"enable_prefix_caching": False},
    "chunks of 16": {"max_num_batched_tokens": 48, "long_prefill_token_threshold": 16},
    "chunks of 7": {"max_num_batched_tokens": 33, "long_prefill_token_threshold": 7},
    "preempted": {"num_gpu_blocks_override": 26, "enable_prefix_caching": False},
    "preempted, chunked, cached": {"num_gpu_blocks_override": 26, "max_num_batched_tokens": 40},
    "one at a time": {"max_num_seqs": 1},
    "blocks of 8, synchronous": {"block_size": 8, "async_scheduling": False},
    "deterministic": {"deterministic": True},
    "deterministic, chunked": {"deterministic": True, "max_num_batched_tokens": 50},
}


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("setting", SETTINGS)
def test_greedy_tokens_equal_transformers(checkpoints: dict[str, Path], family: str, setting: str, device: str) -> None:
    path, options = checkpoints[family], SETTINGS[setting]
    answers, stats = run_engine(make_config(path, device=device, **options), make_requests())
    if setting.startswith("preempted"):
        assert stats.num_preemptions_total > 0
    for index, (tokens, _) in enumerate(reference(path)):
        assert answers[f"r{index}"].token_ids == tokens, f"prompt of {len(prompts()[index])} tokens"


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("setting", ["whole prompts", "chunks of 7", "preempted"])
def test_what_other_requests_left_in_the_cache_does_not_matter(
    checkpoints: dict[str, Path], setting: str, deterministic: bool
) -> None:
    """Not even if it is no number: one request that overflows must not spoil those that get its blocks."""

    def poison(worker: Worker) -> None:
        for kv_cache in worker.runner.kv_caches:
            kv_cache.fill_(float("nan"))
            worker.runner.backend.clear_blocks(kv_cache, torch.tensor([0]))  # the null block belongs to nobody

    for family in ("qwen2", "mistral"):
        config = make_config(checkpoints[family], deterministic=deterministic, **SETTINGS[setting])
        answers, _ = run_engine(config, make_requests(), after_start=poison)
        for index, (tokens, _) in enumerate(reference(checkpoints[family])):
            assert answers[f"r{index}"].token_ids == tokens


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("family", FAMILIES)
def test_log_probabilities_equal_transformers(checkpoints: dict[str, Path], family: str, device: str) -> None:
    path = checkpoints[family]
    answers, _ = run_engine(make_config(path, device=device, max_num_batched_tokens=100), make_requests(logprobs=5))
    for index, (tokens, rows) in enumerate(reference(path)):
        for token, row, entry in zip(tokens, rows, answers[f"r{index}"].logprobs, strict=True):
            assert entry.token_ids[0] == token and entry.rank == 1
            assert entry.logprobs[0] == pytest.approx(row[token], abs=1e-4)
            assert entry.logprobs[1:] == pytest.approx(sorted(row, reverse=True)[:5], abs=1e-4)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_prompt_log_probabilities_equal_transformers(checkpoints: dict[str, Path], family: str, device: str) -> None:
    path = checkpoints[family]
    requests = make_requests(prompt_logprobs=2, max_tokens=1)
    answers, _ = run_engine(make_config(path, device=device, max_num_batched_tokens=77), requests)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    for index, prompt in enumerate(prompts()):
        with torch.inference_mode():
            rows = torch.log_softmax(model(torch.tensor([prompt])).logits[0].float(), dim=-1)
        entries = answers[f"r{index}"].prompt_logprobs
        assert entries is not None and entries[0] is None and len(entries) == len(prompt)
        for position, entry in enumerate(entries[1:], start=1):
            assert entry is not None and entry.token_ids[0] == prompt[position]
            assert entry.logprobs[0] == pytest.approx(float(rows[position - 1][prompt[position]]), abs=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_on_the_gpu_rounds_no_more_than_transformers(checkpoints: dict[str, Path], family: str) -> None:
    """Log-probabilities of the prompt's own tokens, free of any choice, against fp32: ours and theirs in bfloat16."""
    path = checkpoints[family]
    answers, _ = run_engine(
        make_config(path, device="cuda", dtype="bfloat16"), make_requests(prompt_logprobs=0, max_tokens=1)
    )
    exact = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    rounded = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval().to("cuda")
    ours, theirs = [], []
    for index, prompt in enumerate(prompts()):
        ids, targets = torch.tensor([prompt]), torch.tensor(prompt[1:])
        with torch.inference_mode():
            truth, other = (
                torch.log_softmax(model(ids.to(model.device)).logits[0, :-1].float().cpu(), dim=-1)
                .gather(1, targets[:, None])[:, 0]
                .tolist()
                for model in (exact, rounded)
            )
        entries = [entry.logprobs[0] for entry in answers[f"r{index}"].prompt_logprobs or [] if entry is not None]
        ours += [abs(a - b) for a, b in zip(entries, truth, strict=True)]
        theirs += [abs(a - b) for a, b in zip(other, truth, strict=True)]
    assert len(ours) > 1000
    assert sum(ours) < 1.25 * sum(theirs)


def test_deterministic_sampling_does_not_depend_on_company(checkpoints: dict[str, Path]) -> None:
    """Bits, not just tokens: log-probabilities of sampled tokens are equal alone, in company, and on a prefix hit."""
    path = checkpoints["qwen2"]
    config = make_config(path, deterministic=True)
    params = SamplingParams(temperature=0.9, top_p=0.95, seed=11, max_tokens=20, logprobs=3)
    probe = [prompts()[13], prompts()[20]]
    company = [
        EngineRequest(f"c{i}", list(p), SamplingParams(seed=i, max_tokens=25)) for i, p in enumerate(prompts()[:31])
    ]
    runs = []
    for others in ([], company[:7], company):
        for prompt in probe:
            request = EngineRequest("probe", list(prompt), params)
            again = EngineRequest("again", list(prompt), params)
            answers, _ = run_engine(config, [request, *others], [again])
            assert answers["again"].num_cached_tokens > 0 or len(prompt) <= config.block_size
            runs += [(prompt, answers[name].token_ids, answers[name].logprobs) for name in ("probe", "again")]
    for prompt in probe:
        mine = [(tokens, logprobs) for owner, tokens, logprobs in runs if owner == prompt]
        assert len(mine) == 6 and all(run == mine[0] for run in mine)
