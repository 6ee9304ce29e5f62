"""The recipe of an embedded base: its settings, checked, and the scenes that every stage of it reads."""

from __future__ import annotations

import dataclasses
import json
import math
import multiprocessing
import os
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from tqdm.auto import tqdm

from multisubject.tiny_world.scenes import World, describe, random_scene, render
from multisubject.tiny_world.training import Schedule, process_state

# What a stage's section holds besides the loop's settings, all of it needed.
OWN_SETTINGS = {
    "data": {"scenes", "captions_per_scene", "seed"},
    "vae": {"edge_weight", "kl_weight", "network"},
    "decoder": {"edge_weight", "feature_weight", "adversarial_weight", "discriminator"},
    "text_encoder": {"networks"},
    "diffusion": {"compile", "caption_dropout", "condensed_captions", "snr_gamma", "unet"},
}


@dataclass(frozen=True)
class Recipe:
    """A recipe file, checked: unknown or missing sections and settings are refused.

    A file may say `inherits: other.yaml`, beside it: sections that it lacks are that one's.
    """

    world: World
    data: dict[str, Any]
    vae: dict[str, Any]
    decoder: dict[str, Any]
    text_encoder: dict[str, Any]
    diffusion: dict[str, Any]

    @property
    def is_xl(self) -> bool:
        """Whether it makes a base of Stable Diffusion XL's kind, which has two text encoders."""
        return len(self.text_encoder["networks"]) > 1

    @classmethod
    def load(cls, path: Path) -> Recipe:
        """Read a recipe from YAML."""
        sections = _sections(path)
        expected = {field.name for field in dataclasses.fields(cls)}
        if set(sections) != expected:
            raise ValueError(f"{path}: sections {sorted(sections)}; expected {sorted(expected)}.")
        loop = {field.name: field.default is dataclasses.MISSING for field in dataclasses.fields(Schedule)}
        settings = {"world": {field.name: False for field in dataclasses.fields(World)}}  # setting -> is it needed?
        for section, own in OWN_SETTINGS.items():
            settings[section] = dict.fromkeys(own, True) | ({} if section == "data" else loop)
        for section, known in settings.items():
            given = set(sections[section])
            if unknown := given - set(known):
                raise ValueError(
                    f"{path}: {section} has unknown settings {sorted(unknown)}; expected some of {sorted(known)}."
                )
            if missing := {name for name, needed in known.items() if needed} - given:
                raise ValueError(f"{path}: {section} lacks the settings {sorted(missing)}.")
        encoders = list(sections["text_encoder"]["networks"])
        if encoders not in (["text_encoder"], ["text_encoder", "text_encoder_2"]):
            raise ValueError(
                f"{path}: text_encoder.networks {encoders}; expected text_encoder, and text_encoder_2 for a base of "
                "Stable Diffusion XL's kind."
            )
        return cls(**{**sections, "world": World(**sections["world"])})


def _sections(path: Path) -> dict[str, Any]:
    sections = yaml.safe_load(path.read_text())
    if not isinstance(sections, dict):
        raise ValueError(f"{path}: holds no sections; expected a mapping of settings.")
    if (parent := sections.pop("inherits", None)) is not None:
        sections = {**_sections(path.with_name(parent)), **sections}
    return sections


def split_schedule(settings: Mapping[str, Any]) -> tuple[Schedule, dict[str, Any]]:
    """The loop's settings, and the rest of a stage's section."""
    names = {field.name for field in dataclasses.fields(Schedule)}
    return (
        Schedule(**{key: value for key, value in settings.items() if key in names}),
        {key: value for key, value in settings.items() if key not in names},
    )


# --- data ------------------------------------------------------------------------------------------------------------


def _draw_scene(job: tuple[int, int, int, World]) -> tuple[np.ndarray, list[str]]:
    seed, index, captions, world = job
    rng = random.Random(f"{seed}/{index}")
    scene = random_scene(rng, world)
    return np.asarray(render(scene, world.image_size).image), [describe(scene, rng) for _ in range(captions)]


def _draw_scenes(jobs: list[tuple[int, int, int, World]], chunk: int = 64) -> Iterator[tuple[np.ndarray, list[str]]]:
    """All scenes, in order, by as many processes as there are cores and chunks to draw."""
    processes = min(os.cpu_count() or 1, math.ceil(len(jobs) / chunk))
    if processes <= 1:
        yield from map(_draw_scene, jobs)
        return
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        yield from pool.imap(_draw_scene, jobs, chunksize=chunk)


def scene_data(recipe: Recipe, folder: Path) -> tuple[torch.Tensor, list[list[str]]]:
    """Pictures `(scenes, 3, size, size)` uint8 and captions per picture; drawn once, then read from `folder`.

    Raises ValueError where those in `folder` were drawn for another world or from other settings.
    """
    pixels, words = folder / "scenes.npy", folder / "captions.json"
    drawn_from = json.loads(json.dumps({"world": dataclasses.asdict(recipe.world), "data": recipe.data}))
    with process_state().main_process_first():
        if not (pixels.exists() and words.exists()):
            folder.mkdir(parents=True, exist_ok=True)
            settings, size = recipe.data, recipe.world.image_size
            jobs = [
                (settings["seed"], i, settings["captions_per_scene"], recipe.world) for i in range(settings["scenes"])
            ]
            partial = pixels.with_suffix(".partial")
            drawn = np.lib.format.open_memmap(partial, "w+", np.uint8, (len(jobs), size, size, 3))
            captions = []
            for row, (picture, said) in enumerate(tqdm(_draw_scenes(jobs), total=len(jobs), desc="scenes")):
                drawn[row] = picture
                captions.append(said)
            drawn.flush()
            partial.replace(pixels)
            words.write_text(json.dumps({"drawn_from": drawn_from, "captions": captions}))
    found = json.loads(words.read_text())
    if not isinstance(found, dict) or found["drawn_from"] != drawn_from:
        raise ValueError(
            f"{folder} holds the scenes of another recipe (its `world` or `data` differ); choose another --scenes (or "
            "--runs), or delete that folder."
        )
    pictures = torch.from_numpy(np.load(pixels, mmap_mode="c"))
    return pictures.permute(0, 3, 1, 2), found["captions"]


def stratified(limit: int, count: int, generator: torch.Generator) -> torch.Tensor:
    """`count` whole numbers below `limit`, one from each of `count` equal ranges, in random order.

    Every batch then sees all noise levels, which makes its gradient less noisy (Kingma et al. 2021, arXiv:2107.00630).
    """
    device = generator.device
    positions = torch.arange(count, device=device) + torch.rand(count, generator=generator, device=device)
    return (positions / count * limit).long()[torch.randperm(count, generator=generator, device=device)]
