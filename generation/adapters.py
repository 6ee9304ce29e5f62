"""LoRAs and IP-Adapters that regions of a configuration hold: found, and compared with the base, before it loads."""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from multisubject.base_models import component_file
from multisubject.generation.arguments import IPAdapterArguments
from multisubject.generation.base_model import BaseModel, files_version
from multisubject.generation.config_file import ConfigError, GenerationConfig
from multisubject.generation.places import find_source
from multisubject.hub_client import parse_hub_source

_HERE = Path("config.json")  # of what a command line names, which lies about the working folder
LORA_FILE = "pytorch_lora_weights.safetensors"
"""What diffusers calls the file of a LoRA's folder or repository."""


@dataclass(frozen=True)
class Weights:
    """A file of weights on this machine.

    Args:
        source: what the configuration or the command line calls it.
        path: the `.safetensors` file.
        sha256: of all of it.
    """

    source: str
    path: Path
    sha256: str

    @property
    def settings(self) -> dict[str, Any]:
        """What a picture says of it, as plain JSON data."""
        return {"source": self.source, "sha256": self.sha256}


@dataclass(frozen=True)
class IPAdapters:
    """IP-Adapters and the model that encodes their pictures.

    Args:
        weights: their files, one or more.
        scales: how strongly each acts.
        image_encoder: folder of a `CLIPVisionModelWithProjection`, or `user/repo`.
        subfolder: of that.
        version: changes when the image encoder does.
    """

    weights: tuple[Weights, ...]
    scales: tuple[float, ...]
    image_encoder: str
    subfolder: str
    version: str

    @property
    def settings(self) -> dict[str, Any]:
        """What a picture says of them, as plain JSON data."""
        scaled = zip(self.weights, self.scales, strict=True)
        return {
            "weights": [{**weights.settings, "scale": scale} for weights, scale in scaled],
            "image_encoder_version": self.version,
        }


def lora_source(config: GenerationConfig, name: str, place: str) -> str:
    """Where an entry says that a LoRA is, which the region of this place holds. Raises `ValueError` for one that it
    does not name."""
    if name not in config.lora_dict:
        close = difflib.get_close_matches(name, config.lora_dict, 1)
        remedy = f"did you mean {close[0]!r}?" if close else "add its file there."
        raise ValueError(
            f"{place} has the LoRA {name!r}, which has no file in lora_dict: that has {list(config.lora_dict)}; "
            f"{remedy}"
        )
    return config.lora_dict[name]


def read_lora(source: str, config_path: Path, base: BaseModel) -> Weights:
    """The file of a LoRA. Raises `ValueError` where it is not there, is no LoRA, or was made for another base."""
    path = _find_weights(source, config_path, LORA_FILE)
    shapes = _read_shapes(source, path)
    if not any("lora" in key.casefold() for key in shapes):
        raise ValueError(f"{source}: this file holds no LoRA; expected one in a form that diffusers reads.")
    if any("dora_scale" in key or "magnitude_vector" in key for key in shapes):
        raise ValueError(
            f"{source}: this LoRA is none that adds to what a layer gives (DoRA): it cannot act in a region alone."
            " Train one without DoRA."
        )
    # What its layers read of the prompt, in the names of diffusers, peft and kohya
    widths = {
        shape[1] for key, shape in shapes.items() if re.search(r"attn2[._].*to_[kv].*(down|lora_A).*weight$", key)
    }
    _check_widths(source, "LoRA", widths, base)
    return Weights(source, path, _sha256(path))


