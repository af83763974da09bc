"""Which files of a model's directory hold weights; needs no torch."""

from __future__ import annotations

# How files begin that hold none: Mistral's own format stands beside the Hugging Face one under the first of these; the
# others are the state of a training.
NO_WEIGHTS = ("consolidated", "training_args", "optimizer", "scheduler")
