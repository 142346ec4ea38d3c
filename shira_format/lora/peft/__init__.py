"""PEFT's adapters: the files that ``save_pretrained`` writes."""
