"""Measures of one adapter, of pairs of adapters, and of LoRAs: size, rank, overlap, orthogonality, interference, effect."""
