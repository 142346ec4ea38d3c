"""Speeds and sizes beside those of peers, in one run on one machine: ``python -m benchmarks``."""
