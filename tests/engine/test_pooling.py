"""Embeddings and scores of the whole engine against Transformers: chunks, batches, prefix hits, ranks."""

from __future__ import annotations

import array
import random
from pathlib import Path

import pytest
import torch
import transformers
from torch.nn.functional import normalize

from shoal.config.engine_config import EngineConfig
from shoal.config.resolve import make_engine_config
from shoal.types import EngineRequest, FinishReason, PoolingParams, SamplingParams
from tests.checkpoints import make_checkpoint
from tests.engine.local_engine import Answer, run_engine
from tests.pooling_checkpoints import make_classifier, make_decoder, reference_scores, reference_states

VOCAB_SIZE = 512
LENGTHS = [1, 2, 7, 16, 17, 33, 64, 100, 129, 200, 256]
GRIDS = [(1, 1), (2, 1), (1, 2), (2, 2)]


def make_prompts() -> list[list[int]]:
    """The later half begin as an earlier one does."""
    generator = random.Random(3)
    prompts = [[generator.randrange(3, VOCAB_SIZE) for _ in range(length)] for length in LENGTHS]
    return prompts + [[*prompt[: len(prompt) * 3 // 4], generator.randrange(3, VOCAB_SIZE)] for prompt in prompts]


PROMPTS = make_prompts()


def make_config(path: Path, **options: object) -> EngineConfig:
    """Prompts in pieces, and a cache that holds two of the longest."""
    values: dict = {
        "model": str(path), "dtype": "float32", "device": "cpu", "max_model_len": 256, "max_num_seqs": 16,
        "max_num_batched_tokens": 80, "num_gpu_blocks_override": 40, "startup_timeout": 120, "step_timeout": 60,
        **options,
    }  # fmt: skip
    return make_engine_config(**values)


def make_requests(params: PoolingParams | None = None) -> list[EngineRequest]:
    sampling = SamplingParams(max_tokens=1)
    return [
        EngineRequest(f"r{index}", prompt, sampling, pooling=params or PoolingParams())
        for index, prompt in enumerate(PROMPTS)
    ]


def vector(answer: Answer) -> torch.Tensor:
    assert answer.pooled is not None and not answer.token_ids
    assert answer.finish_reasons == [FinishReason.STOP]
    return torch.tensor(array.array("f", answer.pooled))


def assert_same(answers: dict[str, Answer], wanted: list[torch.Tensor]) -> None:
    assert len(answers) == len(wanted)
    for index, each in enumerate(wanted):
        torch.testing.assert_close(vector(answers[f"r{index}"]), each, atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    made = {family: make_decoder(root / family, family) for family in ("llama", "qwen2", "mistral")}
    made["qwen3"] = make_decoder(root / "qwen3", "qwen3", tie_word_embeddings=False)
    for pooling in ("mean", "cls"):
        made[pooling] = make_decoder(root / pooling, "qwen3", pooling=pooling)
    made["score"] = make_classifier(root / "score", "qwen3")
    made["labels"] = make_classifier(root / "labels", "llama", num_labels=3)
    made["causal"] = make_checkpoint(root / "causal", "qwen3", tie_word_embeddings=False)
    made["tied"] = make_checkpoint(root / "tied", "qwen3", tie_word_embeddings=True)
    return made


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral", "qwen3"])
def test_a_bare_decoder_embeds_with_its_last_state(paths: dict[str, Path], family: str) -> None:
    config = make_config(paths[family])
    assert config.model.pooling is not None and config.enable_prefix_caching
    requests = make_requests()
    answers, stats = run_engine(config, requests[:11], requests[11:])
    assert_same(answers, [normalize(state[-1], dim=0) for state in reference_states(paths[family], PROMPTS)])
    assert stats.prefix_cache_hits_total > 0
    assert any(answers[f"r{index}"].num_cached_tokens for index in range(11, 22))


@pytest.mark.parametrize("grid", GRIDS[1:])
def test_embeddings_on_several_ranks(paths: dict[str, Path], grid: tuple[int, int]) -> None:
    config = make_config(paths["qwen3"], tensor_parallel_size=grid[0], pipeline_parallel_size=grid[1])
    answers, _ = run_engine(config, make_requests())
    assert_same(answers, [normalize(state[-1], dim=0) for state in reference_states(paths["qwen3"], PROMPTS)])


@pytest.mark.parametrize("grid", [(1, 1), (2, 2)])
@pytest.mark.parametrize("kind", ["mean", "cls"])
def test_pooling_of_all_tokens_over_chunks(paths: dict[str, Path], kind: str, grid: tuple[int, int]) -> None:
    """Without the prefix cache: what it holds are keys and values, not states. Nor is anything normalised here."""
    config = make_config(paths[kind], tensor_parallel_size=grid[0], pipeline_parallel_size=grid[1])
    assert not config.enable_prefix_caching
    answers, _ = run_engine(config, make_requests())
    states = reference_states(paths[kind], PROMPTS)
    assert_same(answers, [state.mean(0) if kind == "mean" else state[0] for state in states])


def test_dimensions_are_normalised_again(paths: dict[str, Path]) -> None:
    config = make_config(paths["qwen3"], hf_overrides={"is_matryoshka": True})
    states = [state[-1] for state in reference_states(paths["qwen3"], PROMPTS)]
    answers, _ = run_engine(config, make_requests(PoolingParams(dimensions=24)))
    assert_same(answers, [normalize(state[:24], dim=0) for state in states])
    answers, _ = run_engine(config, make_requests(PoolingParams(use_activation=False)))
    assert_same(answers, states)


def test_the_same_bits_in_any_company(paths: dict[str, Path]) -> None:
    """Deterministic mode: batch mates, chunks and ranks do not show."""
    alone, _ = run_engine(
        make_config(paths["qwen3"], deterministic=True, max_num_seqs=1, max_num_batched_tokens=512), make_requests()
    )
    together, _ = run_engine(make_config(paths["qwen3"], deterministic=True), make_requests())
    two, _ = run_engine(make_config(paths["qwen3"], deterministic=True, tensor_parallel_size=2), make_requests())
    for request_id, answer in alone.items():
        assert answer.pooled == together[request_id].pooled == two[request_id].pooled


@pytest.mark.parametrize("grid", GRIDS)
def test_scores_of_a_classifier(paths: dict[str, Path], grid: tuple[int, int]) -> None:
    config = make_config(paths["score"], tensor_parallel_size=grid[0], pipeline_parallel_size=grid[1])
    wanted = reference_scores(paths["score"], PROMPTS)
    answers, _ = run_engine(config, make_requests())
    assert_same(answers, [score.sigmoid() for score in wanted])


def test_scores_without_activation_and_of_several_labels(paths: dict[str, Path]) -> None:
    answers, _ = run_engine(make_config(paths["score"]), make_requests(PoolingParams(use_activation=False)))
    assert_same(answers, reference_scores(paths["score"], PROMPTS))
    answers, _ = run_engine(make_config(paths["labels"]), make_requests())
    assert_same(answers, [score.softmax(0) for score in reference_scores(paths["labels"], PROMPTS)])


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", ["causal", "tied"])
def test_scores_between_two_tokens(paths: dict[str, Path], name: str, grid: tuple[int, int]) -> None:
    """As rerankers made of generating models ask: the share of "yes" in the softmax over "no" and "yes"."""
    config = make_config(
        paths[name], tensor_parallel_size=grid[0], pipeline_parallel_size=grid[1],
        hf_overrides='{"classifier_from_token": [17, "a"]}',
    )  # fmt: skip
    assert config.model.pooling is not None and config.model.pooling.label_token_ids is not None
    yes = config.model.pooling.label_token_ids[1]
    model = transformers.AutoModelForCausalLM.from_pretrained(paths[name], dtype=torch.float32).eval()
    assert yes == transformers.AutoTokenizer.from_pretrained(paths[name]).convert_tokens_to_ids("a")
    with torch.inference_mode():
        logits = [model(torch.tensor([prompt])).logits[0, -1] for prompt in PROMPTS]
    answers, _ = run_engine(config, make_requests())
    assert_same(answers, [row[[17, yes]].softmax(0)[1:] for row in logits])


def test_a_generating_model_embeds_where_that_is_asked_for(paths: dict[str, Path]) -> None:
    """Its own head is neither built nor missed."""
    assert make_config(paths["causal"]).model.pooling is None
    config = make_config(paths["causal"], runner="pooling")
    answers, _ = run_engine(config, make_requests())
    assert_same(answers, [normalize(state[-1], dim=0) for state in reference_states(paths["causal"], PROMPTS)])


# --- on a GPU ----------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["last", "mean", "cls"])
def test_a_gpu_embeds_as_a_cpu(paths: dict[str, Path], kind: str) -> None:
    """Chunks, prefix hits, texts of one token."""
    path = paths["qwen3" if kind == "last" else kind]
    states = reference_states(path, PROMPTS)
    wanted = {
        "last": [normalize(state[-1], dim=0) for state in states],
        "mean": [state.mean(0) for state in states],
        "cls": [state[0] for state in states],
    }[kind]
    requests = make_requests()
    answers, stats = run_engine(make_config(path, device="cuda"), requests[:11], requests[11:])
    assert_same(answers, wanted)
    assert (stats.prefix_cache_hits_total > 0) == (kind == "last")


@pytest.mark.gpu
def test_a_gpu_scores_as_a_cpu(paths: dict[str, Path]) -> None:
    answers, _ = run_engine(make_config(paths["score"], device="cuda"), make_requests())
    assert_same(answers, [score.sigmoid() for score in reference_scores(paths["score"], PROMPTS)])
    answers, _ = run_engine(make_config(paths["labels"], device="cuda"), make_requests())
    assert_same(answers, [score.softmax(0) for score in reference_scores(paths["labels"], PROMPTS)])
    options = {"hf_overrides": {"classifier_from_token": [17, "a"]}}
    expected, _ = run_engine(make_config(paths["causal"], **options), make_requests())
    answers, _ = run_engine(make_config(paths["causal"], device="cuda", **options), make_requests())
    assert_same(answers, [vector(expected[f"r{index}"]) for index in range(len(PROMPTS))])


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "share"), [("bfloat16", 1.3), ("float16", 0.3)])
@pytest.mark.parametrize("kind", ["qwen3", "mean"])
def test_a_gpu_embeds_in_short_floats(paths: dict[str, Path], kind: str, dtype: str, share: float) -> None:
    """share: of the error that a CPU makes in bf16."""
    exact, _ = run_engine(make_config(paths[kind]), make_requests())
    rounded, _ = run_engine(make_config(paths[kind], dtype="bfloat16"), make_requests())
    answers, _ = run_engine(make_config(paths[kind], device="cuda", dtype=dtype), make_requests())
    errors = [
        torch.stack([vector(found[request_id]) - vector(exact[request_id]) for request_id in exact]).norm()
        for found in (answers, rounded)
    ]
    assert 0 < errors[0] < share * errors[1]


@pytest.mark.gpu
def test_the_same_bits_in_any_company_on_a_gpu(paths: dict[str, Path]) -> None:
    options = {"device": "cuda", "dtype": "bfloat16", "deterministic": True}
    alone, _ = run_engine(
        make_config(paths["qwen3"], max_num_seqs=1, max_num_batched_tokens=512, **options), make_requests()
    )
    together, _ = run_engine(make_config(paths["qwen3"], **options), make_requests())
    for request_id, answer in alone.items():
        assert answer.pooled == together[request_id].pooled
