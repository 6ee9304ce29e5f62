"""A small drawn world, and a Stable Diffusion trained on it, for demos, tests and benchmarks without a network."""
