from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from shoal.cluster import processes
from shoal.network.node_record import ProcessRecord

# A leader with a child; both sleep until they are ended.
TREE = "import subprocess, sys, time; subprocess.Popen(['sleep', '60']); print('up', flush=True); time.sleep(60)"


@pytest.fixture
def tree():
    leader = subprocess.Popen([sys.executable, "-c", TREE], stdout=subprocess.PIPE, start_new_session=True)
    assert leader.stdout.readline() == b"up\n"
    yield leader
    for entry in processes.in_session(leader.pid):
        os.kill(entry.process.pid, signal.SIGKILL)
    leader.wait()
    leader.stdout.close()


def test_a_session_and_its_descendants(tree):
    members = processes.in_session(tree.pid)
    assert [entry.name for entry in members][1:] == ["sleep"]
    leader = members[0].process
    assert leader.pid == tree.pid
    assert processes.with_descendants([leader]) == [entry.process for entry in members]
    while not processes.command_line(members[1].process):  # a program that has just begun has none for a moment
        assert processes.is_alive(members[1].process)
    assert "sleep 60" in processes.command_line(members[1].process)
    # Without its parent the child is still of the session.
    processes.send([leader], signal.SIGKILL)
    tree.wait()
    assert [entry.name for entry in processes.in_session(tree.pid)] == ["sleep"]
    assert processes.with_descendants([leader]) == []


def test_a_pid_that_another_process_has_now_is_left_alone(tree):
    leader = processes.in_session(tree.pid)[0].process
    before = ProcessRecord(leader.pid, leader.started - 1)
    assert processes.is_alive(leader) and not processes.is_alive(before)
    processes.send([before], signal.SIGKILL)
    assert processes.wait_for_end([before], 0.0) == []
    assert tree.poll() is None and processes.alive([leader, before]) == [leader]


def test_waiting_for_the_end(tree):
    members = [entry.process for entry in processes.in_session(tree.pid)]
    assert processes.wait_for_end(members, 0.01) == members
    processes.send(members, signal.SIGTERM)
    # The leader is a zombie until this process waits for it, and counts as ended.
    assert processes.wait_for_end(members, 20) == []


def test_a_name_of_any_characters():
    import ctypes

    name = b"a) R (b 1"
    pid = os.fork()
    if pid == 0:
        ctypes.CDLL(None).prctl(15, name)  # PR_SET_NAME
        signal.pause()
    try:
        while (entry := processes.table()[pid]).name != name.decode():
            pass
        assert entry.parent == os.getpid()
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert pid not in processes.table()