def read_ip_adapters(wanted: IPAdapterArguments, base: BaseModel) -> IPAdapters | None:
    """The IP-Adapters of a command line, with their image encoder; None where it has none.

    Args:
        wanted: the command line.
        base: what they are for.

    Raises:
        ConfigError: one of them or the encoder is not there, is something else, or was made for another base.
    """
    if not wanted.ip_adapter:
        return None
    try:
        weights = tuple(_read_ip_adapter(source, base) for source in wanted.ip_adapter)
        named = wanted.ip_adapter_image_encoder
        encoders = {f"{source.rpartition('/')[0] or '.'}/image_encoder" for source in wanted.ip_adapter}
        if named is None and len(encoders) > 1:
            raise ValueError(
                f"beside these IP-Adapters are the image encoders {', '.join(sorted(encoders))}, expected one for all;"
                " name it with --ip_adapter_image_encoder."
            )
        encoder = encoders.pop() if named is None else named
        place, folder = find_source(encoder, _HERE), ""
        if not Path(place).exists():
            where = parse_hub_source(place)
            place, folder = where.repo_id, where.path
        config = component_file(place, folder)
        if config is None:
            raise ValueError(f"{encoder}: this is no image encoder; it has no config.json.")
    except (ValueError, OSError) as error:
        raise ConfigError(f"--ip_adapter: {error}") from error
    scales = tuple(wanted.ip_adapter_scale) * (len(weights) // len(wanted.ip_adapter_scale))
    return IPAdapters(weights, scales, place, folder, files_version(config.parent, ["."]))


def _read_ip_adapter(source: str, base: BaseModel) -> Weights:
    path = _find_weights(source, _HERE, None)
    shapes = _read_shapes(source, path)
    widths = {shape[1] for key, shape in shapes.items() if key.startswith("ip_adapter.") and "to_k_ip" in key}
    if not widths or not any(key.startswith("image_proj.") for key in shapes):
        raise ValueError(f"{source}: this file holds no IP-Adapter; expected one in a form that diffusers reads.")
    _check_widths(source, "IP-Adapter", widths, base)
    return Weights(source, path, _sha256(path))


def repository_of(weights: Weights) -> tuple[str, str, str]:
    """The folder or Hub id of an IP-Adapter, the folder in it, and its file's name, as diffusers loads it."""
    place = find_source(weights.source, _HERE)
    if Path(place).exists():
        return str(Path(place).parent), "", Path(place).name
    where = parse_hub_source(place)
    folder, _, file = where.path.rpartition("/")
    return where.repo_id, folder, file


def _find_weights(source: str, config_path: Path, name: str | None) -> Path:
    """A `.safetensors` file, fetched if it is on the Hub; `name` is what it is called where `source` is silent."""
    place = find_source(source, config_path)
    path: Path | None = Path(place)
    if Path(place).exists():
        file = name if name is not None and Path(place).is_dir() else ""
        path = Path(place, file)
    else:
        where = parse_hub_source(place)
        folder, _, file = where.path.rpartition("/")
        if name is not None and not file.endswith(".safetensors"):
            folder, file = where.path, name
        path = component_file(where.repo_id, folder, file, revision=where.revision) if file else Path(place)
    if path is not None and path.suffix != ".safetensors":
        raise ValueError(f"{source}: expected a .safetensors file, or on the Hub user/repo/file.safetensors.")
    if path is None or not path.is_file():
        remedy = "name its file, as in user/repo/my_lora.safetensors" if file == name else "check its name"
        raise ValueError(f"{source}: there is no {file} there; {remedy}.")
    return path


def _read_shapes(source: str, path: Path) -> dict[str, Sequence[int]]:
    """Name -> shape of a file's tensors, of its header alone."""
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{source}: this is no .safetensors file, or a damaged one: {error}.") from error


def _check_widths(source: str, kind: str, widths: set[int], base: BaseModel) -> None:
    """Raise `ValueError` for weights that read prompts of another width than a base's."""
    expected = sum(base.embed_dims.values())
    if widths - {expected}:
        raise ValueError(
            f"{source}: this {kind} reads prompt embeddings of width {', '.join(map(str, sorted(widths)))}, expected"
            f" {expected}, those of {base.name}. Use the base model that it was made for."
        )


def _sha256(path: Path) -> str:
    """Of a file's bytes. The page asks at every stroke of a pen: a file that is as it was is not read again."""
    status = path.stat()
    return _sha256_of(path, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=256)
def _sha256_of(path: Path, size: int, changed: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
