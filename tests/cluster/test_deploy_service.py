"""A program that is kept running on a node: its starts, its ends, and what is left when one of those around it dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from shoal.cluster.deploy.keeper import LOG_NAME
from shoal.cluster.deploy.service import Command, Condition, Service

# Says where it is; with "deaf" it does not mind SIGTERM; with "child" it leaves one behind.
PROGRAM = """
import os, signal, subprocess, sys, time
from pathlib import Path
kind, directory = sys.argv[1:]
if kind == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if kind == "child":
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    Path(directory, "child").write_text(str(child.pid))
Path(directory, f"pid-{os.getpid()}").touch()
print("hello", flush=True)
if kind == "fails":
    print("shoal: error: it is broken\\n  at some line", flush=True)
    sys.exit(3)
time.sleep(600)
"""


class Run:
    """A service of PROGRAM. `directory`: where it says that it is there."""

    def __init__(self, directory: Path, kind: str, *, grace: float = 10.0) -> None:
        self.directory, self.kind = directory, kind
        good = Condition(ready=True, running=2, waiting=1, kv_usage=0.5)
        self.condition = Condition(why="does not answer yet") if kind == "fails" else good
        self.service = Service(self._command, lambda url: self.condition, grace, "node", backoff=(0.05,))
        self.service.start()

    def _command(self, directory: Path) -> Command:
        arguments = [sys.executable, "-c", PROGRAM, self.kind, str(self.directory)]
        return Command(arguments, dict(os.environ), f"http://there:{len(self.pids()) + 1}")

    def pids(self) -> list[int]:
        """Of all lives of the program."""
        return [int(path.name.removeprefix("pid-")) for path in self.directory.glob("pid-*")]

    def until_ready(self, num_lives: int = 1) -> None:
        """Ready, and the program has said so: it is known to be there before it has begun."""
        wait_until(lambda: len(self.pids()) == num_lives and self.service.report().state == "ready")

    def keeper(self) -> int:
        assert self.service._keeper is not None
        return self.service._keeper.pid


def wait_until(condition: Callable[[], object], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.fixture
def start(tmp_path) -> Iterator[Callable[..., Run]]:
    runs: list[Run] = []

    def start(kind: str = "good", **options: float) -> Run:
        runs.append(Run(tmp_path, kind, **options))
        return runs[-1]

    yield start
    for run in runs:
        run.service.stop()
        assert run.service.wait_stopped(20)
        assert not [pid for pid in run.pids() if is_alive(pid)]
        assert not run.service.directory.exists()


def test_it_runs_and_ends_when_it_is_told_to(start):
    run = start()
    run.until_ready()
    report = run.service.report()
    assert (report.url, report.node, report.running, report.waiting, report.kv_usage) == (
        "http://there:1",
        "node",
        2,
        1,
        0.5,
    )
    assert run.pids() == [report.pid] and report.was_ready and report.started is not None
    wait_until(lambda: (run.service.directory / LOG_NAME).read_text() == "hello\n")
    run.service.stop()
    assert run.service.report().state in ("stopping", "stopped")
    assert run.service.wait_stopped(20)
    assert run.service.report().state == "stopped" and run.service.report().url is None


def test_it_is_started_again_when_it_ends(start):
    run = start()
    run.until_ready()
    os.kill(run.pids()[0], signal.SIGKILL)
    run.until_ready(2)
    report = run.service.report()
    assert (report.num_restarts, report.num_early_ends, report.url) == (1, 0, "http://there:2")


def test_one_that_does_not_come_up_is_counted_and_its_reason_told(start):
    run = start("fails")
    wait_until(lambda: run.service.report().num_early_ends >= 2)
    wait_until(lambda: run.service.report().why)
    assert run.service.report().why == "ended with 3: shoal: error: it is broken"
    assert not run.service.report().was_ready


def test_a_program_that_is_not_there_is_told(start):
    run = start()
    wait_until(lambda: run.pids())
    service = Service(lambda _: Command(["/there/is/none"], {}, "http://there:1"), lambda _: Condition(), 1.0, "node")
    service.start()
    wait_until(lambda: service.report().num_early_ends)
    assert "cannot start /there/is/none: No such file or directory" in service.report().why
    service.stop()
    assert service.wait_stopped(20)


def test_one_that_hangs_is_started_anew(start):
    run = start("deaf", grace=0.2)
    run.until_ready()
    run.condition = Condition(why="does not answer")
    wait_until(lambda: run.service.report().state == "unhealthy")
    assert run.service.report().why == "does not answer" and len(run.pids()) == 1
    (hung,) = run.pids()
    run.condition = Condition(why="does not answer", hopeless=True)
    wait_until(lambda: run.service.report().num_restarts)
    run.condition = Condition(ready=True)
    wait_until(lambda: run.service.report().state == "ready")
    assert not is_alive(hung)


def test_one_that_does_not_mind_sigterm_is_killed_after_its_grace(start):
    run = start("deaf", grace=0.2)
    run.until_ready()
    run.service.stop()
    assert run.service.wait_stopped(20)


def test_what_it_started_goes_with_it(start, tmp_path):
    run = start("child")
    wait_until(lambda: run.pids())
    child = int((tmp_path / "child").read_text())
    os.kill(run.pids()[0], signal.SIGKILL)
    wait_until(lambda: not is_alive(child))


def test_a_keeper_that_is_killed_takes_the_program_along(start):
    run = start()
    run.until_ready()
    first = run.pids()[0]
    os.kill(run.keeper(), signal.SIGKILL)
    wait_until(lambda: not is_alive(first))
    run.until_ready(2)
    assert run.service.report().num_restarts == 1


@pytest.mark.parametrize("kind", ["good", "deaf"])
def test_an_owner_that_is_killed_leaves_nothing(tmp_path, kind):
    code = (
        "import sys, time; from pathlib import Path; from tests.cluster.test_deploy_service import Run\n"
        "run = Run(Path(sys.argv[1]), sys.argv[2], grace=0.2)\n"
        "print(run.service.directory, flush=True); time.sleep(600)"
    )
    command = [sys.executable, "-c", code, str(tmp_path), kind]
    owner = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, process_group=0)
    assert owner.stdout is not None
    directory = Path(owner.stdout.readline().strip())
    wait_until(lambda: list(tmp_path.glob("pid-*")))
    (pid,) = [int(path.name.removeprefix("pid-")) for path in tmp_path.glob("pid-*")]
    os.killpg(owner.pid, signal.SIGKILL)  # the whole group, as Ray does
    owner.wait()
    owner.stdout.close()
    wait_until(lambda: not is_alive(pid) and not directory.exists())
