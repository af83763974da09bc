"""What is rendered: valid by the published schemas, and consistent in itself."""

from __future__ import annotations

import itertools
import json
from typing import Any

import jsonschema
import pytest
import yaml

from shoal.cli.main import load_command, main
from shoal.cluster.k8s.forms import render
from shoal.cluster.k8s.output import to_yaml
from shoal.cluster.k8s.request import RenderRequest, Storage
from shoal.config.knobs import KnobTable
from shoal.config.options import RouterOptions
from shoal.config.sources import SERVE_SECTIONS, options_from_arguments
from shoal.errors import ConfigError
from tests.cluster.k8s import examples
from tests.cluster.k8s.schemas import check, pod_templates

STORAGES = [
    Storage(claim="weights"),
    Storage(storage_class="nfs", size="1Ti"),
    Storage(bucket="weights"),
    Storage(
        bucket="weights",
        bucket_prefix="llm/",
        bucket_endpoint="https://s3.example",
        bucket_region="eu-1",
        mount_options=("uid=1",),
    ),
    Storage(
        bucket="weights",
        driver="oss.example",
        bucket_endpoint="oss.example",
        bucket_secret="oss",
        attributes={"path": "/"},
    ),
    Storage(host_path="/data/models"),
]
FORMS = {
    "deployment": {"gpus_per_pod": 4, "tensor_size": 4},
    "lws": {"gpus_per_pod": 4, "tensor_size": 4, "pipeline_size": 2, "pods_per_replica": 2},
    "rayservice": {"gpus_per_pod": 4, "tensor_size": 4, "pipeline_size": 2, "pods_per_replica": 2},
}


def request(form: str = "deployment", **changes: Any) -> RenderRequest:
    given = {
        "form": form, "name": "qwen", "namespace": "llm", "image": "registry.example/shoal:1", "model": "/models/q",
        "storage": STORAGES[0], "ray_version": "2.60.0", "replicas": 2, **FORMS[form], **changes,
    }  # fmt: skip
    return RenderRequest(**given)


def by_kind(manifests: list[dict[str, Any]], kind: str) -> dict[str, dict[str, Any]]:
    return {each["metadata"]["name"]: each for each in manifests if each["kind"] == kind}


def server_containers(manifests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found = [each for manifest in manifests for template in pod_templates(manifest) for each in [template["spec"]]]
    return [
        container for spec in found for container in spec["containers"] if container["name"] in ("server", "ray-worker")
    ]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("storage", STORAGES, ids=range(len(STORAGES)))
def test_every_object_is_valid(form: str, storage: Storage) -> None:
    for changes in (
        {},
        {"router": False, "existing_secret": "mine", "runtime_class": "nvidia", "image_pull_secret": "r"},
    ):
        manifests = render(request(form, storage=storage, node_selector={"a.example/b": "c"}, **changes))
        for manifest in yaml.safe_load_all(to_yaml(manifests)):
            check(manifest)


@pytest.mark.parametrize("form", FORMS)
def test_a_cpu_cluster_and_the_embedded_model(form: str) -> None:
    manifests = render(
        request(form, model="shoal-tiny", storage=Storage(), gpus_per_pod=0, tensor_size=2, pipeline_size=1)
    )
    for manifest in manifests:
        check(manifest)
        for template in pod_templates(manifest):
            assert "tolerations" not in template["spec"]
            assert "nvidia" not in json.dumps(template)
    assert "--device=cpu" in to_yaml(manifests)


@pytest.mark.parametrize("form", ["deployment", "lws"])
def test_an_autoscaler_owns_the_number(form: str) -> None:
    manifests = render(request(form, max_replicas=5))
    (scaler,) = by_kind(manifests, "HorizontalPodAutoscaler").values()
    check(scaler)
    target = scaler["spec"]["scaleTargetRef"]
    (scaled,) = [
        each for each in manifests if each["kind"] == target["kind"] and each["metadata"]["name"] == target["name"]
    ]
    assert scaled["apiVersion"] == target["apiVersion"] and "replicas" not in scaled["spec"]
    assert (scaler["spec"]["minReplicas"], scaler["spec"]["maxReplicas"]) == (2, 5)
    check(scaled)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "replicas"), "two"),
        (("spec", "replicaz"), 2),
        (("spec", "selector"), []),
        (("spec", "template", "spec", "containers", 0, "livenessProbe", "httpget"), {}),
    ],
)
def test_the_schemas_can_fail(path: tuple[Any, ...], value: Any) -> None:
    deployment = by_kind(render(request()), "Deployment")["qwen-server"]
    check(deployment)
    node: Any = deployment
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        check(deployment)


