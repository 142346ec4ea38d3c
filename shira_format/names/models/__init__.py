"""Known models: the names of their tensors in other programs, a file per model."""
