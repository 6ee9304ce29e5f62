"""LoRAs and IP-Adapters that regions of a configuration hold: found, and compared with the base, before it loads."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import CLIPVisionConfig

from multisubject.base_models import component_file
from multisubject.generation.arguments import IPAdapterArguments
from multisubject.generation.base_model import BaseModel, files_version
from multisubject.generation.config_file import ConfigError, GenerationConfig
from multisubject.generation.places import find_source
from multisubject.hub_client import parse_hub_source
from multisubject.layout import is_whole
from multisubject.region_ip_adapters import released_encoder
from multisubject.unknown_names import did_you_mean

_HERE = Path("config.json")  # of what a command line names, which lies about the working folder
LORA_FILE = "pytorch_lora_weights.safetensors"
"""What diffusers calls the file of a LoRA's folder or repository."""


@dataclass(frozen=True)
class Location:
    """Where diffusers finds weights.

    Args:
        repository: a folder of this machine, or `user/repo` on the Hub.
        subfolder: of that, or empty.
        file: in the latter; empty: it is about the folder.
        revision: branch, tag or commit on the Hub; None: the newest, or it is on this machine.
    """

    repository: str
    subfolder: str
    file: str
    revision: str | None

    def __str__(self) -> str:
        """As a command line or a configuration names it."""
        revision = "" if self.revision is None else f"@{self.revision}"
        return "/".join(filter(None, (self.repository, self.subfolder, self.file))) + revision


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
        image_encoder: where a `CLIPVisionModelWithProjection` is; its `file` is empty.
        version: changes when the image encoder does.
    """

    weights: tuple[Weights, ...]
    scales: tuple[float, ...]
    image_encoder: Location
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
        raise ValueError(
            f"{place} has the LoRA {name!r}, which has no file in lora_dict: that has {list(config.lora_dict)}; "
            + did_you_mean(name, config.lora_dict, "add its file there.")
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
        encoder = wanted.ip_adapter_image_encoder
        if encoder is None:
            encoders = {_encoder_beside(source) for source in wanted.ip_adapter}
            if len(encoders) > 1:
                raise ValueError(
                    f"beside these IP-Adapters are the image encoders {', '.join(sorted(encoders))}, expected one for"
                    " all; name it with --ip_adapter_image_encoder."
                )
            encoder = encoders.pop()
        place = _locate_folder(encoder)
        config = component_file(place.repository, place.subfolder, revision=place.revision)
        if config is None:
            raise ValueError(f"{encoder}: this is no image encoder; it has no config.json.")
        for one in weights:
            _check_image_encoder(one, encoder, config)
    except (ValueError, OSError) as error:
        raise ConfigError(f"--ip_adapter: {error}") from error
    scales = tuple(wanted.ip_adapter_scale) * (len(weights) // len(wanted.ip_adapter_scale))
    return IPAdapters(weights, scales, place, files_version(config.parent, ["."]))


def _encoder_beside(source: str) -> str:
    """The folder `image_encoder` beside an IP-Adapter, as a command line names it, at the same revision."""
    place = locate(source)
    if Path(place.repository).exists():
        return f"{source.rpartition('/')[0] or '.'}/image_encoder"
    return str(replace(place, subfolder=f"{place.subfolder}/image_encoder".removeprefix("/"), file=""))


def _check_image_encoder(weights: Weights, encoder: str, config: Path) -> None:
    """Raise `ValueError` for an image encoder of another width than an IP-Adapter takes, or what is none."""
    shapes = _read_shapes(weights.source, weights.path)
    # As diffusers tells them apart: a plain one, full face, FaceID (whose embeddings are of faces), Plus
    kinds = {"proj.weight": False, "proj.3.weight": True, "proj.0.weight": True, "proj_in.weight": True}
    key = next((key for key in kinds if f"image_proj.{key}" in shapes), None)
    if key is None or "image_proj.perceiver_resampler.proj_in.weight" in shapes:
        return  # another one, of which diffusers has more to say
    wanted, of_patches = shapes[f"image_proj.{'proj.0.weight' if key == 'proj.3.weight' else key}"][1], kinds[key]
    width = _width_of_encoder(encoder, config, "hidden_size" if of_patches else "projection_dim")
    if width != wanted:
        folder = released_encoder(wanted, of_patches)
        remedy = f"such as h94/IP-Adapter/{folder}" if folder else "the one that the adapter was made for"
        if key == "proj.0.weight":
            remedy = "of another IP-Adapter: this one (FaceID) reads embeddings of faces, which none gives"
        raise ValueError(
            f"{weights.source}: the image encoder {encoder} gives embeddings of width {width}, expected {wanted} for"
            f" this IP-Adapter. Name another one with --ip_adapter_image_encoder, {remedy}."
        )


def _width_of_encoder(encoder: str, config: Path, key: str) -> int:
    """A width in the `config.json` of a CLIP image encoder, or of a whole CLIP. Raises `ValueError` for any other."""
    try:
        read = json.loads(config.read_text(encoding="utf-8"))
    except ValueError:
        read = None
    kind = read.get("model_type") if isinstance(read, dict) else None
    if kind == "clip":
        vision = read.get("vision_config")  # what it does not say is as in any CLIP
        read = CLIPVisionConfig().to_dict() | (vision if isinstance(vision, dict) else {})
    width: Any = read.get(key) if kind in ("clip", "clip_vision_model") else None
    if not is_whole(width, at_least=1):
        raise ValueError(
            f"{encoder}: this is no CLIP image encoder; expected a config.json with the model_type 'clip_vision_model'"
            f" and a whole number as {key}."
        )
    return width


def _read_ip_adapter(source: str, base: BaseModel) -> Weights:
    path = _find_weights(source, _HERE, None)
    shapes = _read_shapes(source, path)
    widths = {shape[1] for key, shape in shapes.items() if key.startswith("ip_adapter.") and "to_k_ip" in key}
    if not widths or not any(key.startswith("image_proj.") for key in shapes):
        raise ValueError(f"{source}: this file holds no IP-Adapter; expected one in a form that diffusers reads.")
    _check_widths(source, "IP-Adapter", widths, base)
    return Weights(source, path, _sha256(path))


def locate(source: str, config_path: Path = _HERE, name: str | None = None) -> Location:
    """Where diffusers finds a LoRA or an IP-Adapter that a configuration or a command line names.

    Args:
        source: a file or, where `name` says what it is called in there, a folder; on the Hub with `@revision` behind it
            if need be.
        config_path: of the configuration, in whose folders it may lie.
        name: of its file, where `source` is silent.

    Raises:
        ValueError: it is not there.
        FileNotFoundError: it is no Hub id either.
    """
    place = find_source(source, config_path)
    if Path(place).exists():
        if name is not None and Path(place).is_dir():
            return Location(place, "", name, None)
        return Location(str(Path(place).parent), "", Path(place).name, None)
    where = parse_hub_source(place)
    folder, _, file = where.path.rpartition("/")
    if name is not None and not file.endswith(".safetensors"):
        folder, file = where.path, name
    return Location(where.repo_id, folder, file, where.revision)


def _locate_folder(source: str) -> Location:
    place = find_source(source, _HERE)
    if Path(place).exists():
        return Location(place, "", "", None)
    where = parse_hub_source(place)
    return Location(where.repo_id, where.path, "", where.revision)


def _find_weights(source: str, config_path: Path, name: str | None) -> Path:
    """A `.safetensors` file, fetched if it is on the Hub; `name` is what it is called where `source` is silent."""
    place = locate(source, config_path, name)
    path: Path | None = Path(place.repository, place.file)
    if not Path(place.repository).exists() and place.file:
        path = component_file(place.repository, place.subfolder, place.file, revision=place.revision)
    if path is not None and path.suffix != ".safetensors":
        raise ValueError(f"{source}: expected a .safetensors file, or on the Hub user/repo/file.safetensors.")
    if path is None or not path.is_file():
        remedy = "name its file, as in user/repo/my_lora.safetensors" if place.file == name else "check its name"
        raise ValueError(f"{source}: there is no {place.file} there; {remedy}.")
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
