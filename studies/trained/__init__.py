"""What trained adapters are like: strength, distances, ranks and singular values."""
