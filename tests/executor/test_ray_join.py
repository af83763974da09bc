"""Which Ray clusters a machine is part of, as its processes tell."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from shoal.executor.ray_join import clusters_here
from tests.namespaces import connected_hosts

_WAIT = "print('up', flush=True); import time; time.sleep(60)"
# As Ray starts its node's own process, as far as it matters here.
_LIKE_A_RAYLET = ("raylet", "-c", _WAIT, "--gcs-address=10.9.8.7:6379", "--temp-dir=/tmp")


@contextmanager
def running(process: subprocess.Popen[str]) -> Iterator[None]:
    assert process.stdout is not None and process.stdout.readline() == "up\n"
    try:
        yield
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_the_cluster_of_a_raylet_is_found():
    raylet = subprocess.Popen(_LIKE_A_RAYLET, executable=sys.executable, stdout=subprocess.PIPE, text=True)
    with running(raylet):
        assert "10.9.8.7:6379" in clusters_here()
    other = ["python", *_LIKE_A_RAYLET[1:]]
    with running(subprocess.Popen(other, executable=sys.executable, stdout=subprocess.PIPE, text=True)):
        assert "10.9.8.7:6379" not in clusters_here()


def test_those_of_another_network_namespace_are_another_machines():
    with connected_hosts(1) as network:
        (host,) = network.hosts
        start = f'exec -a raylet {sys.executable} -c "{_WAIT}" --gcs-address=10.9.8.7:6379'
        with running(host.popen("bash", "-c", start, stdout=subprocess.PIPE, text=True)):
            assert "10.9.8.7:6379" not in clusters_here()
            look = "from shoal.executor.ray_join import clusters_here; print(*clusters_here())"
            assert host.python(look) == "10.9.8.7:6379\n"
