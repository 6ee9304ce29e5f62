"""Folders of pictures become scores: what `evaluate.py` is made of."""
