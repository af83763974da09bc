from __future__ import annotations

import dataclasses
import json
import logging

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from triton.runtime.errors import OutOfResources

from shoal.kernels import tuning
from shoal.kernels.disk_cache import ChoiceCache
from shoal.kernels.linear import Workspace
from shoal.kernels.tuning import BUCKETS, LinearChooser, candidates_for

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ENVIRONMENT = {"gpu": "NVIDIA Test 80GB", "torch": "2.11"}
# The interpreter multiplies no matrices of bf16.
DTYPE = torch.float16


class FakeTimer:
    """Says that the candidate with number `winner` (0 is the library) is fastest, and counts what it was asked."""

    def __init__(self, winner):
        self.winner, self.num_calls, self.num_choices = winner, 0, 0

    def __call__(self, run):
        index = self.num_calls - self.num_choices * self.per_choice
        self.num_calls += 1
        if self.num_calls % self.per_choice == 0:
            self.num_choices += 1
        return 1.0 if index == self.winner else 2.0


@pytest.fixture
def few_multiprocessors(monkeypatch):
    monkeypatch.setattr(tuning, "_num_multiprocessors", lambda device: 4)


def _timer(winner, bucket, weight, gated=False):
    timer = FakeTimer(winner)
    timer.per_choice = 1 + len(candidates_for(bucket, *weight.shape, gated, 4))
    return timer


def _weight(rows=64, inputs=256):
    return (torch.randn(rows, inputs, device=DEVICE) / inputs**0.5).to(DTYPE)


@pytest.mark.parametrize("bucket", BUCKETS)
@pytest.mark.parametrize("gated", [False, True])
def test_every_choice_computes_the_product(few_multiprocessors, bucket, gated):
    weight, bias = _weight(24), torch.randn(24, device=DEVICE).to(DTYPE)
    x = torch.randn(bucket, 256, device=DEVICE).to(DTYPE)
    norm = (torch.rand(256, device=DEVICE).to(DTYPE), 1e-5)
    seen = set()
    for winner, config in enumerate([None, *candidates_for(bucket, *weight.shape, gated, 4)]):
        kernel = config and dataclasses.replace(config, prefetch_bytes=0)
        if kernel in seen and DEVICE.type == "cpu":
            continue  # nothing is prefetched here
        seen.add(kernel)
        chooser = LinearChooser(DEVICE, None, _timer(winner, bucket, weight, gated))
        plan = chooser.plan(weight, bias)
        for given in (None, norm):
            normed = x.float() if given is None else F.rms_norm(x.float(), (256,), given[0].float(), given[1])
            product = F.linear(normed, weight.float(), bias.float())
            if gated:
                gate, up = product.chunk(2, dim=-1)
                product, y = F.silu(gate) * up, plan.apply_gated(x, norm=given)
            else:
                y = plan.apply(x, norm=given)
            torch.testing.assert_close(y.float(), product, rtol=4e-3, atol=4e-3)


def test_other_numbers_of_rows_go_to_the_library(few_multiprocessors):
    weight = _weight()
    plan = LinearChooser(DEVICE, None, _timer(1, 1, weight)).plan(weight)
    for num_rows in (0, 17):
        x = torch.randn(num_rows, 256, device=DEVICE).to(DTYPE)
        residual = torch.randn(num_rows, 64, device=DEVICE).to(DTYPE)
        assert torch.equal(plan.apply(x, residual=residual), F.linear(x, weight) + residual)
        assert plan.apply_gated(x).shape == (num_rows, 32)


def test_layers_of_one_shape_are_measured_once(few_multiprocessors):
    weights = [_weight(8) for _ in range(3)]
    timer = _timer(1, 1, weights[0])
    chooser = LinearChooser(DEVICE, None, timer)
    plans = [chooser.plan(weight) for weight in weights]
    x = torch.randn(1, 256, device=DEVICE).to(DTYPE)
    for plan, weight in zip(plans, weights, strict=True):
        torch.testing.assert_close(plan.apply(x), F.linear(x, weight), rtol=2e-3, atol=2e-3)
    assert timer.num_choices == 1
    # A bias, or as a gate: another product.
    chooser.plan(weights[0], weights[0][:, 0].contiguous()).apply(x)
    plans[0].apply_gated(x)
    assert timer.num_calls > timer.per_choice


def test_plans_need_two_bytes_a_weight_and_aligned_rows():
    chooser = LinearChooser(DEVICE, None)
    assert chooser.plan(torch.empty(64, 64, device=DEVICE)) is None
    assert chooser.plan(torch.empty(64, 68, dtype=DTYPE, device=DEVICE)) is None
    assert chooser.plan(torch.empty(64, 64, dtype=DTYPE, device=DEVICE).T) is None
    assert chooser.plan(torch.empty(64, 72, dtype=DTYPE, device=DEVICE)) is not None


