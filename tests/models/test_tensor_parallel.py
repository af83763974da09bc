"""Tensor parallelism: several ranks compute what one does, in every family; bit by bit in deterministic mode."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from shoal.config.model_path import embedded_model_path
from shoal.distributed.communicator import LargeReducer, PendingSum
from shoal.distributed.group import GroupCoordinator
from tests.checkpoints import VARIANTS, make_checkpoint, make_variant
from tests.models.paged import PagedModel, Sequence, random_tokens
from tests.rank_threads import ThreadCommunicator, on_ranks

# Eight heads, so that up to eight ranks share them; widths and vocabularies that do not divide evenly.
WIDE = {"num_attention_heads": 8, "hidden_size": 128}
EIGHT_RANKS: dict[str, tuple[str, dict]] = {
    "llama": ("llama", {**WIDE, "attention_bias": True, "mlp_bias": True, "vocab_size": 1003}),
    "llama-one-kv-head": ("llama", {**WIDE, "num_key_value_heads": 1, "tie_word_embeddings": True, "head_dim": 20}),
    "mistral": ("mistral", {**WIDE, "num_key_value_heads": 4, "sliding_window": 30, "vocab_size": 517}),
    "qwen2": ("qwen2", {**WIDE, "hidden_size": 512, "intermediate_size": 776, "vocab_size": 601}),
    "qwen3": ("qwen3", {**WIDE, "num_key_value_heads": 8, "vocab_size": 577, "tie_word_embeddings": True}),
    "opt": ("opt", {**WIDE, "vocab_size": 800, "activation_function": "gelu"}),
    "opt-350m-form": ("opt", {**WIDE, "word_embed_proj_dim": 24, "do_layer_norm_before": False, "vocab_size": 533}),
}
STEPS = [[(0, 40), (1, 3)], [(1, 1), (2, 60)], [(0, 1), (1, 20), (2, 1)]]


def run(model: PagedModel) -> torch.Tensor:
    """Logits of three sequences that enter, prefill in pieces and decode beside each other."""
    vocab_size = model.config.vocab_size
    sequences = [Sequence(random_tokens(80, seed, vocab_size)) for seed in range(3)]
    return torch.cat([rows for step in STEPS for rows in model.step([(sequences[i], count) for i, count in step])])


def assert_same_logits(found: torch.Tensor, expected: torch.Tensor) -> None:
    """But for roundings, which sums in another order make by the size of the logits (Gemma's reach 37)."""
    torch.testing.assert_close(found, expected, atol=max(1e-4, 1e-5 * float(expected.abs().max())), rtol=1e-5)


def logits_at(path: Path, size: int, backend: str, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """What each rank has after gathering."""
    return on_ranks(size, lambda group: run(PagedModel(path, backend, dtype=dtype, group=group)))


def through_stages(path: Path, group: GroupCoordinator, tokens: list[int]) -> torch.Tensor:
    """Logits of a prompt that goes through two stages of a model of three layers."""
    hidden = None
    for layers in (range(0, 2), range(2, 3)):
        stage = PagedModel(path, group=group, layer_range=layers)
        hidden = stage.hidden([(Sequence(tokens), len(tokens))], hidden)
    with torch.inference_mode():
        return stage.model.compute_full_logits(hidden)


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_and_four_ranks_compute_what_one_does(tmp_path: Path, variant: str) -> None:
    path = make_variant(tmp_path, variant)
    (expected,) = logits_at(path, 1, "torch_paged")
    for size in (2, 4):
        ranks = logits_at(path, size, "torch_paged")
        assert_same_logits(ranks[0], expected)
        assert all(torch.equal(rank, ranks[0]) for rank in ranks)


@pytest.mark.parametrize("variant", ["llama", "qwen3"])
def test_halves_that_are_summed_while_the_others_are_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variant: str
) -> None:
    path = make_checkpoint(tmp_path, variant)
    (expected,) = logits_at(path, 1, "torch_paged")
    monkeypatch.setattr("shoal.models.llama.OVERLAP_TOKENS", 2)
    monkeypatch.setattr(ThreadCommunicator, "overlaps", True)
    started = []
    start = ThreadCommunicator.start_all_reduce
    monkeypatch.setattr(
        ThreadCommunicator, "start_all_reduce", lambda self, x: (started.append(len(x)), start(self, x))[1]
    )
    for rank in logits_at(path, 2, "torch_paged"):
        assert_same_logits(rank, expected)
    assert {22, 21} <= set(started), "the first step has 43 tokens"


class StreamReducer(LargeReducer):
    """Sums as copy engines leave them: each rank has the stream of its own rows alone, results lie in two places that
    are taken in turn, and summands are of no more use. What is used too late is no number."""

    def __init__(self, group: GroupCoordinator) -> None:
        self._group = group
        self._slots: list[tuple[PendingSum, torch.Tensor]] = []
        self.calls: list[tuple[int, str]] = []

    def takes(self, x: torch.Tensor) -> bool:
        return x.shape[0] > 1

    takes_rows = takes

    def start(self, x: torch.Tensor) -> PendingSum:
        self.calls.append((x.shape[0], "sum"))
        return self._pending(x, self._sum(x))

    def own_rows(self, num_rows: int) -> slice:
        rank, size = self._group.rank_in_group, self._group.world_size
        return slice(rank * num_rows // size, (rank + 1) * num_rows // size)

    def start_add_norm(self, x, residual, weight, eps):
        self.calls.append((x.shape[0], "stream" if weight is None else "norm"))
        rows = self.own_rows(x.shape[0])
        assert residual.shape == x[rows].shape
        total = self._sum(x)[rows] + residual
        if weight is not None:
            residual.copy_(total)
            total = F.rms_norm(total, (x.shape[1],), weight, eps)
        whole = torch.zeros_like(x)
        whole[rows] = total
        return self._pending(x, self._sum(whole))

    def _sum(self, x: torch.Tensor) -> torch.Tensor:
        assert self._group.communicator is not None
        return self._group.communicator.all_reduce(x.clone())

    def _pending(self, x: torch.Tensor, result: torch.Tensor) -> PendingSum:
        if len(self._slots) == 2:
            pending, old = self._slots.pop(0)
            assert pending.is_over
            old.fill_(float("nan"))
        pending = PendingSum(result, lambda: x.fill_(float("nan")))
        self._slots.append((pending, result))
        return pending


@pytest.mark.parametrize("variant", ["llama", "qwen3", "qwen2-moe", "qwen3-moe", "mixtral", "phi3", "gemma"])
@pytest.mark.parametrize("size", [2, 4])
def test_halves_whose_sums_take_the_norm_with_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variant: str, size: int
) -> None:
    path = make_variant(tmp_path, variant)
    (expected,) = logits_at(path, 1, "torch_paged")
    monkeypatch.setattr("shoal.models.llama.OVERLAP_TOKENS", 4)

    def work(group: GroupCoordinator) -> tuple[torch.Tensor, list[tuple[int, str]]]:
        reducer = StreamReducer(group)
        group.attach_large(reducer)
        return run(PagedModel(path, group=group)), reducer.calls

    for logits, calls in on_ranks(size, work):
        assert_same_logits(logits, expected)
        # The first step has 43 tokens, the second 61, the third 22; two sums a layer.
        assert [count for count, _ in calls[:4]] == [22, 21, 22, 21] and {31, 30, 11} <= {count for count, _ in calls}
        assert {kind for _, kind in calls} == {"norm"}, "a single stage ends with a norm"


def test_norms_of_another_type_come_after_the_sum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma's weights of norms are fp32."""
    path = make_checkpoint(tmp_path, "gemma", dtype=torch.bfloat16)
    (expected,) = logits_at(path, 1, "torch_paged", torch.bfloat16)
    monkeypatch.setattr("shoal.models.llama.OVERLAP_TOKENS", 4)

    def work(group: GroupCoordinator) -> tuple[torch.Tensor, list[tuple[int, str]]]:
        reducer = StreamReducer(group)
        group.attach_large(reducer)
        return run(PagedModel(path, dtype=torch.bfloat16, group=group)), reducer.calls

    for logits, calls in on_ranks(2, work):
        assert (logits - expected).abs().mean() < 0.02 * expected.abs().mean()
        assert {kind for _, kind in calls} == {"sum"}


def test_a_stage_hands_on_a_stream_that_ranks_had_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_checkpoint(tmp_path, "llama", num_hidden_layers=3)
    tokens = random_tokens(50, seed=1)
    expected = PagedModel(path).logits(tokens, 50)
    monkeypatch.setattr("shoal.models.llama.OVERLAP_TOKENS", 4)

    def work(group: GroupCoordinator) -> tuple[torch.Tensor, list[tuple[int, str]]]:
        reducer = StreamReducer(group)
        group.attach_large(reducer)
        return through_stages(path, group, tokens), reducer.calls

    for logits, calls in on_ranks(2, work):
        assert_same_logits(logits, expected)
        assert [kind for _, kind in calls] == ["norm"] * 6 + ["stream"] * 2 + ["norm"] * 4


@pytest.mark.parametrize("variant", ["llama", "qwen3"])
def test_halves_of_two_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variant: str) -> None:
    """What a stage hands on is summed."""
    path = make_checkpoint(tmp_path, variant, num_hidden_layers=3)
    tokens = random_tokens(50, seed=1)
    expected = PagedModel(path).logits(tokens, 50)
    monkeypatch.setattr("shoal.models.llama.OVERLAP_TOKENS", 2)
    monkeypatch.setattr(ThreadCommunicator, "overlaps", True)
    for rank in on_ranks(2, lambda group: through_stages(path, group, tokens)):
        assert_same_logits(rank, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", EIGHT_RANKS)
def test_deterministic_bits_do_not_depend_on_the_degree(tmp_path: Path, form: str, dtype: torch.dtype) -> None:
    family, changes = EIGHT_RANKS[form]
    path = make_checkpoint(tmp_path, family, dtype=dtype, **changes)
    (expected,) = logits_at(path, 1, "deterministic", dtype)
    assert expected.shape[1] == changes.get("vocab_size", 512) and expected.isfinite().all()
    for size in (2, 4, 8):
        for rank in logits_at(path, size, "deterministic", dtype):
            assert torch.equal(rank, expected), size


def test_shoal_tiny_has_the_same_bits_on_all_degrees() -> None:
    path = embedded_model_path()
    (expected,) = logits_at(path, 1, "deterministic")
    (fast,) = logits_at(path, 1, "torch_paged")
    for size in (2, 4):
        assert torch.equal(logits_at(path, size, "deterministic")[0], expected)
        assert_same_logits(logits_at(path, size, "torch_paged")[0], fast)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gemma3", "phi3", "glm", "glm4", "opt"])
@pytest.mark.parametrize("tied", [True, False])
def test_stages_of_two_ranks(tmp_path: Path, family: str, tied: bool) -> None:
    """A tied head on a stage without the embedding reads its own slice of the table."""
    path = make_checkpoint(tmp_path, family, num_hidden_layers=3, tie_word_embeddings=tied, vocab_size=521)
    tokens = random_tokens(50, seed=1)
    expected = PagedModel(path).logits(tokens, 50)

    for rank in on_ranks(2, lambda group: through_stages(path, group, tokens)):
        assert_same_logits(rank, expected)


def test_ranks_share_the_weights(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "llama", vocab_size=1024, num_key_value_heads=4)
    (whole,) = on_ranks(1, lambda group: PagedModel(path, group=group).model.weight_bytes())
    norms = 5 * 64 * 4
    for size in (2, 4):
        shares = on_ranks(size, lambda group: PagedModel(path, group=group).model.weight_bytes())
        assert shares == [(whole - norms) // size + norms] * size


def test_a_step_takes_two_sums_a_layer_and_one_to_embed(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "llama")

    def work(group: GroupCoordinator) -> list[tuple[str, int]]:
        model = PagedModel(path, group=group)
        calls = group.communicator.calls  # type: ignore[union-attr]
        model.hidden([(Sequence([5, 6, 7]), 3)])
        return list(calls)

    assert on_ranks(2, work) == [[("all_reduce", 3 * 64 * 4)] * 5] * 2
