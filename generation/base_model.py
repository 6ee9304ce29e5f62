"""What the check of a configuration has to know of a base model: small files only, no weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import CLIPTokenizer

from multisubject.base_models import (
    ARCHITECTURES,
    SD,
    SDXL,
    Architecture,
    base_model_errors,
    component_config,
    component_file,
    is_xl,
    native_size,
    tokenizer_of,
    unsuitable_base,
    unsuitable_channels,
    unsuitable_xl_base,
)
from multisubject.generation.config_file import ConfigError
from multisubject.subject_file import TEXT_ENCODERS


@dataclass(frozen=True)
class BaseModel:
    """What the check of a config has to know of a base model: small files only, no weights.

    Args:
        name: folder or Hub id.
        architecture: its family.
        tokenizers: text encoder -> its CLIP tokenizer.
        size: `(height, width)` of its pictures in pixels.
        embed_dims: text encoder -> its width, which is the width of its subjects' residuals.
        num_train_timesteps: how many levels of noise it was trained with, None where its scheduler does not say.
        version: changes when the model does: a Hub commit, or a checksum of a folder's files (of large ones, the time).
    """

    name: str
    architecture: Architecture
    tokenizers: Mapping[str, Any]
    size: tuple[int, int]
    embed_dims: Mapping[str, int]
    num_train_timesteps: int | None
    version: str

    @property
    def learned(self) -> set[str]:
        """Words that a tokenizer had to learn, as those of a textual inversion."""
        return {word for tokenizer in self.tokenizers.values() for word in tokenizer.get_added_vocab()}

    @classmethod
    def read(cls, name: str) -> BaseModel:
        """Read a base model's tokenizers and sizes. Raises `ConfigError` for what is no folder or Hub id of one."""
        try:
            with base_model_errors(name):
                unet = _read_config(name, "unet")
                architecture = SDXL if is_xl(unet) else SD
                found = {part: component_config(name, part) for part in architecture.text_encoders}
                widths = [None if config is None else config["hidden_size"] for config in found.values()]
                problem = unsuitable_xl_base(unet, widths) if is_xl(unet) else unsuitable_base(unet, widths[0])
                vae = _read_config(name, "vae")
                problem = problem or unsuitable_channels(unet, vae)
                if problem:
                    raise ValueError(f"its UNet {problem}")
                embed_dims = {part: _read_config(name, part)["hidden_size"] for part in found}
                tokenizers = {part: CLIPTokenizer.from_pretrained(name, subfolder=tokenizer_of(part)) for part in found}
                size = native_size(unet, vae)
                scheduler = component_file(name, "scheduler", "scheduler_config.json")
                settings = json.loads(scheduler.read_text(encoding="utf-8")) if scheduler else {}
                levels = settings.get("num_train_timesteps")
                version = _version(_config_file(name, "unet").parent.parent)
        except (OSError, ValueError) as error:
            raise ConfigError(f"base model {name!r} cannot be used: {error}") from error
        except KeyError as error:
            raise ConfigError(
                f"base model {name!r} cannot be used: {error} is missing in its unet/config.json, vae/config.json or "
                f"a text encoder's config.json; expected {_EXPECTED}."
            ) from None
        return cls(name, architecture, tokenizers, size, embed_dims, levels, version)


_EXPECTED = "the folder or Hub id of a base model of " + " or ".join(one.family for one in ARCHITECTURES)


def _config_file(model: str, component: str) -> Path:
    path = component_file(model, component)
    if path is None:
        raise OSError(f"it has no {component}/config.json; expected {_EXPECTED}.")
    return path


def _read_config(model: str, component: str) -> dict[str, Any]:
    return json.loads(_config_file(model, component).read_text(encoding="utf-8"))


def _version(folder: Path) -> str:
    encoders = [name for encoder in TEXT_ENCODERS for name in (encoder, tokenizer_of(encoder))]  # as each base has them
    return files_version(folder, ["unet", "vae", *encoders, "scheduler"])


def files_version(folder: Path, parts: Sequence[str]) -> str:
    """What changes when the files in some subfolders of a model's folder, or its `model_index.json`, do: a Hub commit,
    or a checksum of the files (of large ones, the time)."""
    for parent in (folder, *folder.parents):
        # Of the Hub's cache, whose other files may come later
        if parent.parent.name == "snapshots" and parent.parents[1].name.startswith("models--"):
            return parent.name
    digest = hashlib.sha256()
    paths = (folder / part for part in parts)
    for file in (folder / "model_index.json", *(file for path in paths for file in sorted(path.glob("*")))):
        if file.is_file():
            status = file.stat()
            is_small = status.st_size <= 2**26
            digest.update(f"{file.relative_to(folder)} {status.st_size} ".encode())
            digest.update(file.read_bytes() if is_small else str(status.st_mtime_ns).encode())
    return digest.hexdigest()
