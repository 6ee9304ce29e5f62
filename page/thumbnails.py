"""The thumbnails that come with the embedded bases: each subject as its base draws it.

python -m multisubject.page.thumbnails [NAME …]     # default: all
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from PIL import Image

from multisubject.page.subjects import THUMBNAILS
from multisubject.pictures import png_bytes
from multisubject.subject_file import write_atomically
from multisubject.tiny_world import EMBEDDED_BASE, EMBEDDED_BASE_XL

_EMBEDDINGS = Path(__file__).resolve().parent.parent / "embeddings"
_PROMPT = "a photo of <{}> in the snow"
_BOX = (0.15, 0.1, 0.85, 0.95)
_SEEDS = {"lucille": 1}  # elsewhere 0, which shows her twice


def draw_thumbnail(pipe: Any, name: str) -> Image.Image:
    """A loaded subject alone in the snow, in which none of the eight vanishes."""
    import torch

    return pipe(
        _PROMPT.format(name),
        layout=[{"subject": name, "box": _BOX}],
        num_inference_steps=50,
        guidance_scale=3.0,
        generator=torch.Generator("cpu").manual_seed(_SEEDS.get(name, 0)),
    ).images[0]


def main(names: list[str]) -> None:
    """Draw and save the thumbnails of `names`, for both bases."""
    import torch

    from multisubject.generation.base_model import BaseModel
    from multisubject.generation.making import load_pipeline

    for base, folder in ((EMBEDDED_BASE, _EMBEDDINGS), (EMBEDDED_BASE_XL, _EMBEDDINGS / "xl")):
        pipe = load_pipeline(BaseModel.read(str(base)), torch.device("cpu"), torch.float32, show_progress=False)
        for file in sorted(folder.glob("*.safetensors")):
            if not names or file.stem in names:
                pipe.load_subject(str(file))
                thumbnail = draw_thumbnail(pipe, file.stem)
                thumbnail = thumbnail.quantize(128, Image.Quantize.MEDIANCUT)  # a third of the bytes
                write_atomically(folder / THUMBNAILS / f"{file.stem}.png", png_bytes(thumbnail))


if __name__ == "__main__":
    main(sys.argv[1:])
