"""From an adapter to PEFT's SHiRA folder."""
