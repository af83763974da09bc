"""Models through Transformers' own code in a whole engine core on a GPU: the tokens of a CPU, with experts and without.

Their CPU's are compared with Transformers in tests/models.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from shoal.config.lora import digest_adapter
from shoal.types.adapter import AdapterRef
from shoal.worker.worker import Worker
from tests.adapters import make_adapter, merge
from tests.engine.local_engine import run_engine
from tests.engine.test_lora import greedy, with_adapter
from tests.engine.test_parallel import VOCAB_SIZE, alone, check_equal, make_config, make_requests
from tests.models.other_families import OTHER_EXPERTS, make_other
from tests.models.paged import random_tokens

# Windows; norms and scales of its own; another layout of query, key and value; learned positions.
DENSE = ("olmo3", "granite", "gpt-neox", "gpt2")


def make_model(directory: Path, name: str) -> str:
    return str(make_other(directory / name, name, vocab_size=VOCAB_SIZE))


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*OTHER_EXPERTS, *DENSE])
def test_a_gpu_gives_the_tokens_of_a_cpu(tmp_path: Path, name: str) -> None:
    """In CUDA graphs and out of them."""
    path = make_model(tmp_path, name)
    expected = alone(path)
    for enforce_eager in (False, True):

        def check(worker: Worker, enforce_eager: bool = enforce_eager) -> None:
            assert (worker.runner.graphs is None) == enforce_eager

        config = make_config(path, device="cuda", enforce_eager=enforce_eager)
        assert config.model.model_impl == "transformers"
        answers, _ = run_engine(config, make_requests(VOCAB_SIZE), after_start=check)
        check_equal(answers, expected, bits=False)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_adapters_beside_their_layers(tmp_path: Path, device: str) -> None:
    """On attention of a model with experts, which take none."""
    path = Path(make_model(tmp_path, "olmoe"))
    targets = ("q_proj", "k_proj", "v_proj", "o_proj")
    adapter = make_adapter(tmp_path / "adapter", path, seed=1, targets=targets)
    requests = [greedy(f"r{seed}", random_tokens(20 * seed + 5, seed=seed), 10, 1) for seed in range(3)]
    reference = AdapterRef(0, "adapter", str(adapter), digest_adapter(str(adapter)))
    config = make_config(str(path), device=device, enable_lora=True)
    mixed = [with_adapter(request, reference) for request in requests[1:]]
    answers, _ = run_engine(config, [requests[0], *mixed])
    merged = merge(tmp_path / "merged", path, adapter)
    check_equal(answers, run_engine(make_config(str(path)), requests[:1])[0], bits=False)
    check_equal(answers, run_engine(make_config(str(merged)), requests[1:])[0], bits=False)
