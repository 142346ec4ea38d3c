"""From adapter files to full checkpoints, LoRAs, PEFT's SHiRA and matrices."""
