"""BERT, RoBERTa and XLM-RoBERTa of the whole engine against Transformers: whole texts in a step, batches, ranks."""

from __future__ import annotations

import array
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.nn.functional import normalize

from shoal.config.engine_config import EngineConfig
from shoal.config.resolve import make_engine_config
from shoal.errors import ConfigError, ModelError
from shoal.types import EngineRequest, PoolingParams, SamplingParams
from tests.engine.local_engine import Answer, run_engine
from tests.pooling_checkpoints import make_encoder, reference_states, write_modules

VOCAB_SIZE = 512
LENGTHS = [1, 2, 7, 16, 17, 33, 64, 100, 129, 200, 256, 9, 8, 7, 7]
GRIDS = [(1, 1), (2, 1), (1, 2), (2, 2)]
FAMILIES = ["bert", "roberta", "xlm-roberta"]
_GENERATOR = random.Random(3)
PROMPTS = [[_GENERATOR.randrange(3, VOCAB_SIZE) for _ in range(length)] for length in LENGTHS]


def make_config(path: Path, **options: Any) -> EngineConfig:
    values: dict[str, Any] = {
        "model": str(path), "device": "cpu", "max_num_seqs": 8, "max_num_batched_tokens": 300, "max_model_len": 256,
        "startup_timeout": 120, "step_timeout": 60, **options,
    }  # fmt: skip
    return make_engine_config(**values)


def run(config: EngineConfig, prompts: list[list[int]], first_segments: list[int | None] | None = None) -> list[Any]:
    requests = [
        EngineRequest(
            f"r{index}",
            prompt,
            SamplingParams(max_tokens=1),
            pooling=PoolingParams(first_segment=first_segments[index] if first_segments else None),
        )
        for index, prompt in enumerate(prompts)
    ]
    answers, _ = run_engine(config, requests)
    return [vector(answers[f"r{index}"]) for index in range(len(prompts))]


def vector(answer: Answer) -> torch.Tensor:
    assert answer.pooled is not None
    return torch.tensor(array.array("f", answer.pooled))


def assert_same(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> None:
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    made = {family: make_encoder(root / family, family) for family in FAMILIES}
    made |= {f"{family}-score": make_encoder(root / f"{family}-score", family, num_labels=1) for family in FAMILIES}
    return made


def check_embeddings(path: Path, family: str, **options: Any) -> None:
    config = make_config(path, **options)
    assert config.model.max_position_embeddings == (258 if family == "bert" else 257)
    assert not config.enable_prefix_caching and not config.enable_chunked_prefill
    assert_same(run(config, PROMPTS), [normalize(state[0], dim=0) for state in reference_states(path, PROMPTS)])


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings(paths: dict[str, Path], family: str, grid: tuple[int, int]) -> None:
    check_embeddings(paths[family], family, tensor_parallel_size=grid[0], pipeline_parallel_size=grid[1])


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_a_gpu_embeds_and_scores_as_a_cpu(paths: dict[str, Path], family: str) -> None:
    check_embeddings(paths[family], family, device="cuda", dtype="float32")
    check_scores(paths[f"{family}-score"], family, device="cuda", dtype="float32")


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "share"), [("bfloat16", 1.3), ("float16", 0.3)])
def test_a_gpu_embeds_in_short_floats(paths: dict[str, Path], dtype: str, share: float) -> None:
    """share: of the error that a CPU makes in bf16."""
    exact = torch.stack(run(make_config(paths["bert"], dtype="float32"), PROMPTS))
    rounded = torch.stack(run(make_config(paths["bert"], dtype="bfloat16"), PROMPTS))
    found = torch.stack(run(make_config(paths["bert"], dtype=dtype, device="cuda"), PROMPTS))
    assert 0 < (found - exact).norm() < share * (rounded - exact).norm()
    assert not torch.backends.cuda.cudnn_sdp_enabled(), "it plans anew for each number and length of texts"


@pytest.mark.parametrize("mode", ["mean", "lasttoken"])
def test_pooling_as_sentence_transformers_say(tmp_path: Path, mode: str) -> None:
    path = make_encoder(tmp_path, "bert")
    write_modules(path, mode, "Normalize")
    (path / "sentence_bert_config.json").write_text('{"max_seq_length": 200}')
    assert make_config(path, max_model_len=None).max_model_len == 200
    states = reference_states(path, PROMPTS)
    wanted = [normalize(state.mean(0) if mode == "mean" else state[-1], dim=0) for state in states]
    assert_same(run(make_config(path), PROMPTS), wanted)


def check_scores(path: Path, family: str, **options: Any) -> None:
    """With segments where the family tells them apart, and without where it does not."""
    config = make_config(path, **options)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32).eval()
    firsts: list[int | None] = [None if index % 3 == 0 else (len(p) + 1) // 2 for index, p in enumerate(PROMPTS)]
    wanted = []
    with torch.inference_mode():
        for prompt, first in zip(PROMPTS, firsts, strict=True):
            types = torch.zeros((1, len(prompt)), dtype=torch.int64)
            if family == "bert" and first is not None:
                types[0, first:] = 1
            wanted.append(model(torch.tensor([prompt]), token_type_ids=types).logits[0].sigmoid())
    assert_same(run(config, PROMPTS, firsts), wanted)
    if family == "bert":  # the segments are not without effect
        assert any(abs(a - b) > 1e-3 for a, b in zip(run(config, PROMPTS), wanted, strict=True))


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_scores(paths: dict[str, Path], family: str, grid: tuple[int, int]) -> None:
    check_scores(paths[f"{family}-score"], family, tensor_parallel_size=grid[0], pipeline_parallel_size=grid[1])


def test_checkpoints_of_another_purpose_and_of_old(paths: dict[str, Path], tmp_path: Path) -> None:
    """A prefix, a head for masked words, a pooler, TensorFlow's names of norms, positions as a tensor."""
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_text((paths["bert"] / name).read_text())
    tensors = {}
    for name, tensor in load_file(paths["bert"] / "model.safetensors").items():
        old = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        tensors[f"bert.{old}"] = tensor
    tensors["bert.embeddings.position_ids"] = torch.arange(258).unsqueeze(0)
    tensors["cls.predictions.bias"] = torch.zeros(VOCAB_SIZE)
    save_file(tensors, tmp_path / "model.safetensors")
    wanted = [normalize(state[0], dim=0) for state in reference_states(paths["bert"], PROMPTS[:3])]
    assert_same(run(make_config(tmp_path), PROMPTS[:3]), wanted)


def test_what_encoders_refuse(paths: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="BertModel has no head to generate with"):
        make_config(paths["bert"], runner="generate")
    with pytest.raises(ConfigError, match="deterministic mode is for decoders"):
        make_config(paths["bert"], deterministic=True)
    with pytest.raises(ConfigError, match=r"max_num_batched_tokens \(100\) must be at least max_model_len \(256\)"):
        make_config(paths["bert"], max_num_batched_tokens=100)
    with pytest.raises(ModelError, match="position_embedding_type 'relative_key' is not supported"):
        make_config(make_encoder(tmp_path, "bert"), hf_overrides={"position_embedding_type": "relative_key"})
