"""Train the embedded base model on drawn scenes, a stage at a time.

    python tiny_world/train_base.py vae            # AutoencoderKL
    python tiny_world/train_base.py text_encoder   # CLIP text encoder
    python tiny_world/train_base.py diffusion      # UNet
    python tiny_world/train_base.py export         # the diffusers folder, half precision

Every stage resumes where it stopped (Ctrl-C saves), shows its progress, and uses a GPU where there is one. On several
processes: `torchrun --nproc_per_node 2 tiny_world/train_base.py vae`. To train the shipped model further without its
checkpoints: the first three stages with `--start_from tiny_world/base`. Settings live in `recipe.yaml` beside
this file.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import multiprocessing
import os
import random
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from accelerate import PartialState
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from tqdm.auto import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from multisubject.tiny_world import EMBEDDED_BASE
from multisubject.tiny_world.base_losses import NOISE, AutoencoderLoss, CaptionLoss, DiffusionLoss
from multisubject.tiny_world.scenes import (
    ADJECTIVES,
    CATEGORIES,
    COLOURS,
    SETTINGS,
    World,
    describe,
    random_scene,
    render,
)
from multisubject.tiny_world.training import Batch, Schedule, train
from multisubject.tiny_world.words import ATTRIBUTES, MAX_TOKENS, make_tokenizer, said_looks, tokenize, word_ids

HERE = Path(__file__).parent
# What a stage's section of the recipe holds besides the loop's settings, all of it needed.
OWN_SETTINGS = {
    "data": {"scenes", "captions_per_scene", "seed"},
    "vae": {"compile", "edge_weight", "kl_weight", "network"},
    "text_encoder": {"network"},
    "diffusion": {"compile", "caption_dropout", "condensed_captions", "snr_gamma", "unet"},
}


@dataclass(frozen=True)
class Recipe:
    """`recipe.yaml`, checked: unknown or missing sections and settings are refused."""

    world: World
    data: dict[str, Any]
    vae: dict[str, Any]
    text_encoder: dict[str, Any]
    diffusion: dict[str, Any]

    @classmethod
    def load(cls, path: Path) -> Recipe:
        """Read a recipe from YAML."""
        sections = yaml.safe_load(path.read_text())
        expected = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(sections, dict) or set(sections) != expected:
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
        return cls(**{**sections, "world": World(**sections["world"])})


def split_schedule(settings: dict[str, Any]) -> tuple[Schedule, dict[str, Any]]:
    """The loop's settings, and the rest of a stage's section."""
    names = {field.name for field in dataclasses.fields(Schedule)}
    return (
        Schedule(**{key: value for key, value in settings.items() if key in names}),
        {key: value for key, value in settings.items() if key not in names},
    )


def process_state() -> PartialState:
    """Who we are among several processes. Without `cpu=True` two CPU processes would each believe to be alone."""
    return PartialState(cpu=not torch.cuda.is_available())


# --- data ----------------------------------------------------------------------------------------------------------


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
            settings = recipe.data
            jobs = [
                (settings["seed"], i, settings["captions_per_scene"], recipe.world) for i in range(settings["scenes"])
            ]
            drawn = list(tqdm(_draw_scenes(jobs), total=len(jobs), desc="scenes"))
            np.save(pixels, np.stack([picture for picture, _ in drawn]))
            words.write_text(json.dumps({"drawn_from": drawn_from, "captions": [captions for _, captions in drawn]}))
    found = json.loads(words.read_text())
    if not isinstance(found, dict) or found["drawn_from"] != drawn_from:
        raise ValueError(
            f"{folder} holds the scenes of another recipe (its `world` or `data` differ); choose another --runs, or "
            "delete that folder."
        )
    pictures = torch.from_numpy(np.load(pixels, mmap_mode="c"))
    return pictures.permute(0, 3, 1, 2), found["captions"]


def stratified(limit: int, count: int, generator: torch.Generator) -> torch.Tensor:
    """`count` whole numbers below `limit`, one from each of `count` equal ranges, in random order.

    Every batch then sees all noise levels, which makes its gradient less noisy (Kingma et al. 2021, arXiv:2107.00630).
    """
    positions = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    return (positions * limit).long()[torch.randperm(count, generator=generator)]


# --- stages ----------------------------------------------------------------------------------------------------------


def train_vae(recipe: Recipe, runs: Path, earlier: Path | None) -> None:
    """AutoencoderKL on the pictures; ends with `runs/vae` and `runs/latents.npy`. An earlier model's is taken as is."""
    schedule, settings = split_schedule(recipe.vae)
    pictures, _ = scene_data(recipe, runs)
    if earlier is not None:
        if process_state().is_main_process:
            save_vae(AutoencoderKL.from_pretrained(earlier / "vae").float(), pictures, runs)
        return
    torch.manual_seed(schedule.seed)
    levels = len(settings["network"]["block_out_channels"])
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        latent_channels=4,
        sample_size=recipe.world.image_size,
        mid_block_add_attention=False,
        **settings["network"],
    )
    size = recipe.world.image_size // 2 ** (levels - 1)

    def draw_batch(generator: torch.Generator, count: int) -> Batch:
        rows = torch.randint(len(pictures), (count,), generator=generator)
        return {"pixels": pictures[rows], "noise": torch.randn(count, 4, size, size, generator=generator)}

    model = AutoencoderLoss(vae, settings["edge_weight"], settings["kl_weight"])
    if settings["compile"]:
        model.compile()
    average = train(model, draw_batch, schedule, runs / "vae.pt", description="vae")
    if average is None or not process_state().is_main_process:
        return
    model.load_state_dict(average, strict=False)
    save_vae(vae, pictures, runs)


