"""The base that a benchmark runs on: what depends on it is asked of its folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from multisubject.base_models import SDXL, Architecture
from multisubject.generation.base_model import BaseModel
from multisubject.generation.making import pipeline_class
from multisubject.tiny_world.scenes import World

ROOT = Path(__file__).resolve().parents[1]
"""The repository, which holds the bases and their subjects."""


@dataclass(frozen=True)
class DrawnBase:
    """A base of the drawn world, of any architecture that has a pipeline here.

    Args:
        folder: in diffusers' format.
        embeddings: folder of its subjects, `{name}.safetensors`.
        architecture: its family.
        world: the drawn world, at the size of the base's pictures.
    """

    folder: Path
    embeddings: Path
    architecture: Architecture
    world: World

    @classmethod
    def read(cls, folder: Path, embeddings: Path | None = None) -> DrawnBase:
        """Ask the base in a folder; without `embeddings` its subjects are the shipped ones of its architecture.

        Raises ValueError for a folder that is none of a base.
        """
        if not folder.is_dir():
            raise ValueError(f"--base: {folder} is no folder; expected one of a base in diffusers' format.")
        model = BaseModel.read(str(folder))
        shipped = ROOT / "embeddings"
        shipped = shipped / "xl" if model.architecture is SDXL else shipped
        return cls(folder, embeddings or shipped, model.architecture, World(image_size=model.size[0]))

    @property
    def name(self) -> str:
        """What results call the base: its path in this repository, or elsewhere its folder's own name."""
        folder = self.folder.resolve()
        return folder.relative_to(ROOT).as_posix() if folder.is_relative_to(ROOT) else folder.name

    def load(self, names: Sequence[str] = (), *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Any:
        """This project's pipeline for the base, with the subjects `names` loaded, silent.

        Raises ValueError for a subject that is not there, or not of this base.
        """
        missing = [name for name in names if not self.subject_file(name).is_file()]
        if missing:
            raise ValueError(
                f"--embeddings: {self.embeddings} has no {', '.join(f'{name}.safetensors' for name in missing)}; "
                f"expected subjects of {self.name}, from train_residual.py."
            )
        pipe = pipeline_class(self.architecture).from_pretrained(str(self.folder), dtype=dtype).to(device)
        pipe.set_progress_bar_config(disable=True)
        for name in names:
            pipe.load_subject(str(self.subject_file(name)), name=name)
        return pipe

    def subject_file(self, name: str) -> Path:
        """Where the subject of that name is."""
        return self.embeddings / f"{name}.safetensors"
