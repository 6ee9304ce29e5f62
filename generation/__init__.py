"""A configuration file becomes pictures: what `generate_images.py` is made of."""
