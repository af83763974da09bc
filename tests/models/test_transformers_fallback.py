"""Families without a native file, by Transformers' own code over our layers and pages, against Transformers itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from shoal.attention.base import AttentionMetadata, DeviceRows
from shoal.attention.registry import make_backend
from shoal.distributed.group import GroupCoordinator
from shoal.kv_transfer.hooks import LayerHooks
from shoal.layers.context import BuildContext
from shoal.layers.norm import RMSNorm
from shoal.models.registry import build_model
from shoal.weights.loader import load_weights
from tests.models.other_families import OTHER_FAMILIES, make_other
from tests.models.paged import PagedModel, Sequence, random_tokens
from tests.models.test_tensor_parallel import run
from tests.rank_threads import on_ranks

TOLERANCE = 1e-4
ALWAYS = ("stablelm", "olmo2", "olmo3", "gpt-neox", "granite", "starcoder2", "gpt2")
# Without a plan, or with norms of single heads that it does not speak of: attention, or all, is whole on every rank.
NOT_SHARED = ("gpt2", "gpt-bigcode", "persimmon", "stablelm-head-norms", "cohere", "granite-swa", "opt", "ctrl")
NAMES = [name if name in ALWAYS else pytest.param(name, marks=pytest.mark.slow) for name in OTHER_FAMILIES]


class Oracle:
    def __init__(self, path: Path, name: str) -> None:
        self.name, self.path = name, make_other(path, name)
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, attn_implementation="eager"
        ).eval()

    @torch.inference_mode()
    def logprobs(self, token_ids: list[int]) -> torch.Tensor:
        return torch.log_softmax(self.model(torch.tensor([token_ids])).logits[0].float(), dim=-1)

    def paged(self, backend: str = "torch_paged", **more: object) -> PagedModel:
        return PagedModel(self.path, backend, model_impl="transformers", **more)  # type: ignore[arg-type]


@pytest.fixture(scope="module", params=NAMES)
def oracle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    return Oracle(tmp_path_factory.mktemp(request.param), request.param)


def assert_same(logits: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(torch.log_softmax(logits, dim=-1), expected, atol=TOLERANCE, rtol=0)


def test_prompts_whole_and_in_chunks(oracle: Oracle) -> None:
    tokens = random_tokens(150, seed=1)
    expected = oracle.logprobs(tokens)
    for backend in ("torch_paged", "reference", "deterministic"):
        model = oracle.paged(backend)
        for chunk in (150, 31):
            assert_same(model.logits(tokens, chunk), expected)


def test_greedy_tokens_of_a_batch(oracle: Oracle) -> None:
    model, lengths = oracle.paged(), [1, 15, 16, 70]
    sequences = [Sequence(random_tokens(length, seed=4)) for length in lengths]
    rows = [logits[-1] for logits in model.step([(sequence, len(sequence.token_ids)) for sequence in sequences])]
    for _ in range(12):
        for sequence, row in zip(sequences, rows, strict=True):
            sequence.token_ids.append(int(row.argmax()))
        rows = [logits[-1] for logits in model.step([(sequence, 1) for sequence in sequences])]
    for length, sequence in zip(lengths, sequences, strict=True):
        chosen = oracle.logprobs(sequence.token_ids).argmax(dim=-1).tolist()
        assert sequence.token_ids[length:] == chosen[length - 1 : -1]


def test_two_and_four_ranks(oracle: Oracle) -> None:
    """Two KV heads of most, so that four ranks hold copies."""
    tokens = random_tokens(100, seed=2)
    expected = oracle.logprobs(tokens)
    for size in (2, 4):
        for rank in on_ranks(size, lambda group: oracle.paged(group=group).logits(tokens, 37)):
            assert_same(rank, expected)


@pytest.mark.parametrize("size", [1, 2])
def test_three_stages(oracle: Oracle, size: int) -> None:
    tokens = random_tokens(60, seed=3)

    def through_stages(group: GroupCoordinator) -> torch.Tensor:
        hidden = None
        for layers in (range(0, 1), range(1, 2), range(2, 3)):
            stage = oracle.paged(group=group, layer_range=layers)
            hidden = stage.hidden([(Sequence(tokens), len(tokens))], hidden)
        with torch.inference_mode():
            return stage.model.compute_full_logits(hidden)

    for rank in on_ranks(size, through_stages):
        assert_same(rank, oracle.logprobs(tokens))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_deterministic_bits_on_any_degree(oracle: Oracle, dtype: torch.dtype) -> None:
    (expected,) = on_ranks(1, lambda group: run(oracle.paged("deterministic", group=group, dtype=dtype)))
    assert expected.isfinite().all()
    for rank in on_ranks(2, lambda group: run(oracle.paged("deterministic", group=group, dtype=dtype))):
        assert torch.equal(rank, expected)
    model, tokens = oracle.paged("deterministic", dtype=dtype), random_tokens(70, seed=5)
    assert torch.equal(model.logits(tokens, 70), model.logits(tokens, 11))


def test_stages_and_ranks_hold_their_part(oracle: Oracle) -> None:
    whole = oracle.paged().model.weight_bytes()
    stored = oracle.model.state_dict()
    buffers = [buffer for name, buffer in oracle.model.named_buffers() if name in stored]
    assert whole == sum(each.nbytes for each in (*oracle.model.parameters(), *buffers))
    middle = oracle.paged(layer_range=range(1, 2)).model.weight_bytes()
    assert middle < whole / 2
    ranks = on_ranks(2, lambda group: oracle.paged(group=group).model.weight_bytes())
    assert ranks[0] == ranks[1] < whole and (ranks[0] < 0.6 * whole) == (oracle.name not in NOT_SHARED)


def test_hooks_surround_every_layer(oracle: Oracle) -> None:
    seen: list[tuple[str, int, float]] = []

    class Recorder(LayerHooks):
        def before_layer(self, layer_index: int, kv_cache: torch.Tensor, metadata: AttentionMetadata) -> None:
            seen.append(("before", layer_index, float(kv_cache.sum())))

        def after_layer(self, layer_index: int, kv_cache: torch.Tensor, metadata: AttentionMetadata) -> None:
            seen.append(("after", layer_index, float(kv_cache.sum())))

    hidden = oracle.paged(layer_range=range(0, 1)).hidden([(Sequence([5, 6, 7]), 3)])
    oracle.paged(layer_range=range(1, 3), hooks=Recorder()).hidden([(Sequence([5, 6, 7]), 3)], hidden)
    assert [(when, layer) for when, layer, _ in seen] == [("before", 1), ("after", 1), ("before", 2), ("after", 2)]
    assert seen[0][2] != seen[1][2], "the layer wrote its keys and values between the two calls"


def test_frequencies_that_follow_the_longest_sequence(tmp_path: Path) -> None:
    """As in native files, --max-model-len decides for all requests."""
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    path = make_other(tmp_path, "stablelm", max_position_embeddings=64, rope_parameters=rope)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    for length in (60, 110):
        tokens = random_tokens(length, seed=8)
        with torch.inference_mode():
            expected = torch.log_softmax(model.eval()(torch.tensor([tokens])).logits[0], dim=-1)
        for chunk in (length, 17):
            assert_same(PagedModel(path, max_model_len=length).logits(tokens, chunk), expected)


def test_the_same_as_the_native_file(tmp_path: Path) -> None:
    """Qwen2 has both, here with windows in some layers."""
    path = make_other(tmp_path, "qwen2")
    tokens = random_tokens(90, seed=6)
    native, other = PagedModel(path), PagedModel(path, model_impl="transformers")
    assert native.config.model_impl == "shoal" and other.config.model_impl == "transformers"
    torch.testing.assert_close(other.logits(tokens, 40), native.logits(tokens, 40), atol=TOLERANCE, rtol=0)
    assert native.model.weight_bytes() == other.model.weight_bytes()
    assert sum(isinstance(module, RMSNorm) for module in other.model.modules()) == 7
    assert native.config.sliding_windows == other.config.sliding_windows == (None, 17, 17)
    quantized = [PagedModel(path, quantization="int8", model_impl=impl) for impl in ("shoal", "transformers")]
    expected, found = (model.logits(tokens, 40) for model in quantized)
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)
    assert quantized[1].model.weight_bytes() < 0.6 * other.model.weight_bytes()


def test_dummy_weights(tmp_path: Path) -> None:
    path = make_other(tmp_path, "olmo2")
    (path / "model.safetensors").unlink()
    model = PagedModel(path, load_format="dummy", model_impl="transformers")
    assert model.logits([5, 6, 7], 3).isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("deterministic", [False, True])
def test_decodes_as_a_graph(tmp_path: Path, deterministic: bool) -> None:
    """One token a sequence, with lengths that the device alone knows, captured and replayed."""
    device = torch.device("cuda")
    path = make_other(tmp_path, "olmo2", hidden_size=256, num_attention_heads=4, intermediate_size=512)
    backend = make_backend(deterministic, device)
    if not backend.follows_device:
        pytest.skip("this GPU has no attention that graphs can replay")
    config = PagedModel(path, load_format="dummy", model_impl="transformers").config
    context = BuildContext(
        dtype=torch.bfloat16, device=device, attention_backend=backend, deterministic=deterministic, max_model_len=512
    )
    model = build_model(config, context)
    load_weights(model, config)
    shape = backend.kv_cache_shape(8, 16, config.num_kv_heads, config.head_dim)
    caches = [torch.zeros(shape, dtype=torch.bfloat16, device=device) for _ in model.layer_range]
    tables = torch.tensor([[1, 2], [3, 4]], dtype=torch.int32, device=device)
    lengths = torch.tensor([4, 20], dtype=torch.int32, device=device)
    metadata = AttentionMetadata(
        [], [], tables, torch.tensor([16 + 3, 64 + 3], device=device), 16,
        device_rows=DeviceRows(torch.arange(2, dtype=torch.int32, device=device), lengths),
    )  # fmt: skip
    token_ids, positions = torch.tensor([5, 6], device=device), torch.tensor([3, 19], device=device)
    with torch.inference_mode():
        backend.prepare(metadata)
        for _ in range(3):  # the first looks at what the model asks of attention
            expected = model.compute_logits(model(token_ids, positions, caches, metadata))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = model.compute_logits(model(token_ids, positions, caches, metadata))
        found.zero_()
        graph.replay()
        torch.cuda.synchronize()
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