def test_choices_outlive_the_process(few_multiprocessors, tmp_path):
    weight = _weight()
    first = _timer(2, 1, weight)
    LinearChooser(DEVICE, ChoiceCache(tmp_path, ENVIRONMENT), first).plan(weight)._config(1, False)
    assert first.num_choices == 1
    second = _timer(0, 1, weight)
    plan = LinearChooser(DEVICE, ChoiceCache(tmp_path, ENVIRONMENT), second).plan(weight)
    plan._config(1, False)
    assert second.num_calls == 0
    assert plan._config(1, False) == candidates_for(1, *weight.shape, False, 4)[1]
    # Another GPU or version has a file of its own.
    other = _timer(0, 1, weight)
    LinearChooser(DEVICE, ChoiceCache(tmp_path, {**ENVIRONMENT, "torch": "2.12"}), other).plan(weight)._config(1, False)
    assert other.num_choices == 1 and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("kept", ["library", 5, ["library"], ["library", "sum 3x7"], None])
def test_a_kept_choice_that_is_no_candidate_is_measured_again(few_multiprocessors, tmp_path, kept):
    weight = _weight()
    cache = ChoiceCache(tmp_path, ENVIRONMENT)
    cache.put("64x256 float16 rows=1", kept)
    timer = _timer(0, 1, weight)
    LinearChooser(DEVICE, cache, timer).plan(weight)._config(1, False)
    assert timer.num_choices == 1 and cache.get("64x256 float16 rows=1")[0] == "library"


def test_what_does_not_fit_the_gpu_is_left_out(few_multiprocessors):
    weight = _weight()
    num_calls = 0

    def timer(run):
        nonlocal num_calls
        num_calls += 1
        if num_calls in (2, 3):
            raise OutOfResources(200_000, 100_000, "shared memory")
        return 1.0 / num_calls

    plan = LinearChooser(DEVICE, None, timer).plan(weight)
    found = candidates_for(2, *weight.shape, False, 4)
    assert plan._config(2, False) == found[-1] and num_calls == 1 + len(found)


def test_nothing_is_measured_while_a_graph_is_captured(few_multiprocessors, monkeypatch):
    weight = _weight()
    timer = _timer(1, 1, weight)
    plan = LinearChooser(DEVICE, None, timer).plan(weight)
    x = torch.randn(1, 256, device=DEVICE).to(DTYPE)
    with monkeypatch.context() as patched:
        patched.setattr(tuning, "_is_capturing", lambda: True)
        assert torch.equal(plan.apply(x), F.linear(x, weight))
    assert timer.num_calls == 0
    plan.apply(x)
    assert timer.num_choices == 1


@pytest.mark.parametrize("num_multiprocessors", [58, 108, 132])
def test_candidates_are_few_and_fit_the_workspace(num_multiprocessors):
    for rows, inputs in [(4096, 1024), (2560, 8192), (8192, 28672), (151936, 1024), (28672, 4096), (16, 64)]:
        for gated in (False, True):
            for bucket in BUCKETS:
                found = candidates_for(bucket, rows, inputs, gated, num_multiprocessors)
                assert 1 <= len(found) <= 10 and len(set(found)) == len(found)
                assert len({(each.kind, each.block_n, each.block_k) for each in found}) <= 4  # each is compiled
                for config in found:
                    assert config.kind == "dot" or bucket <= 8
                    num_tiles = -(-rows // config.block_n)
                    assert config.num_splits == 1 or Workspace.holds(config.num_splits, 16, rows, num_tiles)


class TestChoiceCache:
    def test_two_writers_keep_both(self, tmp_path):
        one, other = ChoiceCache(tmp_path, ENVIRONMENT), ChoiceCache(tmp_path, ENVIRONMENT)
        one.put("a", "x")
        other.put("b", "y")
        again = ChoiceCache(tmp_path, ENVIRONMENT)
        assert (again.get("a"), again.get("b"), again.get("c")) == ("x", "y", None)
        assert [path.name for path in tmp_path.iterdir()] == [again.path.name]  # nothing temporary is left

    @pytest.mark.parametrize(
        "content", ["{", "[]", '{"environment": {"gpu": "other"}, "choices": {"a": "x"}}', b"\xff\xfe"]
    )
    def test_a_broken_or_foreign_file_is_written_anew(self, tmp_path, caplog, content):
        path = ChoiceCache(tmp_path, ENVIRONMENT).path
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        with caplog.at_level(logging.WARNING, logger="shoal"):
            cache = ChoiceCache(tmp_path, ENVIRONMENT)
        assert len(caplog.records) == 1 and str(path) in caplog.text
        assert cache.get("a") is None
        cache.put("b", "y")
        assert json.loads(path.read_text())["choices"] == {"b": "y"}

    def test_choices_that_are_no_table(self, tmp_path):
        cache = ChoiceCache(tmp_path, ENVIRONMENT)
        cache.put("a", "x")
        cache.path.write_text(cache.path.read_text().replace('{\n  "a": "x"\n }', "7"))
        assert ChoiceCache(tmp_path, ENVIRONMENT).get("a") is None

    def test_where_nothing_can_be_written_it_says_so_once(self, tmp_path, caplog):
        (tmp_path / "file").touch()
        cache = ChoiceCache(tmp_path / "file" / "below", ENVIRONMENT)
        with caplog.at_level(logging.WARNING, logger="shoal"):
            cache.put("a", "x")
            cache.put("b", "y")
        assert sum("not kept" in record.message for record in caplog.records) == 1
        assert (cache.get("a"), cache.get("b")) == ("x", "y")
