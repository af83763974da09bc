"""What the policies are for, on simulated backends (benchmarks/router_policies.py): everything is drawn from a seed."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from random import Random
from types import ModuleType

import pytest

from shoal.router.policies import create_policy

PATH = Path(__file__).parents[3] / "benchmarks" / "router_policies.py"


@pytest.fixture(scope="module")
def simulation() -> ModuleType:
    spec = importlib.util.spec_from_file_location("router_policies", PATH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("seed", [0, 1])
def test_prefix_aware_against_round_robin(simulation: ModuleType, seed: int) -> None:
    """Shared prefixes, four equal backends: more hits, earlier first tokens, and nobody far above the mean."""
    turns, aware = (
        simulation.shared_prefixes(create_policy(name, random=Random(seed)), seed, num_jobs=700, rate=30.0)
        for name in ("round-robin", "prefix-aware")
    )
    assert aware.hit_rate > 1.4 * turns.hit_rate
    assert aware.ttft_p50 < 0.6 * turns.ttft_p50
    assert aware.latency_p95 < turns.latency_p95
    assert aware.load <= 1.3


@pytest.mark.parametrize("seed", [0, 1])
def test_least_outstanding_tokens_against_round_robin(simulation: ModuleType, seed: int) -> None:
    """One of four backends is three times as slow: it gets less, and so the slowest requests are faster."""
    turns, tokens = (
        simulation.one_slow(create_policy(name, random=Random(seed)), seed, num_jobs=700, rate=16.0)
        for name in ("round-robin", "least-outstanding-tokens")
    )
    assert tokens.latency_p95 < 0.7 * turns.latency_p95
    assert tokens.ttft_p95 < 0.7 * turns.ttft_p95
