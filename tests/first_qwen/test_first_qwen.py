"""The first Qwen: against a reference written from its paper, its tokenizer's own code, chats."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from shoal.config.model_config import load_model_config
from shoal.config.resolve import make_engine_config
from shoal.distributed.group import GroupCoordinator
from shoal.engine.tokenizer import load_tokenizer
from shoal.errors import ModelError
from shoal.llm import LLM
from shoal.types.sampling_params import SamplingParams
from tests.first_qwen.reference import NUM_RANKS, SPECIAL_TOKENS, Reference, make_checkpoint
from tests.models.paged import PagedModel, random_tokens
from tests.rank_threads import on_ranks

TOLERANCE = 2e-4
TEXTS = ["What is the capital of France?", "北京是中国的首都。你好！", "a\n\n b  \t😀"]
LENGTH_TRAINED = 128


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("qwen"))


def same(logits: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(torch.log_softmax(logits, dim=-1), expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("backend", ["torch_paged", "deterministic"])
def test_logits_are_the_references(path: Path, backend: str) -> None:
    tokens = random_tokens(120, seed=1)
    expected = Reference(path).logprobs(tokens)
    model = PagedModel(path, backend, max_model_len=LENGTH_TRAINED)
    for chunk in (120, 33):
        same(model.logits(tokens, chunk), expected)


def test_beyond_the_trained_length(path: Path) -> None:
    """The stretch is that of max_model_len; a sequence that needs it all is the original's to the letter."""
    tokens = random_tokens(300, seed=2)
    model = PagedModel(path, max_model_len=300)
    for chunk in (300, 70):
        same(model.logits(tokens, chunk), Reference(path).logprobs(tokens))
    same(model.logits(tokens[:50], 50), Reference(path, longest=300).logprobs(tokens[:50]))


@pytest.mark.parametrize("max_model_len", [LENGTH_TRAINED, 256])
def test_two_ranks(path: Path, max_model_len: int) -> None:
    tokens = random_tokens(100, seed=3)
    expected = Reference(path, longest=max_model_len).logprobs(tokens)

    def run(group: GroupCoordinator) -> torch.Tensor:
        return PagedModel(path, group=group, max_model_len=max_model_len).logits(tokens, 40)

    for logits in on_ranks(2, run):
        same(logits, expected)


def test_what_the_config_says(path: Path, tmp_path: Path) -> None:
    config = load_model_config(path)
    assert (config.model_type, config.intermediate_size, config.max_position_embeddings) == ("qwen", 112, 512)
    assert make_engine_config(model=str(path)).max_model_len == LENGTH_TRAINED
    assert make_engine_config(model=str(path), max_model_len=512).max_model_len == 512
    with pytest.raises(ModelError, match="intermediate_size 225 is odd"):
        load_model_config(make_checkpoint(tmp_path / "odd", intermediate_size=225))
    with pytest.raises(ModelError, match=r"rotary_pct 0.5 is not supported"):
        load_model_config(make_checkpoint(tmp_path / "partial", rotary_pct=0.5))


def test_its_tokenizer_needs_trust(path: Path) -> None:
    with pytest.raises(ModelError, match="--trust-remote-code"):
        load_tokenizer(str(path))


def test_its_tokenizer(path: Path) -> None:
    tokenizer = load_tokenizer(str(path), trust_remote_code=True)
    assert tokenizer.vocab_size == NUM_RANKS + len(SPECIAL_TOKENS)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and max(ids) < NUM_RANKS
        pieces = tokenizer.detokenizer([])
        assert "".join([*(pieces.push([token_id]) for token_id in ids), pieces.flush()]) == text
    im_end = tokenizer.special_token_id("<|im_end|>")
    assert im_end == NUM_RANKS + 2 and tokenizer.end_token_ids == {im_end}
    assert tokenizer.encode("<|im_end|>") == [im_end]
    assert tokenizer.decode([*tokenizer.encode("hi"), im_end]) == "hi"


def test_its_chats(path: Path) -> None:
    """Rendered as the original's `make_context` does."""
    tokenizer = load_tokenizer(str(path), trust_remote_code=True)
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": "你好"}])
    assert rendered == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n你好<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("sizes", [(1, 1), (2, 1), (1, 2)])
def test_it_serves(path: Path, sizes: tuple[int, int]) -> None:
    tensor, pipeline = sizes
    prompts = [random_tokens(length, seed=5) for length in (3, 40, 17)]
    llm = LLM(
        model=str(path),
        trust_remote_code=True,
        tensor_parallel_size=tensor,
        pipeline_parallel_size=pipeline,
        num_gpu_blocks_override=64,
    )
    with llm:
        outputs = llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts],
            SamplingParams(temperature=0, max_tokens=8, ignore_eos=True),
        )
        chat = llm.chat([{"role": "user", "content": "hi"}], SamplingParams(temperature=0, max_tokens=4))
    reference = Reference(path)
    for prompt, output in zip(prompts, outputs, strict=True):
        tokens = list(prompt)
        for token in output.outputs[0].token_ids:
            assert token == int(reference.logprobs(tokens)[-1].argmax())
            tokens.append(token)
        assert len(tokens) == len(prompt) + 8
    assert chat[0].outputs[0].token_ids
