"""Fits: sparse values and supports that keep what a source does to a model, not only what it does to the weights."""
