"""The compact profile (spec, sections 4.3, 5.9 and 5.10): an entropy coder, and what it codes: indices by class, values by step."""
