"""The page on which layouts are drawn: the pipelines and `generate_images.py`, with a mouse."""
