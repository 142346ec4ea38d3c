"""From one set of names to another: prefixes, fused weights, components, and tables of known models."""
