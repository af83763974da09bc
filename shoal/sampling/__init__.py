"""Choosing tokens from logits, batched on the device: SamplingState, Sampler, log-probabilities."""
