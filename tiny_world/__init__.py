"""A small drawn world, and a Stable Diffusion trained on it, for demos, tests and benchmarks without a network."""

from pathlib import Path

EMBEDDED_BASE = Path(__file__).resolve().parent / "base"
"""Folder of the embedded base, in diffusers' format."""
