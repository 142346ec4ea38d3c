"""How quality depends on examples and on entries."""
