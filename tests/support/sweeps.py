"""Values for the grid of a sweep over tiny parts."""

PERCEIVER = "{type: perceiver, depth: 1, num_heads: 2, head_dim: 16, num_latents: 4}"
CROSS_ATTENTION = "{type: cross-attention, num_heads: 2, head_dim: 16, every: 2}"
