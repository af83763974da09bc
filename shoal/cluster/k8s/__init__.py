"""Manifests for Kubernetes (`shoal k8s render`), and the small programs that run in their pods."""
