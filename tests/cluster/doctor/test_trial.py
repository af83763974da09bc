"""Ranks of an all-reduce as processes of their own: what works, what fails with the reason, and what ends in time."""

from __future__ import annotations

import time

import pytest

from shoal.cluster.doctor import trial
from shoal.cluster.doctor.trial import run_ranks
from shoal.messages import TrialOrder
from shoal.network import free_port


def ranks(number, *, started=None, timeout=20.0, backend="gloo"):
    names = [f"rank {index} (on node{index})" for index in range(number)]
    port = free_port()
    return [
        TrialOrder(backend, index, "127.0.0.1", "127.0.0.1", port, names, 1 << 20, timeout)
        for index in range(number if started is None else started)
    ]


def test_two_ranks_sum():
    outcomes = run_ranks(ranks(2))
    assert [outcome.error for outcome in outcomes] == ["", ""]
    assert all(outcome.seconds > 0 and outcome.num_bytes == 1 << 20 for outcome in outcomes)


def test_a_rank_that_does_not_come_is_named():
    (outcome,) = run_ranks(ranks(2, started=1, timeout=1.0))
    assert "rank 1 (on node1) did not come within 1 s" in outcome.error


def test_without_gpus_nccl_says_so():
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    (outcome,) = run_ranks(ranks(1, backend="nccl", timeout=5.0))
    assert "NCCL" in outcome.error or "CUDA" in outcome.error


def test_what_hangs_is_ended(monkeypatch):
    monkeypatch.setattr(trial, "_LOAD_SECONDS", 0.0)
    start = time.monotonic()
    (outcome,) = run_ranks(ranks(2, started=1, timeout=0.2))  # not even torch is loaded by then
    assert time.monotonic() - start < 10 and "hangs" in outcome.error
