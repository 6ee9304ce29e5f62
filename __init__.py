"""Several personal subjects in one picture, each where you want it."""

__version__ = "0.1.0"
