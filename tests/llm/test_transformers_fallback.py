"""Families without a native file from end to end: LLM, its core and its ranks, against Transformers' own generate."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
import transformers

from shoal.errors import ModelError
from shoal.llm import LLM
from shoal.types import SamplingParams
from tests.models.other_families import make_other
from tests.models.remote_code import make_remote

OPTIONS = dict(device="cpu", dtype="float32", max_model_len=256, kv_cache_memory="16MiB")
NUM_TOKENS = 20


def prompts() -> list[list[int]]:
    generator = random.Random(7)
    return [[generator.randrange(3, 500) for _ in range(length)] for length in (1, 7, 33, 90)]


@torch.inference_mode()
def expected(path: Path, trust_remote_code: bool = False) -> list[list[int]]:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager", trust_remote_code=trust_remote_code
    ).eval()
    answers = []
    for prompt in prompts():
        output = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones((1, len(prompt)), dtype=torch.int64),
            do_sample=False,
            min_new_tokens=NUM_TOKENS,
            max_new_tokens=NUM_TOKENS,
            eos_token_id=None,
            pad_token_id=0,
        )
        answers.append(output[0, len(prompt) :].tolist())
    return answers


def answers(llm: LLM) -> list[list[int]]:
    params = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts()], params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


@pytest.mark.parametrize(
    ("name", "degrees"),
    [
        ("stablelm", {"tensor_parallel_size": 2}),
        ("olmo2", {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}),
        pytest.param("granite", {"pipeline_parallel_size": 2}, marks=pytest.mark.slow),
        pytest.param("gpt-neox", {"deterministic": True}, marks=pytest.mark.slow),
    ],
)
def test_tokens_are_those_of_transformers(tmp_path: Path, name: str, degrees: dict[str, object]) -> None:
    path = make_other(tmp_path, name)
    with LLM(str(path), **OPTIONS, **degrees) as llm:
        assert llm.config.model.model_impl == "transformers"
        assert answers(llm) == expected(path)


@pytest.mark.slow
def test_a_native_family_by_its_other_way(tmp_path: Path) -> None:
    path = make_other(tmp_path, "qwen2")
    with LLM(str(path), **OPTIONS, model_impl="transformers") as llm:
        assert llm.config.model.model_impl == "transformers"
        assert answers(llm) == expected(path)


def test_code_of_the_model(tmp_path: Path) -> None:
    path = make_remote(tmp_path / "plain")
    with LLM(str(path), **OPTIONS, trust_remote_code=True) as llm:
        assert answers(llm) == expected(path, trust_remote_code=True)


def test_what_attention_is_asked_for_ends_the_start(tmp_path: Path) -> None:
    path = make_remote(tmp_path, "argument")
    with pytest.raises(ModelError, match="gives attention an argument 'alibi'"):
        LLM(str(path), **OPTIONS, trust_remote_code=True)
