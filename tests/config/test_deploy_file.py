"""The file of `shoal deploy`: what it may hold, and errors that name the line and what would work."""

from __future__ import annotations

import pytest

from shoal.config.deploy_file import DeployPlan, Layout, ReplicaLimits, ScaleRules, read_deploy_file
from shoal.errors import ConfigError

GOOD = """\
models:
  - name: tiny
    model: shoal-tiny
    replicas: {min: 1, max: 3}
    layout:
      num_cpus: 0.5
    serve:
      device: cpu
      max-num-seqs: 4
      enable_prefix_caching: false
      allowed_origins: ["*", "http://a b"]
    scale: {target_queue: 3, down_after: 5}
    drain_timeout: 7
  - model: /models/big
    replicas: 2
    layout: {tensor_parallel_size: 2}
router:
  port: 9100
  policy: prefix-aware
  aliases: {small: tiny}
"""


@pytest.fixture
def read(tmp_path):
    def read(text):
        path = tmp_path / "deploy.yaml"
        path.write_text(text)
        return read_deploy_file(str(path))

    return read


def test_a_whole_file(read):
    plan = read(GOOD)
    tiny, big = plan.models
    assert tiny.replicas == ReplicaLimits(min=1, max=3) and tiny.layout == Layout(num_cpus=0.5)
    assert tiny.scale == ScaleRules(target_queue=3, down_after=5) and tiny.drain_timeout == 7
    assert big.name == "/models/big" and big.replicas == ReplicaLimits(min=2, max=2)
    assert (plan.router.host, plan.router.port) == ("127.0.0.1", 9100)
    assert plan.router.options == {"port": 9100, "policy": "prefix-aware"}
    assert plan.router.lists == {"aliases": {"small": "tiny"}}
    assert DeployPlan.decode(plan.encode()) == plan


def test_the_flags_are_those_of_serve(read):
    from shoal.config.sources import SERVE_SECTIONS, options_from_arguments

    plan = read(GOOD.replace("parallel_size: 2}", "parallel_size: 2, pipeline_parallel_size: 2}"))
    model, cache, scheduler, parallel, server = options_from_arguments(plan.models[0].flags(), SERVE_SECTIONS, "model")
    assert (model.model, model.device, scheduler.max_num_seqs) == ("shoal-tiny", "cpu", 4)
    assert cache.enable_prefix_caching is False and server.served_model_name == ["tiny"]
    assert server.allowed_origins == ["*", "http://a b"]
    parallel = options_from_arguments(plan.models[1].flags(), SERVE_SECTIONS, "model")[3]
    assert (parallel.tensor_parallel_size, parallel.pipeline_parallel_size) == (2, 2)


def test_a_partition_of_layers_survives_the_flags(read):
    from shoal.config.sources import SERVE_SECTIONS, options_from_arguments

    plan = read(GOOD.replace("device: cpu", "pipeline_layer_partition: [3, 2]"))
    parallel = options_from_arguments(plan.models[0].flags(), SERVE_SECTIONS, "model")[3]
    assert parallel.pipeline_layer_partition == "3,2"


def test_a_revision_changes_with_what_running_replicas_cannot_take_over(read):
    def revision(text):
        return read(text).models[0].revision

    same = [
        GOOD.replace("max: 3", "max: 5"),
        GOOD.replace("down_after: 5", "down_after: 6"),
        GOOD.replace("port: 9100", "port: 9101"),
        GOOD.replace("      device: cpu\n      max-num-seqs: 4", "      max_num_seqs: 4\n      device: cpu"),
    ]
    other = [GOOD.replace("cpus: 0.5", "cpus: 1"), GOOD.replace("seqs: 4", "seqs: 5"), GOOD.replace("shoal-tiny", "/a")]
    assert {revision(text) for text in same} == {revision(GOOD)}
    assert revision(GOOD) not in {revision(text) for text in other}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("num_cpus", "num_cpu", r"line 6: models\[0\].layout: num_cpu is not an option; did you mean num_cpus\?"),
        ("min: 1", "min: 5", r"line 4: models\[0\].replicas has min 5 above max 3"),
        ("min: 1", "min: 0", r"line 4: models\[0\].replicas.min must be an integer, 1 or more; got 0"),
        ("replicas: 2", "replicas: 0", r"line 15: models\[1\].replicas must be 1 or more; got 0"),
        ("port: 9100", "prot: 9100", r"line 18: router: prot is not an option; did you mean port\?"),
        ("port: 9100", "port: 0", "line 18: router.port must be a port that clients know"),
        ("port: 9100", "ssl_certfile: a", "router has ssl_certfile, which is not for a deployment to set"),
        ("port: 9100", "internal-token: a", "router has internal_token, which is not for a deployment to set"),
        ("device: cpu", "internal_token: a", "serve.internal_token is not for a deployment to set; write nothing"),
        ("port: 9100", "backend: [a]", "line 18: router.backend is not for a deployment to set"),
        ("device: cpu", "host: x", r"line 8: models\[0\].serve.host is not for a deployment to set; write no address"),
        ("device: cpu", "served-model-name: [a]", r"line 8: .*served_model_name .*; write models\[\].name, and al"),
        ("device: cpu", "tensor-parallel-size: 2", r"line 8: models\[0\].serve.tensor_parallel_size .*; write layout"),
        ("device: cpu", "uvicorn_log_level: chatty", "line 8: .*must be one of debug"),
        ("name: tiny", "nmae: tiny", r"line 2: models\[0\].nmae is not known; did you mean name\?"),
        ("name: tiny", "name: a b", "line 2: models.0..name must be letters.*got 'a b'"),
        ("name: tiny", "name: /models/big", r"line 14: models\[1\] is a second model of the name '/models/big'"),
        ("    model: shoal-tiny\n", "", r"line 2: models\[0\] has no `model:`"),
        ("target_queue: 3", "target_queue: -1", "line 12: .*target_queue must be a number, 0 or more; got -1"),
        ("target_queue: 3", "target_queue: many", "line 12: .*target_queue must be a number, 0 or more; got 'many'"),
        ("models:", "modles:", r"line 1: modles is not known; did you mean models\?"),
        ("device: cpu", "device: cpu\n      device: cuda", r"line 9: .*second time \(the first is in line 8\)"),
        ("device: cpu", "reasoning_parser: deepseek", r"line 8: models\[0\].serve: reasoning_parser is not supported"),
        ("router:\n", "router: ]\n", "line 17 is not YAML"),
        ("    layout:\n      num_cpus: 0.5\n", "    layout: 3\n", r"line 5: models\[0\].layout must hold .*found 3"),
    ],
)
def test_errors_name_the_line_and_what_would_work(read, old, new, message):
    assert old in GOOD
    text = GOOD.replace(old, new, 1)
    with pytest.raises(ConfigError, match=message):
        read(text)


@pytest.mark.parametrize("text", ["", "router: {}\n", "- a\n", "models: []\n", "models: {a: 1}\n"])
def test_what_is_no_deployment(read, text):
    with pytest.raises(ConfigError, match="models|name: value"):
        read(text)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match="cannot read .*missing.yaml: No such file"):
        read_deploy_file(str(tmp_path / "missing.yaml"))
