"""Embedding and head split along the vocabulary: exact, padded where it does not divide, tied or not."""

from __future__ import annotations

import pytest
import torch

from shoal.distributed.group import GroupCoordinator
from shoal.layers.embedding import LogitsHead, VocabularyEmbedding
from tests.layers.test_linear import make_context
from tests.rank_threads import on_ranks


@pytest.mark.parametrize("vocab_size", [1, 64, 101, 128, 1000])
@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
def test_slices_join_to_the_whole(vocab_size: int, size: int, dtype: torch.dtype, tied: bool) -> None:
    table, other = torch.randn(2, vocab_size, 16).to(dtype).unbind(0)
    ids, hidden = torch.randint(vocab_size, (30,)), torch.randn(5, 16).to(dtype)

    def work(group: GroupCoordinator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        context = make_context(dtype, group.world_size, group.rank_in_group, group=group)
        embedding = VocabularyEmbedding(context, "embed", vocab_size, 16)
        head = LogitsHead(context, "head", vocab_size, 16, embedding if tied else None)
        for tensor in (*embedding.checkpoint_tensors(), *head.checkpoint_tensors()):
            assert tensor.shape == (vocab_size, 16)
            tensor.destination.copy_((table if tensor.name == "embed.weight" else other)[tensor.index])
        head.process_after_load()
        logits = head(hidden)
        return embedding(ids), logits, head.vocabulary.gather(logits)

    for embedded, logits, whole in on_ranks(size, work):
        assert torch.equal(embedded, table[ids])
        assert whole.dtype is torch.float32 and whole.shape == (5, vocab_size) and whole.is_contiguous()
        expected = hidden.float() @ (table if tied else other).float().T
        torch.testing.assert_close(whole, expected, atol=8e-2 if dtype is torch.bfloat16 else 1e-5, rtol=1e-2)
        assert size == 1 or logits.shape[1] % 64 == 0
    assert sum(int(logits.isfinite().sum()) for _, logits, _ in on_ranks(size, work)) == 5 * vocab_size
