"""The examples in deploy/k8s/: `python -m tests.cluster.k8s.examples` writes them anew."""

from __future__ import annotations

from pathlib import Path

from shoal.cluster.k8s.forms import render
from shoal.cluster.k8s.output import to_yaml
from shoal.cluster.k8s.request import RenderRequest, Storage

DIRECTORY = Path(__file__).parents[3] / "deploy" / "k8s"
_IMAGE = "registry.example/shoal:cuda"

# Their Secret is made by hand or by a tool: keys do not belong into a repository.
EXAMPLES = {
    "deployment.yaml": RenderRequest(
        form="deployment", name="shoal", namespace="llm", image=_IMAGE, model="/models/Qwen2.5-7B-Instruct",
        served_model_name=("qwen",), replicas=2, max_replicas=4, existing_secret="shoal-secret",
        storage=Storage(bucket="weights", bucket_region="eu-central-1"),
    ),
    "lws.yaml": RenderRequest(
        form="lws", name="shoal", namespace="llm", image=_IMAGE, model="/models/Qwen2.5-32B-Instruct",
        served_model_name=("qwen",), replicas=2, gpus_per_pod=4, pods_per_replica=2, tensor_size=4, pipeline_size=2,
        cpus="10", memory="30Gi", existing_secret="shoal-secret", storage=Storage(claim="weights"),
    ),
    "rayservice.yaml": RenderRequest(
        form="rayservice", name="shoal", namespace="llm", image=_IMAGE, model="/models/Qwen2.5-32B-Instruct",
        served_model_name=("qwen",), replicas=1, gpus_per_pod=4, pods_per_replica=2, tensor_size=4, pipeline_size=2,
        cpus="10", memory="30Gi", existing_secret="shoal-secret", storage=Storage(claim="weights"),
        ray_version="2.60.0",
    ),
}  # fmt: skip


def text(name: str) -> str:
    return to_yaml(render(EXAMPLES[name]))


if __name__ == "__main__":
    for each in EXAMPLES:
        (DIRECTORY / each).write_text(text(each), encoding="utf-8")
