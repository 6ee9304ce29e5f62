"""A small drawn world, and Stable Diffusions trained on it, for demos, tests and benchmarks without a network."""

import json
from pathlib import Path
from typing import Any

from multisubject.base_models import native_size

EMBEDDED_BASE = Path(__file__).resolve().parent / "base"
"""Folder of the embedded base, in diffusers' format."""

EMBEDDED_BASE_XL = EMBEDDED_BASE.with_name("base_xl")
"""Folder of the embedded base of Stable Diffusion XL's shape."""


def picture_size(base: str | Path) -> int:
    """Side in pixels of the square pictures that a base draws, as its UNet's and its VAE's configurations say.

    Args:
        base: folder in diffusers' format.

    Raises:
        ValueError: it is no such folder, or its UNet does not say a size.
    """
    configs: dict[str, dict[str, Any]] = {}
    for part, key in (("unet", "sample_size"), ("vae", "block_out_channels")):
        path = Path(base, part, "config.json")
        if not path.is_file():
            raise ValueError(
                f"base {str(base)!r} has no {part}/config.json; expected the folder of a base in diffusers' format, "
                f"such as {str(EMBEDDED_BASE)!r}."
            )
        configs[part] = json.loads(path.read_text(encoding="utf-8"))
        if not configs[part].get(key):
            raise ValueError(
                f"base {str(base)!r}: its {part}/config.json has no {key}; expected one, as diffusers saves."
            )
    return min(native_size(configs["unet"], configs["vae"]))
