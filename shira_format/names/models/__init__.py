"""Known models: for each, its tensors in the name spaces of the programs that use it.

A module here is one model: a table, and how the model is told from others.
"""