@pytest.mark.parametrize("form", ["lws", "rayservice"])
def test_the_schemas_of_custom_resources_can_fail(form: str) -> None:
    kind = {"lws": "LeaderWorkerSet", "rayservice": "RayService"}[form]

    def broken(*path: str, value: Any) -> dict[str, Any]:
        (manifest,) = by_kind(render(request(form)), kind).values()
        node = manifest
        for key in path[:-1]:
            node = node[key]
        node[path[-1]] = value
        return manifest

    with pytest.raises(jsonschema.ValidationError):
        check(broken("spec", "replicaz", value=1))
    deep = {
        "lws": ("spec", "leaderWorkerTemplate", "workerTemplate", "spec", "hostnetwork"),
        "rayservice": ("spec", "rayClusterConfig", "headGroupSpec", "template", "spec", "hostnetwork"),
    }[form]
    with pytest.raises(jsonschema.ValidationError):
        check(broken(*deep, value=True))


@pytest.mark.parametrize("form", ["deployment", "lws"])
def test_selectors_meet_the_pods_they_are_for(form: str) -> None:
    manifests = render(request(form))
    labels = [template["metadata"]["labels"] for manifest in manifests for template in pod_templates(manifest)]
    if form == "lws":  # its controller adds these
        labels += [
            {**each, "leaderworkerset.sigs.k8s.io/worker-index": str(index)} for each in labels for index in (0, 1)
        ]
    services = by_kind(manifests, "Service")
    assert set(services) == {"qwen", "qwen-servers"}
    for selector in [services[name]["spec"]["selector"] for name in services] + [
        each["spec"]["selector"]["matchLabels"] for each in by_kind(manifests, "PodDisruptionBudget").values()
    ]:
        assert any(selector.items() <= each.items() for each in labels), selector
    router, servers = services["qwen"]["spec"]["selector"], services["qwen-servers"]["spec"]["selector"]
    assert not any(router.items() <= each.items() and servers.items() <= each.items() for each in labels)
    if form == "lws":
        assert servers["leaderworkerset.sigs.k8s.io/worker-index"] == "0"
    without = by_kind(render(request(form, router=False)), "Service")
    assert without["qwen"]["spec"]["selector"] == servers
    assert without["qwen"]["spec"]["ports"][0]["targetPort"] == 8000


@pytest.mark.parametrize("form", FORMS)
def test_every_reference_leads_somewhere(form: str) -> None:
    manifests = render(request(form, storage=STORAGES[2]))
    (secret,) = by_kind(manifests, "Secret").values()
    assert all(manifest["metadata"].get("namespace", "llm") == "llm" for manifest in manifests)
    claims = by_kind(manifests, "PersistentVolumeClaim")
    for template in itertools.chain.from_iterable(pod_templates(manifest) for manifest in manifests):
        spec = template["spec"]
        volumes = {volume["name"]: volume for volume in spec["volumes"]}
        for volume in volumes.values():
            if "persistentVolumeClaim" in volume:
                assert volume["persistentVolumeClaim"]["claimName"] in claims
        for container in [*spec["containers"], *spec.get("initContainers", [])]:
            assert {mount["name"] for mount in container["volumeMounts"]} <= set(volumes)
            for variable in container["env"]:
                reference = variable.get("valueFrom", {}).get("secretKeyRef")
                if reference:
                    assert reference["name"] == "qwen-secret" and reference["key"] in secret["stringData"]
    (claim,), (volume,) = claims.values(), by_kind(manifests, "PersistentVolume").values()
    assert claim["spec"]["volumeName"] == volume["metadata"]["name"]
    assert volume["spec"]["claimRef"] == {"name": claim["metadata"]["name"], "namespace": "llm"}


