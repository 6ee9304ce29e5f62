"""What the check of a configuration has to know of a base model: small files only, no weights."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import CLIPTokenizer
from transformers.utils import cached_file

from multisubject.base_models import base_model_errors, unsuitable_base
from multisubject.generation.config_file import ConfigError


@dataclass(frozen=True)
class BaseModel:
    """What the check of a config has to know of a base model: small files only, no weights.

    Args:
        name: folder or Hub id.
        tokenizer: its CLIP tokenizer.
        size: `(height, width)` of its pictures in pixels.
        embed_dim: width of its text encoder, which is the width of its subjects' residuals.
        version: changes when the model does: a Hub commit, or a checksum of a folder's files (of large ones, the time).
    """

    name: str
    tokenizer: Any
    size: tuple[int, int]
    embed_dim: int
    version: str

    @classmethod
    def read(cls, name: str) -> BaseModel:
        """Read a base model's tokenizer and sizes. Raises `ConfigError` for what is no folder or Hub id of one."""
        try:
            with base_model_errors(name):
                unet, vae, text_encoder = (_read_json(name, part) for part in ("unet", "vae", "text_encoder"))
                tokenizer = CLIPTokenizer.from_pretrained(name, subfolder="tokenizer")
                version = _version(_config_file(name, "unet").parent.parent)
                size, blocks, embed_dim = unet["sample_size"], vae["block_out_channels"], text_encoder["hidden_size"]
        except (OSError, ValueError) as error:
            raise ConfigError(f"base model {name!r} cannot be read: {error}") from error
        except KeyError as error:
            raise ConfigError(
                f"base model {name!r} cannot be read: {error} is missing in its unet/config.json, vae/config.json or "
                "text_encoder/config.json; expected the folder or Hub id of a Stable Diffusion model."
            ) from None
        if problem := unsuitable_base(unet, embed_dim):
            raise ConfigError(f"base model {name!r} cannot be used: its UNet {problem}")
        height, width = (size, size) if isinstance(size, int) else size
        scale = 2 ** (len(blocks) - 1)
        return cls(name, tokenizer, (height * scale, width * scale), embed_dim, version)


def _config_file(model: str, component: str) -> Path:
    path = cached_file(model, "config.json", subfolder=component)
    if path is None:
        raise OSError(f"it has no {component}/config.json; expected the folder or Hub id of a Stable Diffusion model.")
    return Path(path)


def _read_json(model: str, component: str) -> dict[str, Any]:
    return json.loads(_config_file(model, component).read_text(encoding="utf-8"))


def _version(folder: Path) -> str:
    if folder.parent.name == "snapshots":  # of the Hub's cache, whose other files may come later
        return folder.name
    digest = hashlib.sha256()
    parts = (folder / part for part in ("unet", "vae", "text_encoder", "tokenizer", "scheduler"))
    for file in (folder / "model_index.json", *(file for part in parts for file in sorted(part.glob("*")))):
        if file.is_file():
            status = file.stat()
            is_small = status.st_size <= 2**26
            digest.update(f"{file.relative_to(folder)} {status.st_size} ".encode())
            digest.update(file.read_bytes() if is_small else str(status.st_mtime_ns).encode())
    return digest.hexdigest()
