"""Which measure of two adapters foretells what they lose when they are added."""
