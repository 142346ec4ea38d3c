"""What share of the entries a fine-tune needs as models grow, on small models trained from scratch."""
