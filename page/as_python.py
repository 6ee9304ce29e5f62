"""The lines of Python that make a picture of the page."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from multisubject.generation.adapters import LORA_FILE, IPAdapters, Location, locate
from multisubject.generation.base_model import BaseModel
from multisubject.generation.config_file import GUIDANCE_KEYS, SAMPLING_KEYS
from multisubject.generation.making import pipeline_class
from multisubject.page.document import Document, place_of
from multisubject.page.entries import Settings, entry_of, other_pipeline, short_path, short_paths
from multisubject.tiny_world import EMBEDDED_BASE

_SAVE = 'image.save("picture.png")\n'


def as_python(
    document: Document,
    settings: Settings,
    sources: Mapping[str, str],
    base: BaseModel,
    loras: Mapping[str, str],
    ip_adapters: IPAdapters | None = None,
) -> str:
    """A script that makes the first picture of a run.

    Args:
        document, settings, sources, loras: as for `entry_of`.
        base: the model.
        ip_adapters: those of the document's reference pictures, if it has any.
    """
    entry = entry_of(document, settings, short_paths(sources), short_paths(loras))
    guidance = {key: value for key, value in entry.items() if key in ("layout", "negative_prompt", *GUIDANCE_KEYS)}
    width, height = document.size
    guidance |= {"height": height, "width": width}
    steps: dict[str, Any] = {"num_inference_steps": settings.num_inference_steps}
    if settings.guidance_scale is not None:
        steps["guidance_scale"] = settings.guidance_scale
    load = _loading(entry, base, ip_adapters)
    if settings.start == "noise":
        call = _keywords(guidance | steps) + _generator(settings)
        return f"import torch\n\n{load}image = pipe(\n    {document.prompt!r},\n{call}).images[0]\n{_SAVE}"
    # Said in any case: the other pipeline has a default of its own
    own = inspect.signature(pipeline_class(base.architecture).__call__)
    steps.setdefault("guidance_scale", own.parameters["guidance_scale"].default)
    guidance = {"layout": None} | {key: value for key, value in guidance.items() if key not in SAMPLING_KEYS}
    return _from_picture(document, settings, load, guidance, steps, "text_encoder_2" in base.embed_dims)


def _loading(entry: Mapping[str, Any], base: BaseModel, ip_adapters: IPAdapters | None) -> str:
    kind, name = base.architecture.pipeline, repr(base.name)
    lines = [f"from multisubject.{base.architecture.module} import {kind}"]
    if base.name == str(EMBEDDED_BASE):
        lines.append("from multisubject.tiny_world import EMBEDDED_BASE")
        name = "EMBEDDED_BASE"
    places = [locate(weights.source) for weights in ip_adapters.weights] if ip_adapters is not None else []
    if ip_adapters is not None:
        if any(place.revision for place in places):
            lines.insert(0, "from huggingface_hub import snapshot_download")
        lines.append("from transformers import CLIPVisionModelWithProjection")
    lines += ["", f"pipe = {kind}.from_pretrained({name})"]
    lines += [f"pipe.load_subject({path!r}, name={name!r})" for name, path in entry.get("residual_dict", {}).items()]
    for lora, source in entry.get("lora_dict", {}).items():
        place = locate(source, name=LORA_FILE)
        told = _keywords_of(subfolder=place.subfolder, weight_name=place.file, revision=place.revision)
        lines.append(f"pipe.load_lora_weights({short_path(place.repository)!r}{told}, adapter_name={lora!r})")
    if ip_adapters is not None:
        place = ip_adapters.image_encoder
        told = _keywords_of(subfolder=place.subfolder, revision=place.revision)
        lines.append(f"encoder = CLIPVisionModelWithProjection.from_pretrained({short_path(place.repository)!r}{told})")
        lines.append("pipe.register_modules(image_encoder=encoder)")
        lines.append(
            f"pipe.load_ip_adapter([{', '.join(map(_repository, places))}], "
            f"subfolder={[place.subfolder for place in places]}, weight_name={[place.file for place in places]}, "
            "image_encoder_folder=None)"
        )
        lines.append(f"pipe.set_ip_adapter_scale({[*ip_adapters.scales]})")
    return "\n".join([*lines, ""])


def _repository(place: Location) -> str:
    """An IP-Adapter's, as Python writes it. diffusers loads all at one revision: what has its own is fetched before."""
    if place.revision is None:
        return repr(short_path(place.repository))
    file = "/".join(filter(None, (place.subfolder, place.file)))
    return f"snapshot_download({place.repository!r}, revision={place.revision!r}, allow_patterns={file!r})"


def _keywords_of(**given: str | None) -> str:
    return "".join(f", {key}={value!r}" for key, value in given.items() if value)


def _from_picture(
    document: Document,
    settings: Settings,
    load: str,
    guidance: Mapping[str, Any],
    steps: Mapping[str, Any],
    is_xl: bool,
) -> str:
    kind, options = other_pipeline(settings.start, is_xl)
    told = "".join(f", {key}={value!r}" for key, value in options.items())
    region, width, height = document.region(settings.region), *document.size
    mask = given = paste = imports = ""
    if settings.start == "region" and region is not None:
        place = place_of(region["shape"], document.size) | {"phrase": "here"}
        imports = "from PIL import Image\n\nfrom multisubject.layout import parse_layout\n"
        mask = f"(region,) = parse_layout([{place!r}], height={height}, width={width})\n"
        mask += 'mask = Image.fromarray((255 * region.mask).round().astype("uint8"))\n'
        given = f"        mask_image=mask,\n        height={height},\n        width={width},\n"
        paste = "image = Image.composite(image, source, mask)  # the rest stays as it is\n"
    call = _keywords({"strength": settings.image_strength, **steps}, 8)
    return (
        f"import torch\nfrom diffusers import {kind}\nfrom diffusers.utils import load_image\n{imports}{load}"
        f"other = {kind}(**pipe.components{told})\n"
        f'source = load_image("source.png").resize({document.size!r})\n{mask}'
        f"with pipe.guide(\n    other,\n    {document.prompt!r},\n{_keywords(guidance)}) as embeds:\n"
        f"    image = other(\n        **embeds,\n        image=source,\n{given}{call}{_generator(settings, 8)}"
        f"    ).images[0]\n{paste}{_SAVE}"
    )


def _generator(settings: Settings, indent: int = 4) -> str:
    return f"{' ' * indent}generator=torch.Generator().manual_seed({settings.seed}),\n"


def _keywords(arguments: Mapping[str, Any], indent: int = 4) -> str:
    lines = []
    for key, value in arguments.items():
        parts = [f"    {part!r}," for part in value] if key == "layout" and value else []
        lines += [f"{key}=[", *parts, "],"] if parts else [f"{key}={value!r},"]
    return "".join(f"{' ' * indent}{line}\n" for line in lines)
