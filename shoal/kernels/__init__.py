"""GPU kernels in Triton, each beside what calls it. No layers and no weights: tensors in, tensors out."""
