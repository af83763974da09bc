"""The executor, its hub, the launcher and the worker's process, with stand-ins in place of the model."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from shoal.errors import EngineDeadError, ModelError, StartupError
from shoal.executor.hub import WorkerHub
from shoal.executor.multiprocess import LocalLauncher
from shoal.messages import StartupProgress, WorkerBeat, WorkerExited, WorkerMessage, WorkerReady
from shoal.worker.link import identity
from tests.executor.engines import ignore, is_running, make_batch, make_config, pids, run_step, stand_ins, wait_until


def fail_to_start(tmp_path, behaviour, num_ranks=2, **parallel):
    with stand_ins(tmp_path, behaviour, num_ranks, **parallel) as executor:
        started = time.monotonic()
        with pytest.raises((StartupError, ModelError)) as caught:
            executor.start(ignore)
        ended = time.monotonic()
        left = [pid for pid in pids(tmp_path) if os.path.exists(f"/proc/{pid}")]
        assert not left, "start itself ends what it has started"
    return caught.value, ended - started


def test_steps_give_results_and_the_end_is_clean(tmp_path):
    progress: list[StartupProgress] = []
    with stand_ins(tmp_path, num_ranks=3) as executor:
        facts = executor.start(progress.append)
        assert facts["num_blocks"] == 98, "the least of what fits on all"
        assert facts["ranks"] == 3 and facts["weight_bytes_by_rank"] == [1000, 1001, 1002]
        assert facts["weight_bytes"] == 3003 and facts["kv_cache_bytes"] == 3 * 980 and facts["backend"] == "mp"
        assert StartupProgress("load weights", 3000, 3000) in progress
        assert run_step(executor, 1) == [(0, [1]), (1, [2])]
        futures = []
        for step_id in range(2, 40):
            executor.execute(make_batch(step_id, 300))
            futures.append(executor.sample(step_id, {0: b"ab"} if step_id == 5 else None))
        results = [future.result(60) for future in futures]
        assert [result.step_id for result in results] == list(range(2, 40))
        assert results[3].results[7].token_ids == [5 + 7 + 2] and len(results[0].results) == 300
    assert len(list(tmp_path.glob("ended-*"))) == 3, "each came to the end of its steps"


def test_idle_checks_never_come_into_a_step(tmp_path, monkeypatch):
    monkeypatch.setattr("shoal.executor.distributed._IDLE_SECONDS", 0.0)
    monkeypatch.setattr("shoal.executor.distributed._TICK_SECONDS", 0.001)
    with stand_ins(tmp_path) as executor:
        executor.start(ignore)
        for step_id in range(1, 100):
            executor.execute(make_batch(step_id))
            time.sleep(0.002 * (step_id % 3))  # masks may take their time
            assert executor.sample(step_id).result(60).step_id == step_id
            time.sleep(0.001 * (step_id % 4))
        wait_until(lambda: executor._num_idle > 10)
        assert run_step(executor, 100)[0] == (0, [100])


def test_results_are_read_back_beside_the_steps_where_the_device_is_not_the_host(tmp_path):
    with stand_ins(tmp_path, "asynchronous") as executor:
        executor.start(ignore)
        assert [run_step(executor, step_id)[0] for step_id in (1, 2, 3)] == [(0, [1]), (0, [2]), (0, [3])]


def test_a_message_larger_than_the_ring(tmp_path):
    with stand_ins(tmp_path) as executor:
        executor.start(ignore)
        executor.execute(make_batch(1))
        masks = {slot: bytes(3 << 20) for slot in range(3)}
        assert executor.sample(1, masks).result(60).results[1].token_ids == [1 + 1 + (9 << 20)]


def test_a_rank_that_never_comes_is_named_with_what_the_others_see(tmp_path):
    error, seconds = fail_to_start(tmp_path, "silent@1", 3, startup_timeout=4.0)
    text = str(error)
    assert "start-up phase 'spawn': rank 1 (on this host, pid" in text and "did not come within 4 s" in text
    assert "127.0.0.1 on lo, pid" in text and "rank 2 (" in text and "store on port" in text
    assert seconds < 4 + 5


@pytest.mark.parametrize(
    ("behaviour", "phase", "doing"), [("late@0", "rendezvous", "setup"), ("slow-load@1", "load", "load weights")]
)
def test_a_rank_that_stays_behind_is_named_with_what_it_does(tmp_path, behaviour, phase, doing):
    late, other = behaviour[-1], 1 - int(behaviour[-1])
    error, _ = fail_to_start(tmp_path, behaviour, startup_timeout=4.0)
    assert re.search(rf"start-up phase '{phase}': rank {late} \([^;]*in phase '{doing}' did not come", str(error))
    assert f"the others: rank {other} (" in str(error)


def test_a_version_that_differs_is_named_with_both_values(tmp_path):
    error, _ = fail_to_start(tmp_path, "other-version@1")
    assert "all ranks must have the same Shoal version" in str(error) or "the same Python version" in str(error)
    assert "rank 0 (" in str(error) and "rank 1 (node-b 10.0.0.2, pid" in str(error)
    assert isinstance(error, StartupError)


def test_what_a_worker_raises_while_it_loads_comes_out_as_it_is(tmp_path):
    error, _ = fail_to_start(tmp_path, "no-weights")
    assert isinstance(error, ModelError)
    assert "and 1 more: there is no model.safetensors" in str(error), "both say the same, so it is said once"


def test_a_worker_that_is_killed_during_the_start(tmp_path):
    def kill_when_it_loads(progress: StartupProgress) -> None:
        if progress.phase == "load weights" and progress.total:
            with contextlib.suppress(ProcessLookupError):  # said twice: it is gone already
                os.kill(pids(tmp_path)[1], signal.SIGKILL)

    killed = pytest.raises(StartupError, match=r"rank 1 \(.*pid \d+\) was killed by signal 9")
    with stand_ins(tmp_path, "slow-load") as executor, killed:
        executor.start(kill_when_it_loads)


def test_a_killed_worker_ends_the_engine_and_is_the_reason_not_what_the_others_felt(tmp_path):
    told: list[EngineDeadError] = []
    with stand_ins(tmp_path, num_ranks=3) as executor:
        executor.watch(told.append)
        executor.start(ignore)
        run_step(executor, 1)
        victim = pids(tmp_path)[1]
        os.kill(victim, signal.SIGSTOP)  # so that the others are in the step when it dies
        executor.execute(make_batch(2))
        future = executor.sample(2)
        time.sleep(0.1)
        killed = time.monotonic()
        os.kill(victim, signal.SIGKILL)
        with pytest.raises(EngineDeadError) as caught:
            future.result(60)
        assert time.monotonic() - killed < 10
        assert f"pid {victim}) was killed by signal 9" in str(caught.value)
        assert str(caught.value).startswith("rank 1 (") and "all_reduce" not in str(caught.value)
        executor.execute(make_batch(3))
        with pytest.raises(EngineDeadError, match="rank 1"):
            executor.sample(3).result(60)
        assert len(told) == 1


def test_a_worker_whose_link_breaks_ends(tmp_path):
    with stand_ins(tmp_path, "slow-load") as executor:

        def say_nonsense(progress: StartupProgress) -> None:
            if progress.phase == "load weights" and progress.total:
                assert executor._hub is not None
                executor._hub._control.send_multipart([identity(0, 1, "control"), b"\xc1"])

        with pytest.raises(StartupError, match=r"rank 1 \(.*ended with exit code 4"):
            executor.start(say_nonsense)


def test_processes_are_killed_all_at_once(monkeypatch):
    launcher = LocalLauncher(make_config(3))
    killed: list[int] = []

    class Slow:
        """Is gone only some time after it was killed."""

        def __init__(self, rank: int) -> None:
            self.rank = rank

        def wait(self, deadline: float) -> bool:
            return False

        def begin_kill(self) -> None:
            killed.append(self.rank)

        def kill(self) -> None:
            assert sorted(killed) == [0, 1, 2], "waited for one before the others were killed"

    monkeypatch.setattr(launcher, "_processes", {rank: Slow(rank) for rank in range(3)})
    launcher.stop(0.0)
    assert killed


def test_a_worker_that_dies_as_the_last_one_comes_up_is_told(tmp_path, monkeypatch):
    poll = WorkerHub.poll

    def poll_until_dead(hub: WorkerHub, seconds: float) -> list[WorkerMessage]:
        messages = poll(hub, seconds)
        if any(isinstance(message, WorkerReady) and message.rank == 0 for message in messages):
            os.kill(pids(tmp_path)[0], signal.SIGKILL)
            while not any(isinstance(message, WorkerExited) for message in messages):
                messages += poll(hub, 0.1)
        return messages

    monkeypatch.setattr(WorkerHub, "poll", poll_until_dead)
    error, _ = fail_to_start(tmp_path, "", num_ranks=1)
    assert "rank 0 (" in str(error) and "was killed by signal 9" in str(error)


def test_a_worker_that_dies_while_nothing_is_to_do_is_told_as_well(tmp_path):
    told: list[EngineDeadError] = []
    with stand_ins(tmp_path) as executor:
        executor.watch(told.append)
        executor.start(ignore)
        os.kill(pids(tmp_path)[0], signal.SIGKILL)
        wait_until(lambda: told)
        assert "rank 0 (" in str(told[0]) and "signal 9" in str(told[0])


def test_what_a_worker_raises_in_a_step_ends_the_engine(tmp_path):
    with stand_ins(tmp_path, "fails@1+stuck-at-the-end@1") as executor:
        executor.start(ignore)
        run_step(executor, 1)
        run_step(executor, 2)
        executor.execute(make_batch(3))
        with pytest.raises(EngineDeadError, match=r"rank 1 \(.*RuntimeError: the device is on fire"):
            executor.sample(3).result(60)


def test_a_message_that_is_missing_ends_the_engine(tmp_path):
    with stand_ins(tmp_path) as executor:
        executor.start(ignore)
        run_step(executor, 1)
        assert executor._hub is not None
        executor._hub._num_sent += 1  # as if one had been lost
        executor.execute(make_batch(2))
        with pytest.raises(EngineDeadError, match="message 2 of the executor is missing: 3 came in its place"):
            executor.sample(2).result(60)


def test_a_stopped_worker_is_named_when_its_step_does_not_end(tmp_path):
    with stand_ins(tmp_path, step_timeout=1.5) as executor:
        executor.start(ignore)
        run_step(executor, 1)
        os.kill(pids(tmp_path)[1], signal.SIGSTOP)
        executor.execute(make_batch(2))
        with pytest.raises(EngineDeadError) as caught:
            executor.sample(2).result(60)
    text = str(caught.value)
    assert "step 2 did not end within 1.5 s (--step-timeout): rank 1 (" in text and "is stopped" in text
    assert "rank 0 waits for" in text and "in all_reduce" in text and "rank 1 never entered it" in text


def test_what_a_rank_said_while_the_engine_came_up_is_known_afterwards(tmp_path, monkeypatch):
    poll = WorkerHub.poll

    def poll_until_stopped(hub: WorkerHub, seconds: float) -> list[WorkerMessage]:
        """Stop rank 1 as it is ready, when it has said for the last time what it does."""
        messages = poll(hub, seconds)
        if any(isinstance(message, WorkerReady) and message.rank == 1 for message in messages):
            while not any(isinstance(each, WorkerBeat) and each.rank == 1 and each.status for each in messages):
                messages += poll(hub, 0.1)
            os.kill(pids(tmp_path)[1], signal.SIGSTOP)
        return messages

    monkeypatch.setattr(WorkerHub, "poll", poll_until_stopped)
    by_network = {"address": "127.0.0.1", "token": "t" * 32}
    with stand_ins(tmp_path, "own-board", hosts=by_network, step_timeout=1.0) as executor:
        executor.start(ignore)
        executor.execute(make_batch(1))
        with pytest.raises(EngineDeadError) as caught:
            executor.sample(1).result(60)
    assert "rank 1 never entered it" in str(caught.value) and "not known here" not in str(caught.value)


def test_a_stopped_worker_is_found_without_traffic(tmp_path):
    told: list[EngineDeadError] = []
    with stand_ins(tmp_path, step_timeout=1.0) as executor:
        executor.watch(told.append)
        executor.start(ignore)
        os.kill(pids(tmp_path)[1], signal.SIGSTOP)
        wait_until(lambda: told)
        assert "the idle check of all ranks did not end" in str(told[0]) and "is stopped" in str(told[0])


def test_idle_ranks_meet_and_steps_go_on_afterwards(tmp_path):
    with stand_ins(tmp_path) as executor:
        executor.start(ignore)
        wait_until(lambda: len(list(tmp_path.glob("idle.*.0"))) >= 2)
        assert run_step(executor, 1) == [(0, [1]), (1, [2])]


def test_workers_survive_the_signals_of_a_terminal(tmp_path):
    with stand_ins(tmp_path) as executor:
        executor.start(ignore)
        for pid in pids(tmp_path):
            os.kill(pid, signal.SIGINT)
            os.kill(pid, signal.SIGTERM)
        assert run_step(executor, 1) == [(0, [1]), (1, [2])]


OWNER = """
import sys, time
from pathlib import Path
from tests.executor.engines import ignore, stand_ins
with stand_ins(Path(sys.argv[1]), num_ranks=3) as executor:
    executor.start(ignore)
    print("up", flush=True)
    time.sleep(600)
"""


def test_workers_end_with_the_process_that_started_them_even_one_that_is_stopped(tmp_path):
    owner = subprocess.Popen([sys.executable, "-c", OWNER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None and owner.stdout.readline() == "up\n"
    workers = pids(tmp_path)
    os.kill(workers[2], signal.SIGSTOP)
    owner.kill()
    owner.wait()
    # Orphans are reaped by whoever adopts them, which may take its time: a zombie runs no more.
    wait_until(lambda: not any(is_running(pid) for pid in workers))
    owner.stdout.close()


def test_a_worker_imports_no_torch_before_its_setup_and_never_what_it_does_not_need():
    code = (
        "import sys, shoal.worker.__main__, shoal.executor.distributed, shoal.executor.registry\n"
        "print([name for name in ('torch', 'transformers', 'ray', 'fastapi') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
