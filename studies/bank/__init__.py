"""A bank of adapters of several tasks in several forms, from which the studies of fusion and of interference are computed."""
