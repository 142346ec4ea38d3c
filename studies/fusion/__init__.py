"""What adapters lose when they are fused, by form and by merge method."""