def save_vae(vae: AutoencoderKL, pictures: torch.Tensor, runs: Path) -> None:
    """Write the autoencoder and what it makes of the pictures."""
    vae.cpu().eval()
    latents = encode(vae, pictures)
    # Stable Diffusion's convention: the UNet sees latents of unit standard deviation.
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    vae.save_pretrained(runs / "vae")
    np.save(runs / "latents.npy", latents.half().numpy())


@torch.inference_mode()
def encode(vae: AutoencoderKL, pictures: torch.Tensor, batch_size: int = 128) -> torch.Tensor:
    """Posterior means `(scenes, 4, h, w)` of uint8 pictures, unscaled."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    vae.to(device)
    batches = [
        vae.encode(pictures[i : i + batch_size].to(device).float() / 127.5 - 1).latent_dist.mean.cpu()
        for i in tqdm(range(0, len(pictures), batch_size), desc="latents")
    ]
    vae.cpu()
    return torch.cat(batches)


def make_text_encoder(recipe: Recipe, tokenizer: CLIPTokenizer, earlier: Path | None) -> CLIPTextModel:
    """Random weights, or those of an earlier model of the same network; vocabularies may differ, words are matched."""
    _, settings = split_schedule(recipe.text_encoder)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **settings["network"],
        )
    )
    if earlier is not None:
        weights = CLIPTextModel.from_pretrained(earlier / "text_encoder", dtype=torch.float32).state_dict()
        embedding = "embeddings.token_embedding.weight"
        vocabulary = CLIPTokenizer.from_pretrained(earlier / "tokenizer").get_vocab()
        rows = [(row, vocabulary[token]) for token, row in tokenizer.get_vocab().items() if token in vocabulary]
        words = text_encoder.state_dict()[embedding].clone()
        words[[row for row, _ in rows]] = weights[embedding][[row for _, row in rows]]
        text_encoder.load_state_dict({**weights, embedding: words})
    return text_encoder


def train_text_encoder(recipe: Recipe, runs: Path, earlier: Path | None) -> None:
    """CLIP's text encoder on the captions; ends with `runs/text_encoder`."""
    schedule, _ = split_schedule(recipe.text_encoder)
    _, groups = scene_data(recipe, runs)
    with process_state().main_process_first():
        tokenizer = make_tokenizer(runs / "tokenizer")
    torch.manual_seed(schedule.seed)
    text_encoder = make_text_encoder(recipe, tokenizer, earlier)

    captions = [group[0] for group in groups]
    input_ids = tokenize(tokenizer, captions)
    names = {row: token.removesuffix("</w>") for token, row in tokenizer.get_vocab().items()}
    looks = torch.full((*input_ids.shape, len(ATTRIBUTES)), -100, dtype=torch.int8)
    settings = torch.zeros(len(captions), dtype=torch.long)
    things = [*CATEGORIES, *COLOURS]
    present = torch.zeros(len(captions), len(things))
    for row, (caption, ids) in enumerate(zip(captions, input_ids.tolist(), strict=True)):
        words = [names[token] for token in ids]
        for position, look in enumerate(said_looks(words)):
            if look is not None:
                looks[row, position] = torch.tensor(
                    [
                        values.index(look[attribute]) + 1 if attribute in look else 0
                        for attribute, values in ATTRIBUTES.items()
                    ]
                )
        settings[row] = next((i + 1 for i, setting in enumerate(SETTINGS) if caption.endswith(setting)), 0)
        present[row] = torch.tensor([float(thing in words) for thing in things])

    def draw_batch(generator: torch.Generator, count: int) -> Batch:
        rows = torch.randint(len(captions), (count,), generator=generator)
        return {
            "input_ids": input_ids[rows].long(),
            "looks": looks[rows].long(),
            "settings": settings[rows],
            "present": present[rows],
        }

    classes = {name: len(values) + 1 for name, values in ATTRIBUTES.items()}
    model = CaptionLoss(text_encoder, {**classes, "setting": len(SETTINGS) + 1, "present": len(things)})
    average = train(model, draw_batch, schedule, runs / "text_encoder.pt", description="text encoder")
    if average is None or not process_state().is_main_process:
        return
    model.load_state_dict(average, strict=False)
    text_encoder.save_pretrained(runs / "text_encoder")


