"""The layout of `shoal serve` without parallel flags, on machines with several GPUs."""

from __future__ import annotations

import dataclasses

import pytest

from shoal.cluster.plan.automatic import lay_out
from shoal.cluster.plan.devices import Machine, parse_machine
from shoal.config.engine_config import EngineConfig
from shoal.config.options import ModelOptions, ParallelOptions, SchedulerOptions
from shoal.config.resolve import make_engine_config
from tests.cluster.plan.models import path_of


def laid_out(
    model: str, machine: Machine | None, capsys, *, max_model_len: int = 4096, **parallel
) -> tuple[ParallelOptions, str]:
    options = ParallelOptions(**parallel)
    path = path_of(model)
    config: EngineConfig = make_engine_config(model=path, device="cuda", max_model_len=max_model_len)
    asked = []

    def find() -> Machine | None:
        asked.append(True)
        return machine

    model_options = ModelOptions(model=path, max_model_len=max_model_len)
    found = lay_out(config, model_options, SchedulerOptions(), options, find_gpus=find)
    assert (found is options) or asked
    return found, capsys.readouterr().err


def test_a_model_that_does_not_fit_one_gpu_takes_the_plan(capsys):
    found, printed = laid_out("Llama-3.1-70B", parse_machine("8xH100-80"), capsys)
    assert found == dataclasses.replace(ParallelOptions(), tensor_parallel_size=8)
    assert "Choice: TP 8 × PP 1 × DP 1. No single H100 holds the model" in printed
    assert "141,107,412,992 bytes" in printed


def test_a_model_that_fits_one_gpu_stays_there(capsys):
    found, printed = laid_out("Llama-3.1-8B", parse_machine("8xH100-80"), capsys)
    assert found == ParallelOptions() and printed == ""


def test_one_request_of_full_length_must_fit_too(capsys):
    found, _ = laid_out("Llama-3.1-8B", parse_machine("2xA10"), capsys, max_model_len=1024)
    assert found == ParallelOptions()
    found, _ = laid_out("Llama-3.1-8B", parse_machine("2xA10"), capsys, max_model_len=131072)
    assert found.tensor_parallel_size == 2


@pytest.mark.parametrize(
    "parallel",
    [
        {"pipeline_parallel_size": 2},
        {"tensor_parallel_size": 4},
        {"nnodes": 2},
        {"distributed_executor_backend": "ray"},
    ],
)
def test_what_is_said_counts(parallel, capsys):
    options = ParallelOptions(**parallel)
    path = path_of("Llama-3.1-70B")
    config = make_engine_config(model=path, device="cuda")

    def never() -> Machine | None:
        raise AssertionError("nobody needs to know the GPUs")

    assert lay_out(config, ModelOptions(model=path), SchedulerOptions(), options, find_gpus=never) is options
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("machine", [None, "1xH100-80"])
def test_where_gpus_are_not_known_nothing_is_said(machine, capsys):
    found, printed = laid_out("Llama-3.1-70B", machine and parse_machine(machine), capsys)
    assert found == ParallelOptions() and printed == ""


def test_where_nothing_fits_it_is_said_and_left_to_the_engine(capsys):
    found, _ = laid_out("Llama-3.1-405B", parse_machine("2xL20"), capsys)
    assert found == ParallelOptions()
