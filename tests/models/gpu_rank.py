"""One GPU rank of a test, run as `python -m tests.models.gpu_rank RANK SIZE STORE MODEL OUTPUT`.

Writes {"logits": of a small model with dummy weights, "tokens": sampled from given logits, "replayed": whether a CUDA
graph with collectives computes what running its parts does} to OUTPUT.
"""

from __future__ import annotations

import faulthandler
import os
import sys

import torch

from shoal.attention.base import AttentionBackend, AttentionMetadata
from shoal.attention.registry import make_backend
from shoal.config.model_config import load_model_config
from shoal.distributed.group import GroupCoordinator
from shoal.distributed.parallel_dims import ParallelDims
from shoal.distributed.rendezvous import form_groups
from shoal.distributed.vocabulary import VocabularySlice
from shoal.layers.context import BuildContext
from shoal.models.base import CausalLM
from shoal.models.registry import build_model
from shoal.sampling.sampler import Sampler
from shoal.sampling.state import SamplingState
from shoal.types import SamplingParams
from shoal.weights.loader import load_weights

NUM_TOKENS, BLOCK_SIZE, VOCAB_SIZE = 40, 16, 32_003
BATCH = [
    SamplingParams(temperature=0),
    SamplingParams(temperature=0, repetition_penalty=1.3, logprobs=2),
    SamplingParams(seed=1),
    SamplingParams(seed=2, min_p=0.02, temperature=0.8, presence_penalty=0.4),
    SamplingParams(seed=3, top_k=40, top_p=0.9),
    SamplingParams(seed=4, top_p=0.7),
    SamplingParams(seed=5, allowed_token_ids=[5, 20_000, 32_002], logit_bias={20_000: 1.0}),
    SamplingParams(seed=6, bad_words_token_ids=[1, 2], min_tokens=8, max_tokens=20, eos_token_ids=[3]),
]


def model_logits(
    model: CausalLM, backend: AttentionBackend, kv_shape: tuple[int, ...], device: torch.device
) -> torch.Tensor:
    """[T, V] of a prompt. backend: the one that the model was built with."""
    num_blocks = kv_shape[0] - 1
    metadata = AttentionMetadata(
        [NUM_TOKENS],
        [NUM_TOKENS],
        torch.arange(1, num_blocks + 1, dtype=torch.int32, device=device)[None],
        torch.arange(BLOCK_SIZE, BLOCK_SIZE + NUM_TOKENS, device=device),
        BLOCK_SIZE,
    )
    backend.prepare(metadata)
    caches = [torch.zeros(kv_shape, device=device) for _ in model.layer_range]
    token_ids = torch.arange(NUM_TOKENS, device=device) * 797 % model.vocabulary.vocab_size
    hidden = model(token_ids, torch.arange(NUM_TOKENS, device=device), caches, metadata)
    return model.compute_full_logits(hidden)


def sampled_tokens(group: GroupCoordinator, device: torch.device) -> list[list[int]]:
    """Several steps over the same logits on every rank; nothing waits for the device."""
    logits = torch.randn(4, len(BATCH), VOCAB_SIZE, generator=torch.Generator().manual_seed(0)).mul_(3).round_()
    vocabulary = VocabularySlice(VOCAB_SIZE, group)
    own = torch.full((4, len(BATCH), vocabulary.width), float("-inf"))
    own[..., : vocabulary.num_tokens] = logits[..., vocabulary.tokens]
    own = own.to(device)
    state, sampler = SamplingState(len(BATCH), VOCAB_SIZE, device, group), Sampler()
    for slot, params in enumerate(BATCH):
        state.assign(slot, params, [9, 20_000, 7, 9], 2)
    slots = list(range(len(BATCH)))
    sampler.sample(own[0].clone(), state.prepare(slots, [4] * len(BATCH)))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    tokens = []
    for step in range(4):
        metadata = state.prepare(slots, [4 + step] * len(BATCH))
        sampled = sampler.sample(own[step].clone(), metadata)
        state.commit(metadata, sampled.token_ids)
        tokens.append(sampled.token_ids)
    torch.cuda.set_sync_debug_mode("default")
    return [each.tolist() for each in tokens]


def replays(model: CausalLM, group: GroupCoordinator, device: torch.device) -> bool:
    """Embedding, an MLP, the head and the choice of the best token, captured and run again with other ids."""
    ids = torch.zeros(8, dtype=torch.int64, device=device)
    vocabulary = model.vocabulary

    def compute() -> torch.Tensor:
        hidden = model.embed_tokens(ids)
        logits = model.compute_logits(model.norm(model.layers[0].mlp(hidden)))
        columns = logits.argmax(dim=-1)
        values = logits.gather(1, columns[:, None])[:, 0]
        return vocabulary.best(values, columns + vocabulary.start)

    for _ in range(2):
        compute()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = compute()
    for seed in range(3):
        ids.copy_(torch.randint(vocabulary.vocab_size, (8,), generator=torch.Generator().manual_seed(seed)))
        graph.replay()
        if not torch.equal(captured, compute()):
            return False
    return True


@torch.inference_mode()
def main() -> None:
    faulthandler.dump_traceback_later(150, exit=True)
    rank, size = int(sys.argv[1]), int(sys.argv[2])
    store, path, output = sys.argv[3:]
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    dims = ParallelDims(tensor_size=size, rank=rank)
    group = form_groups(dims, device=device, address="127.0.0.1", store_file=store).tensor
    config = load_model_config(path)
    backend = make_backend(False, device)
    context = BuildContext(
        dtype=torch.float32, device=device, attention_backend=backend, parallel=dims, tensor_group=group
    )
    model = build_model(config, context)
    load_weights(model, config, "dummy")
    heads = dims.kv_head_slice(config.num_kv_heads)
    num_blocks = 1 + -(-NUM_TOKENS // BLOCK_SIZE)
    kv_shape = backend.kv_cache_shape(num_blocks, BLOCK_SIZE, heads.stop - heads.start, config.head_dim)
    results = {
        "logits": model_logits(model, backend, kv_shape, device).cpu(),
        "tokens": sampled_tokens(group, device),
        "replayed": replays(model, group, device),
    }
    torch.save(results, output)
    # torch's own destructor of a connected group may wait for ever.
    os._exit(0)


if __name__ == "__main__":
    main()
