"""Which mask is good alone and fused: all masks at three densities, and the forms of the bank."""
