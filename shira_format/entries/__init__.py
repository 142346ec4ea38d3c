"""The arithmetic of entries: changes of a weight, alignment and mixing of several adapters, the check of the base."""
