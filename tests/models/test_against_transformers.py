"""Every family and form against Hugging Face Transformers: log-probabilities and greedy tokens in fp32."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
import transformers

from shoal.attention.base import AttentionRefusal
from tests.checkpoints import VARIANTS, make_variant
from tests.models.paged import PagedModel, Sequence, random_tokens

TOLERANCE = 1e-4


class Oracle:
    """A checkpoint and Transformers' answers to it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._model = transformers.AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, attn_implementation="eager"
        ).eval()

    @property
    def caps_attention(self) -> bool:
        return getattr(self._model.config, "attn_logit_softcapping", None) is not None

    @torch.inference_mode()
    def logprobs(self, token_ids: list[int]) -> torch.Tensor:
        return torch.log_softmax(self._model(torch.tensor([token_ids])).logits[0].float(), dim=-1)


@pytest.fixture(scope="module", params=list(VARIANTS))
def oracle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    return Oracle(make_variant(tmp_path_factory.mktemp(request.param), request.param))


def assert_same(logits: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(torch.log_softmax(logits, dim=-1), expected, atol=TOLERANCE, rtol=1e-5)


@pytest.mark.parametrize("backend", ["torch_paged", "reference", "deterministic"])
def test_prefill_whole_and_in_chunks(oracle: Oracle, backend: str) -> None:
    if backend == "deterministic" and oracle.caps_attention:
        with pytest.raises(AttentionRefusal, match="caps no logits"):
            PagedModel(oracle.path, backend)
        return
    model = PagedModel(oracle.path, backend)
    tokens = random_tokens(150, seed=1)
    expected = oracle.logprobs(tokens)
    for chunk in (150, 64, 31, 7) if backend == "torch_paged" else (150, 49):
        assert_same(model.logits(tokens, chunk), expected)


def test_mixed_batches(oracle: Oracle) -> None:
    """Sequences of 1 to 300 tokens enter one by one, in pieces of random size, beside others that decode."""
    model = PagedModel(oracle.path, block_size=8)
    generator = random.Random(3)
    sequences = [Sequence(random_tokens(length, seed=2)) for length in (1, 2, 300, 17, 33, 5, 128)]
    found: dict[int, list[torch.Tensor]] = {index: [] for index in range(len(sequences))}
    started = 1
    while any(sequence.num_computed < len(sequence.token_ids) for sequence in sequences):
        work, indices = [], []
        for index, sequence in enumerate(sequences[:started]):
            left = len(sequence.token_ids) - sequence.num_computed
            if left > 0:
                work.append((sequence, min(left, generator.choice([1, 1, 13, 60]))))
                indices.append(index)
        started = min(len(sequences), started + 1)
        if work:
            for index, logits in zip(indices, model.step(work), strict=True):
                found[index].append(logits)
    for index, sequence in enumerate(sequences):
        assert_same(torch.cat(found[index]), oracle.logprobs(sequence.token_ids))


def test_greedy_tokens(oracle: Oracle) -> None:
    """A batch decodes together; every token is Transformers' own choice after the tokens before it."""
    model = PagedModel(oracle.path)
    lengths = [1, 15, 16, 70]
    sequences = [Sequence(random_tokens(length, seed=4)) for length in lengths]
    rows = [logits[-1] for logits in model.step([(sequence, len(sequence.token_ids)) for sequence in sequences])]
    for _ in range(12):
        for sequence, row in zip(sequences, rows, strict=True):
            sequence.token_ids.append(int(row.argmax()))
        rows = [logits[-1] for logits in model.step([(sequence, 1) for sequence in sequences])]
    for length, sequence in zip(lengths, sequences, strict=True):
        chosen = oracle.logprobs(sequence.token_ids).argmax(dim=-1).tolist()
        assert sequence.token_ids[length:] == chosen[length - 1 : -1]