def train_diffusion(recipe: Recipe, runs: Path, earlier: Path | None) -> None:
    """UNet on the latents of `runs/vae` and the words of `runs/text_encoder`; ends with `runs/unet`."""
    for needed, stage in (("latents.npy", "vae"), ("text_encoder", "text_encoder")):
        if not (runs / needed).exists():
            raise FileNotFoundError(f"{runs / needed} is missing: run the `{stage}` stage first.")
    schedule, settings = split_schedule(recipe.diffusion)
    _, groups = scene_data(recipe, runs)
    scaling = AutoencoderKL.load_config(runs / "vae")["scaling_factor"]
    latents = torch.from_numpy(np.load(runs / "latents.npy")).float() * scaling
    tokenizer = CLIPTokenizer.from_pretrained(runs / "tokenizer")
    text_encoder = CLIPTextModel.from_pretrained(runs / "text_encoder", dtype=torch.float32)
    input_ids = tokenize(tokenizer, [caption for group in groups for caption in group])
    input_ids = input_ids.view(len(groups), -1, MAX_TOKENS)
    no_caption = tokenize(tokenizer, [""])[0]

    torch.manual_seed(schedule.seed)
    unet = UNet2DConditionModel(
        sample_size=latents.shape[-1], cross_attention_dim=text_encoder.config.hidden_size, **settings["unet"]
    )
    if earlier is not None:
        unet.load_state_dict(UNet2DConditionModel.from_pretrained(earlier / "unet").float().state_dict())
    timesteps = len(DDPMScheduler(**NOISE).alphas_cumprod)

    def draw_batch(generator: torch.Generator, count: int) -> Batch:
        rows = torch.randint(len(latents), (count,), generator=generator)
        variants = torch.randint(input_ids.shape[1], (count,), generator=generator)
        dropped = torch.rand(count, generator=generator) < settings["caption_dropout"]
        return {
            "latents": latents[rows],
            "noise": torch.randn(count, *latents.shape[1:], generator=generator),
            "timesteps": stratified(timesteps, count, generator),
            "input_ids": torch.where(dropped[:, None], no_caption, input_ids[rows, variants]).long(),
            "condensed": torch.rand(count, generator=generator) < settings["condensed_captions"],
        }

    # Plain matrix products: with fused attention, whose gradient is slow on a CPU, a step took 1.3 times as long.
    unet.set_attn_processor(AttnProcessor())
    if settings["compile"]:
        unet.compile()
    model = DiffusionLoss(
        text_encoder, unet, settings["snr_gamma"], *(word_ids(tokenizer, words) for words in (ADJECTIVES, CATEGORIES))
    )
    average = train(model, draw_batch, schedule, runs / "diffusion.pt", description="diffusion")
    if average is None or not process_state().is_main_process:
        return
    model.load_state_dict(average, strict=False)
    unet.save_pretrained(runs / "unet")


def export(runs: Path, output: Path) -> None:
    """Put the trained parts together as a Stable Diffusion folder in half precision; replaces an earlier one.

    Raises FileExistsError where `output` is something else, which would be lost.
    """
    if output.exists() and not (output / "model_index.json").is_file() and (output.is_file() or any(output.iterdir())):
        raise FileExistsError(f"--output {output} holds no earlier model (no model_index.json); choose another.")
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(runs / "vae"),
        text_encoder=CLIPTextModel.from_pretrained(runs / "text_encoder"),
        tokenizer=CLIPTokenizer.from_pretrained(runs / "tokenizer"),
        unet=UNet2DConditionModel.from_pretrained(runs / "unet"),
        scheduler=DDIMScheduler(**NOISE, clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).to(torch.float16)
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    pipeline.save_pretrained(partial)
    # transformers 5 takes the dtype of the files when none is asked for, diffusers float32: agree on float32.
    config = partial / "text_encoder" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "dtype": "float32"}, indent=2) + "\n")
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(runs / "tokenizer" / name, partial / "tokenizer" / name)
    if (output / "README.md").exists():  # the model card is written by hand
        shutil.copy(output / "README.md", partial / "README.md")
    shutil.rmtree(output, ignore_errors=True)
    partial.rename(output)
    size = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
    print(f"{output}: {size / 2**20:.1f} MiB")


def main(argv: list[str] | None = None) -> int:
    """Command line: see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("vae", "text_encoder", "diffusion", "export"))
    parser.add_argument("--recipe", type=Path, default=HERE / "recipe.yaml", help="settings (default: %(default)s)")
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/base"), help="checkpoints and data (default: %(default)s)"
    )
    parser.add_argument(
        "--output", type=Path, default=EMBEDDED_BASE, help="`export` writes here (default: %(default)s)"
    )
    parser.add_argument(
        "--start_from",
        type=Path,
        help="a diffusers folder: `vae` takes its autoencoder as it is, `text_encoder` and `diffusion` begin with its "
        "weights instead of random ones",
    )
    arguments = parser.parse_args(argv)
    recipe = Recipe.load(arguments.recipe)
    if arguments.stage == "export":
        export(arguments.runs, arguments.output)
    else:
        stages = {"vae": train_vae, "text_encoder": train_text_encoder, "diffusion": train_diffusion}
        stages[arguments.stage](recipe, arguments.runs, arguments.start_from)
    return 0


if __name__ == "__main__":
    sys.exit(main())
