"""The arithmetic of entries: changes of weights, alignment and mixing of several adapters, checks against the base."""
