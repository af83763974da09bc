"""Deterministic mode: the bits of a token's logits do not depend on what it is computed with, or how."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.checkpoints import make_checkpoint
from tests.models.paged import PagedModel, Sequence, random_tokens

LENGTHS = (1, 3, 40, 95, 30, 140)
FORMS: dict[str, dict] = {
    "qwen2": {},
    "mistral": {"sliding_window": 30},
    "llama": {"num_key_value_heads": 4, "intermediate_size": 100},  # one query row a KV head; widths that leave rests
    "qwen3": {"num_key_value_heads": 1},
    "opt": {"activation_function": "gelu", "ffn_dim": 90},
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        family: make_checkpoint(tmp_path_factory.mktemp(family), family, **changes) for family, changes in FORMS.items()
    }


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Some kernels split their work differently when they have threads for it."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def alone(path: Path, dtype: torch.dtype) -> list[torch.Tensor]:
    """Each sequence by itself, its prompt in one piece."""
    model = PagedModel(path, "deterministic", dtype=dtype)
    return [model.logits(random_tokens(length, seed=5), chunk=length) for length in LENGTHS]


def together(model: PagedModel, choices: random.Random) -> list[torch.Tensor]:
    """All of them, entering in random order and advancing by random pieces, in steps with random mates."""
    sequences = [Sequence(random_tokens(length, seed=5)) for length in LENGTHS]
    rows: list[list[torch.Tensor]] = [[] for _ in LENGTHS]
    while unfinished := [i for i, s in enumerate(sequences) if s.num_computed < len(s.token_ids)]:
        chosen = choices.sample(unfinished, choices.randint(1, len(unfinished)))
        work = []
        for index in chosen:
            left = len(sequences[index].token_ids) - sequences[index].num_computed
            work.append((sequences[index], min(left, choices.choice([1, 1, 2, 5, 16, 33, 100]))))
        for index, logits in zip(chosen, model.step(work), strict=True):
            rows[index].append(logits)
    for sequence in sequences:
        model.release(sequence)
    return [torch.cat(pieces) for pieces in rows]


@pytest.mark.parametrize("family", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_composition_gives_the_same_bits(checkpoints: dict[str, Path], family: str, dtype: torch.dtype) -> None:
    expected = alone(checkpoints[family], dtype)
    for block_size in (4, 16):
        model = PagedModel(checkpoints[family], "deterministic", dtype=dtype, block_size=block_size)
        for seed in range(3):
            for found, wanted in zip(together(model, random.Random(seed)), expected, strict=True):
                assert torch.equal(found, wanted)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_threads_give_the_same_bits(checkpoints: dict[str, Path], family: str, two_threads: None) -> None:
    torch.set_num_threads(1)
    expected = alone(checkpoints[family], torch.float32)
    torch.set_num_threads(2)
    model = PagedModel(checkpoints[family], "deterministic")
    for found, wanted in zip(together(model, random.Random(1)), expected, strict=True):
        assert torch.equal(found, wanted)


def test_any_composition_at_random(checkpoints: dict[str, Path]) -> None:
    expected = alone(checkpoints["qwen2"], torch.float32)
    model = PagedModel(checkpoints["qwen2"], "deterministic")

    @settings(max_examples=15)
    @given(st.randoms(use_true_random=False))
    def check(choices: random.Random) -> None:
        for found, wanted in zip(together(model, choices), expected, strict=True):
            assert torch.equal(found, wanted)

    check()


def test_prefix_hit_gives_the_same_bits(checkpoints: dict[str, Path]) -> None:
    """A sequence reads blocks that another one computed, in other pieces."""
    model = PagedModel(checkpoints["qwen2"], "deterministic")
    tokens = random_tokens(100, seed=6)
    expected = model.logits(tokens, chunk=100)
    first = Sequence(tokens[:64] + random_tokens(20, seed=7))
    for num_new in (1, 30, 33, 20):
        model.step([(first, num_new)])
    second = Sequence(tokens, num_computed=64, blocks=list(first.blocks[:4]))
    (found,) = model.step([(second, 36)])
    assert torch.equal(found, expected[64:])


def test_the_fast_mode_is_not_what_is_compared(checkpoints: dict[str, Path]) -> None:
    """The check above can fail: without the mode, bits do depend on the composition."""
    model = PagedModel(checkpoints["qwen2"])
    tokens = random_tokens(140, seed=5)
    assert not torch.equal(model.logits(tokens, chunk=140), model.logits(tokens, chunk=1))
