"""The commands, one module each; no arithmetic in here."""
