"""From an adapter to other formats: full checkpoints, PEFT's SHiRA, LoRA, CSR."""
