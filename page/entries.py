"""A document and its settings <-> what `generate_images.py` and `pipe(…)` take."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from multisubject.generation.adapters import IPAdapters
from multisubject.generation.arguments import GenerateArguments, IPAdapterArguments
from multisubject.generation.base_model import BaseModel
from multisubject.page.document import Document
from multisubject.tiny_world import EMBEDDED_BASE

MOST_IMAGES = 8
MOST_STEPS = 150
MOST_SEED = 2**53 - MOST_IMAGES
"""Whole numbers above it are not exact in a browser."""

STARTS = {
    "noise": "New pictures",
    "picture": "Change the picture under the regions",
    "region": "Redraw one region of it",
}

METHODS = {
    "multisubject": "Pulls each subject's words into its region and hides them everywhere else.",
    "cones2": "The published Cones 2: pulls inside a region, hides outside.",
    "cones2_padding_hidden": "Cones 2, and a region does not hear the summary of the whole prompt.",
    "masked": "Hides a subject's words outside its region; nothing pulls inside.",
    "bounded_attention": "Hides words outside, and regions do not look at one another.",
    "dense_diffusion": "Early steps raise attention to a region's words, the more the smaller it is.",
    "regional_prompts": "A region sees a prompt of its own, and no other.",
    "attention_couple": "A region sees a prompt of its own, mixed with the picture's.",
}


@dataclass(frozen=True)
class Settings:
    """How pictures are made. None stands for the pipeline's own default.

    Args:
        num_images: pictures in a run.
        seed: picture i has the seed `seed + i`.
        num_inference_steps, guidance_scale: as for `generate_images.py`.
        guidance_method, guidance_weight, guidance_steps, weight_negative, recurrence, recurrence_steps: as for
            an entry of a generation config.
        move_objects: whether objects are moved into their regions where the guidance method does so.
        start: a key of `STARTS`: noise, or the picture under the regions.
        image_strength: of a picture to start from, how much of it may change, from 0 to 1.
        region: id of the region that is redrawn.
    """

    num_images: int = 2
    seed: int = 0
    num_inference_steps: int = 25
    guidance_scale: float | None = None
    guidance_method: str = "multisubject"
    guidance_weight: float = 0.08
    guidance_steps: int | None = None
    weight_negative: float = -1e8
    recurrence: int = 1
    recurrence_steps: int | None = None
    move_objects: bool = True
    start: str = "noise"
    image_strength: float = 0.6
    region: str | None = None


DEFAULTS = Settings()
LIMITS = {
    "num_images": (1, MOST_IMAGES),
    "seed": (0, MOST_SEED),
    "num_inference_steps": (1, MOST_STEPS),
    "guidance_scale": (0, 50),
    "guidance_weight": (-100, 100),
    "guidance_steps": (0, MOST_STEPS),
    "weight_negative": (-1e9, 0),
    "recurrence": (1, 5),
    "recurrence_steps": (0, MOST_STEPS),
    "image_strength": (0.05, 1),
}
# Of an entry; where they have their default they are left out.
ENTRY_KEYS = (
    "guidance_method", "guidance_weight", "guidance_steps", "weight_negative", "recurrence", "recurrence_steps"
)  # fmt: skip


def read_settings(value: Any) -> Settings:
    """Check what a browser sent: a dictionary with keys of `Settings`. Raises `ValueError`."""
    if not isinstance(value, dict):
        raise ValueError(f"settings are of type {type(value).__name__}, expected a dictionary.")
    known = {field.name: str(field.type) for field in fields(Settings)}
    for key, given in value.items():
        if key not in known:
            raise ValueError(f"settings have the unknown key {str(key)[:80]!r}, expected {', '.join(known)}.")
        if given is None and "None" in known[key]:
            continue
        if key in LIMITS:
            low, high = LIMITS[key]
            is_whole = "int" in known[key]
            kinds = (int,) if is_whole else (int, float)
            if type(given) not in kinds or not low <= given <= high:  # which is false of a NaN, too
                kind = "a whole number" if is_whole else "a number"
                raise ValueError(f"{key} is {str(given)[:80]!r}, expected {kind} from {low:g} to {high:g}.")
        elif known[key] == "bool":
            if not isinstance(given, bool):
                raise ValueError(f"{key} is {str(given)[:80]!r}, expected true or false.")
        elif not isinstance(given, str) or len(given) > 64:
            raise ValueError(f"{key} is {str(given)[:80]!r}, expected a short text.")
    settings = Settings(**value)
    if settings.start not in STARTS:
        raise ValueError(f"start is {settings.start!r}, expected one of {', '.join(STARTS)}.")
    return settings


def entry_of(
    document: Document, settings: Settings, sources: Mapping[str, str], loras: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """The entry of a generation config that makes these pictures. Drawn shapes are in it as text.

    Args:
        document, settings: checked ones.
        sources: name of each known subject -> its file.
        loras: name of each known LoRA -> its file.
    """
    names = {name.casefold(): name for name in sources}
    used = [names[name.casefold()] for name in document.names() if name.casefold() in names]
    entry: dict[str, Any] = {"prompt": document.prompt}
    if used:
        entry["residual_dict"] = {name: sources[name] for name in used}
    if held := {name: loras[name] for name in document.loras() if loras and name in loras}:
        entry["lora_dict"] = held
    if document.regions:
        entry["layout"] = document.layout()
        changed = {key: getattr(settings, key) for key in ENTRY_KEYS}
        entry |= {key: value for key, value in changed.items() if value != getattr(DEFAULTS, key)}
        if not settings.move_objects:
            entry["moves"] = []
    if document.negative_prompt:
        entry["negative_prompt"] = document.negative_prompt
    return entry | {"seed": settings.seed}


def arguments_of(document: Document, settings: Settings, base: BaseModel) -> GenerateArguments:
    """The command line of `generate_images.py` that goes with the entry."""
    width, height = document.size
    return GenerateArguments(
        generation_config="page.json",
        pretrained_model_name=None if base.name == str(EMBEDDED_BASE) else base.name,
        num_images=settings.num_images,
        seed=settings.seed,
        num_inference_steps=settings.num_inference_steps,
        guidance_scale=settings.guidance_scale,
        resolution=f"{height}x{width}",
    )


def as_config(
    document: Document, settings: Settings, sources: Mapping[str, str], loras: Mapping[str, str] | None = None
) -> str:
    """The text of a generation config; arguments as for `entry_of`."""
    entry = entry_of(document, settings, short_paths(sources), short_paths(loras or {}))
    return json.dumps([entry], indent=2, ensure_ascii=False)


def as_command(document: Document, settings: Settings, base: BaseModel, ip_adapters: IPAdapters | None = None) -> str:
    """The shell command that makes the pictures of `as_config`, with the IP-Adapters of its reference pictures."""
    args = asdict(arguments_of(document, settings, base))
    if document.size == base.size[::-1]:
        args["resolution"] = None
    args["seed"], defaults = 0, asdict(GenerateArguments("page.json"))  # the entry has it
    if ip_adapters is not None:
        encoder = short_path(str(ip_adapters.image_encoder))
        sources, scales = [weights.source for weights in ip_adapters.weights], [*ip_adapters.scales]
        args |= asdict(IPAdapterArguments(sources, encoder, scales))
        defaults |= asdict(IPAdapterArguments())
    command = ["multisubject-generate", "--generation_config", "page.json"]
    for key, value in args.items():
        if value != defaults[key]:
            command += [f"--{key}", *map(str, value if isinstance(value, list) else [value])]
    return shlex.join(command)


def other_pipeline(start: str, is_xl: bool) -> tuple[str, dict[str, Any]]:
    """diffusers' class for a run that starts from a picture, and what it is told beside the components."""
    kind = {"picture": "Img2Img", "region": "Inpaint"}[start]
    if is_xl:
        return f"StableDiffusionXL{kind}Pipeline", {"add_watermarker": False}
    return f"StableDiffusion{kind}Pipeline", {"requires_safety_checker": False}


def short_paths(sources: Mapping[str, str]) -> dict[str, str]:
    """Paths below the working folder relative to it."""
    return {name: short_path(source) for name, source in sources.items()}


def short_path(source: str) -> str:
    """A path below the working folder relative to it; any other text as it is."""
    path = Path(source)
    is_below = path.is_absolute() and path.is_relative_to(Path.cwd())
    return path.relative_to(Path.cwd()).as_posix() if is_below else source
