"""`shoal deploy`: which command is meant, what is refused before any cluster is touched, and what is shown."""

from __future__ import annotations

import pytest

from shoal.cli.deploy import COMMAND, _describe, _failure, _progress
from shoal.cli.main import main
from shoal.cluster.deploy.records import DeployStatus, ModelStatus, ReplicaStatus


def test_a_file_is_deployed_and_the_others_are_commands():
    for arguments, name in (
        (["x.yaml"], "deploy"),
        (["--no-wait", "x.yaml"], "deploy"),
        (["status", "--json"], "deploy status"),
        (["stop"], "deploy stop"),
    ):
        command, rest = COMMAND.select(arguments)
        assert command.name == name and rest == (arguments if name == "deploy" else arguments[1:])
    options, cluster = COMMAND.commands[0].parse(["x.yaml", "--no-wait", "--address", "10.0.0.1"])
    assert (options.deploy_file, options.wait, cluster.address) == ("x.yaml", False, "10.0.0.1")


def test_what_is_wrong_is_told_before_a_cluster_is_begun(tmp_path, capsys):
    path = tmp_path / "deploy.yaml"
    path.write_text("models:\n  - modle: shoal-tiny\n")
    assert main(["deploy", str(path)]) == 2
    assert f"{path}, line 2: models[0].modle is not known; did you mean model?" in capsys.readouterr().err
    assert main(["deploy", str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml: No such file" in capsys.readouterr().err
    assert main(["deploy"]) == 2
    assert "which deployment? shoal deploy CONFIG.yaml" in capsys.readouterr().err
    assert main(["deploy", str(path), "--adress", "x"]) == 2
    assert "did you mean --address?" in capsys.readouterr().err


@pytest.fixture
def status():
    replicas = [
        ReplicaStatus(
            name="tiny-1",
            revision="abc",
            state="ready",
            node="10.0.0.1",
            url="http://10.0.0.1:4000",
            pid=42,
            uptime=61.4,
            restarts=1,
            waiting=2,
            running=4,
            kv_usage=0.5,
            in_router=True,
        ),
        ReplicaStatus(name="tiny-2", revision="abc", state="starting", why="waits until a node has 1 CPUs for it"),
    ]
    model = ModelStatus(
        name="tiny", revision="abc", wanted=2, min=1, max=3, why="9 requests wait", settled=False, replicas=replicas
    )
    return DeployStatus(router_url="http://127.0.0.1:9000", router_state="ready", models=[model])


def test_what_is_shown(status):
    lines = _describe(status)
    assert lines[:3] == [
        "router  http://127.0.0.1:9000/v1  ready",
        "",
        "tiny  2 wanted (1 to 3), under way; 9 requests wait",
    ]
    assert [" ".join(line.split()) for line in lines[3:]] == [
        "replica revision state node url pid up restarts wait run KV",
        "tiny-1 abc ready 10.0.0.1 http://10.0.0.1:4000 42 61 s 1 2 4 50%",
        "tiny-2 abc starting (waits until a node has 1 CPUs for it) - - - - 0 0 0 0%",
    ]
    assert lines[3].index("node") == lines[4].index("10.0.0.1"), "in columns"
    assert _progress(status) == (
        "router: ready | tiny: 1 of 2 serve; tiny-2 starting (waits until a node has 1 CPUs for it)"
    )
    assert not _failure(status)


def test_a_failure_is_shown(status):
    status.models[0].failure = "tiny-3 ended before it was ready"
    assert _failure(status) == "tiny could not be deployed: tiny-3 ended before it was ready"
    assert "  the last change was not made: tiny-3 ended before it was ready" in _describe(status)
    status.failure = "the router does not come up: port 9000 is taken"
    assert _failure(status).endswith("; the router does not come up: port 9000 is taken")
