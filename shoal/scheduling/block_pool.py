"""The pool of KV cache blocks: who holds which, which may be reused, and which hold a known prefix. No tensors.

Called by the scheduler only. Block 0 is the null block: it belongs to nobody, padding is written there.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence

NULL_BLOCK = 0
_ROOT = b"shoal-prefix-root"


def hash_block(parent: bytes | None, token_ids: Sequence[int]) -> bytes:
    """16-byte digest of a full block: of its token ids and of everything before it, through the parent's digest.

    A cryptographic hash, since a collision would answer one user's prompt from another's cache.
    """
    return hashlib.blake2b((parent or _ROOT) + array("q", token_ids).tobytes(), digest_size=16).digest()


class BlockPool:
    """Blocks with reference counts; free blocks in least-recently-used order, cached ones found by digest.

    A block is free (count 0) or held. A free block may still be cached: it stays findable until it is reused.
    """

    def __init__(self, num_blocks: int, enable_caching: bool) -> None:
        assert num_blocks >= 2, "one null block and one to use"
        self.num_blocks = num_blocks
        self._enable_caching = enable_caching
        self._num_references = [0] * num_blocks
        self._hash_of: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, num_blocks))

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_usable(self) -> int:
        return self.num_blocks - 1

    def allocate(self, count: int) -> list[int]:
        """Take `count` free blocks, least recently used first. The caller has checked `num_free`."""
        assert count <= len(self._free), f"{count} blocks wanted, {len(self._free)} free"
        blocks = []
        for _ in range(count):
            block, _ = self._free.popitem(last=False)
            digest = self._hash_of[block]
            if digest is not None:
                del self._block_of[digest]
                self._hash_of[block] = None
            self._num_references[block] = 1
            blocks.append(block)
        return blocks

    def find(self, digests: Iterable[bytes]) -> list[int]:
        """The cached blocks of the longest known beginning of `digests`. They are not held yet: see `hold`."""
        if not self._enable_caching:
            return []
        blocks = []
        for digest in digests:
            block = self._block_of.get(digest)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def num_free_among(self, blocks: Iterable[int]) -> int:
        """How many of these are free, so that holding them takes from `num_free`."""
        return sum(1 for block in blocks if self._num_references[block] == 0)

    def hold(self, blocks: Iterable[int]) -> None:
        """Add a holder to each block; free ones leave the free list."""
        for block in blocks:
            if self._num_references[block] == 0:
                del self._free[block]
            self._num_references[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Take a holder away from each. The end of a sequence is reused before its beginning, the unknown first."""
        for block in reversed(blocks):
            count = self._num_references[block] - 1
            assert count >= 0 and block != NULL_BLOCK, f"block {block} released more often than held"
            self._num_references[block] = count
            if count == 0:
                self._free[block] = None
                if self._hash_of[block] is None:
                    self._free.move_to_end(block, last=False)

    def commit(self, block: int, digest: bytes) -> None:
        """Make a full block findable. When its digest is known already, the older block keeps it."""
        if self._enable_caching and digest not in self._block_of and self._hash_of[block] is None:
            self._block_of[digest] = block
            self._hash_of[block] = digest

    def reset_cache(self) -> None:
        """Forget all digests (the weights changed, or a benchmark wants a cold cache). Held blocks stay held."""
        self._block_of.clear()
        self._hash_of = [None] * self.num_blocks

    def check(self) -> None:
        """Assert the invariants: for tests."""
        free = set(self._free)
        assert NULL_BLOCK not in free and self._num_references[NULL_BLOCK] == 0
        for block in range(1, self.num_blocks):
            assert (self._num_references[block] == 0) == (block in free), f"block {block}"
        for digest, block in self._block_of.items():
            assert self._hash_of[block] == digest
