"""Which form is good alone and fused: computed from bank, fusion and the study of masks."""