@pytest.mark.parametrize("form", FORMS)
def test_pods_have_no_rights_and_one_host_each(form: str) -> None:
    manifests = render(request(form))
    for template in itertools.chain.from_iterable(pod_templates(manifest) for manifest in manifests):
        spec = template["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True and spec["securityContext"]["runAsUser"] == 10001
        assert spec["automountServiceAccountToken"] is False and spec["enableServiceLinks"] is False
        for container in [*spec["containers"], *spec.get("initContainers", [])]:
            assert container["securityContext"]["readOnlyRootFilesystem"] is True
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert container["resources"]["requests"]["memory"] and container["resources"]["requests"]["cpu"]
            if container["name"] in ("server", "ray-worker"):
                (term,) = spec["affinity"]["podAntiAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
                assert term["topologyKey"] == "kubernetes.io/hostname"
                assert term["labelSelector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
                assert container["resources"]["limits"]["nvidia.com/gpu"] == 4
                shm = [volume for volume in spec["volumes"] if volume["name"] == "shm"]
                assert shm == [{"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "2Gi"}}]
    assert "podAntiAffinity" not in to_yaml(render(request(form, one_pod_per_host=False, router=False)))


def test_probes_and_an_orderly_end() -> None:
    manifests = render(request(drain_seconds=90, start_seconds=600))
    for name, port in (("qwen-server", 8000), ("qwen-router", 9000)):
        spec = by_kind(manifests, "Deployment")[name]["spec"]["template"]["spec"]
        (container,) = spec["containers"]
        assert container["readinessProbe"]["httpGet"] == {"path": "/readyz", "port": port}
        assert container["livenessProbe"]["httpGet"] == {"path": "/livez", "port": port}
        sleep = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
        assert "--shutdown-timeout=90" in container["args"]
        assert spec["terminationGracePeriodSeconds"] >= sleep + 90 + 5
    start = server_containers(manifests)[0]["startupProbe"]
    assert start["failureThreshold"] * start["periodSeconds"] == 600


@pytest.mark.parametrize("form", FORMS)
def test_flags_are_those_of_the_commands(form: str) -> None:
    """What the containers run is parsed by the commands' own parsers."""
    changes = {"served_model_name": ("a", "b"), "max_model_len": 4096, "serve_arguments": ("--max-num-seqs=64",)}
    manifests = render(request(form, **changes))
    seen = []
    for template in itertools.chain.from_iterable(pod_templates(manifest) for manifest in manifests):
        for container in template["spec"]["containers"]:
            match container.get("command"):
                case ["shoal", "serve"]:
                    arguments = [each.replace("$(LWS_WORKER_INDEX)", "1") for each in container["args"]]
                    seen.append(options_from_arguments(arguments, SERVE_SECTIONS, "model"))
                case ["shoal", "router"]:
                    given = [each for each in container["args"] if not each.startswith("--config")]
                    (router,) = options_from_arguments(given, (RouterOptions,))
                    assert (router.host, router.port) == ("0.0.0.0", 9000)
    if form == "rayservice":
        service = by_kind(manifests, "RayService")["qwen"]
        (application,) = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]
        seen.append(options_from_arguments(application["args"]["flags"], SERVE_SECTIONS, "model"))
    assert len(seen) == {"deployment": 1, "lws": 2, "rayservice": 1}[form]
    for model, _, scheduler, parallel, server in seen:
        assert (model.model, model.max_model_len, model.device) == ("/models/q", 4096, "cuda")
        assert scheduler.max_num_seqs == 64 and server.served_model_name == ["a", "b"]
        assert parallel.tensor_parallel_size == 4
        assert parallel.pipeline_parallel_size == (1 if form == "deployment" else 2)
    if form == "lws":
        assert [(each[3].nnodes, each[3].node_rank) for each in seen] == [(2, 0), (2, 1)]
        assert [each[3].master_addr for each in seen] == ["$(SHOAL_HOST_IP)", "$(LWS_LEADER_ADDRESS)"]


def test_variables_of_the_manifests_are_options_or_known() -> None:
    names = {
        knob.name for name in ("serve", "router") for knob in KnobTable(load_command(name).commands[0].sections).knobs
    }
    known = {"HOST_IP", "CLUSTER_TOKEN", "CACHE_DIR"}
    for manifest in render(request()):
        for template in pod_templates(manifest):
            for container in template["spec"]["containers"]:
                for variable in container["env"]:
                    name = variable["name"].removeprefix("SHOAL_")
                    assert variable["name"] == "HOME" or name in known or name.lower() in names, name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "Qwen_7B"}, "--name must be lower-case"),
        ({"name": "q" * 60}, "--name may have 48 characters"),
        ({"image": ""}, "--image must name a container image"),
        (
            {"tensor_size": 8},
            "tensor 8 × pipeline 1 × data 1 is 8 ranks, and a replica has 4 GPUs .* --pods-per-replica 2",
        ),
        ({"pods_per_replica": 2}, "a Deployment's pods are independent"),
        ({"form": "lws", "pods_per_replica": 3}, "cannot be shared evenly by 3 pods"),
        ({"form": "rayservice", "max_replicas": 3}, "a RayService has its own scaling"),
        ({"max_replicas": 1}, "--max-replicas 1 is below --replicas 2"),
        ({"memory": "16"}, "--memory 16 is less than 1Mi"),
        ({"memory": "lots"}, "--memory must be an amount as Kubernetes writes it"),
        ({"shm_size": "16Gi"}, "--shm-size 16Gi counts as a part of --memory 16Gi"),
        ({"storage": Storage()}, "nothing says what that is: --claim NAME, --storage-class"),
        ({"storage": Storage(claim="a", bucket="b")}, "--claim and --bucket both say"),
        ({"model": "org/q"}, "--model must be below it, such as /models/q"),
        ({"storage": Storage(host_path="models")}, "--host-path must be an absolute path"),
        ({"serve_arguments": ("--port=1",)}, "the manifests set port themselves"),
        ({"serve_arguments": ("max-num-seqs",)}, "--serve-arg must be a flag"),
        ({"node_selector": {"a b": "c"}}, "--node-selector must be LABEL=VALUE"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        request(**changes)


def test_the_command_prints_or_writes(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["k8s", "render", "/models/q", "--image", "r/shoal:1", "--claim", "w", "--name", "q"]
    assert main(arguments) == 0
    printed = list(yaml.safe_load_all(capsys.readouterr().out))
    assert [each["kind"] for each in printed][:2] == ["Secret", "Deployment"]
    for manifest in printed:
        check(manifest)
    directory = tmp_path / "out"
    assert main([*arguments, "--output", str(directory)]) == 0
    paths = sorted(directory.iterdir())
    assert [yaml.safe_load(path.read_text())["kind"] for path in paths] == [each["kind"] for each in printed]
    assert paths[0].stat().st_mode & 0o777 == 0o600
    before = paths[0].read_text()
    assert main([*arguments, "--replicas", "3", "--output", str(directory)]) == 0
    assert paths[0].read_text() == before and "it was there, and stays" in capsys.readouterr().out
    assert "replicas: 3" in paths[1].read_text()
    assert main(["k8s", "render", "/models/q", "--claim", "w"]) == 2
    assert "which image?" in capsys.readouterr().err
    assert main(["k8s", "render", "--image", "i"]) == 2
    assert "which model?" in capsys.readouterr().err
    assert main([*arguments, "--output", str(paths[0])]) == 2
    assert "cannot write to" in capsys.readouterr().err


@pytest.mark.parametrize("name", examples.EXAMPLES)
def test_the_examples_are_what_is_rendered_now(name: str) -> None:
    assert sorted(path.name for path in examples.DIRECTORY.iterdir()) == sorted(examples.EXAMPLES)
    written = (examples.DIRECTORY / name).read_text(encoding="utf-8")
    assert written == examples.text(name), "python -m tests.cluster.k8s.examples writes them anew"
    for manifest in yaml.safe_load_all(written):
        check(manifest)
