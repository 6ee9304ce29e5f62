"""Train the embedded base model on drawn scenes, a stage at a time.

    python tiny_world/train_base.py vae         # AutoencoderKL
    python tiny_world/train_base.py diffusion   # CLIP text encoder and UNet together
    python tiny_world/train_base.py export      # the diffusers folder, half precision

Every stage resumes where it stopped (Ctrl-C saves), shows its progress, and uses a GPU where there is one. On several
processes: `torchrun --nproc_per_node 2 tiny_world/train_base.py vae`. To train the shipped model further without its
checkpoints: `vae` and then `diffusion`, both with `--start_from tiny_world/base`. Settings live in `recipe.yaml` beside
this file.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import random
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from accelerate import PartialState
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import nn
from tqdm.auto import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from multisubject.tiny_world.scenes import (
    CATEGORIES,
    COLOURS,
    PATTERNS,
    SETTINGS,
    World,
    describe,
    random_scene,
    render,
)
from multisubject.tiny_world.training import Batch, Schedule, train

HERE = Path(__file__).parent
MAX_TOKENS = 77
NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "prediction_type": "v_prediction"}


@dataclass(frozen=True)
class Recipe:
    """`recipe.yaml`, checked: unknown or missing sections and settings are refused."""

    world: World
    data: dict[str, Any]
    vae: dict[str, Any]
    diffusion: dict[str, Any]

    @classmethod
    def load(cls, path: Path) -> Recipe:
        """Read a recipe from YAML."""
        sections = yaml.safe_load(path.read_text())
        expected = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(sections, dict) or set(sections) != expected:
            raise ValueError(f"{path}: sections {sorted(sections)}; expected {sorted(expected)}.")
        known = {field.name for field in dataclasses.fields(World)}
        if unknown := set(sections["world"]) - known:
            raise ValueError(f"{path}: world has unknown settings {sorted(unknown)}; expected some of {sorted(known)}.")
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


def scene_data(recipe: Recipe, folder: Path) -> tuple[torch.Tensor, list[list[str]]]:
    """Pictures `(scenes, 3, size, size)` uint8 and captions per picture; drawn once, then read from `folder`."""
    pixels, words = folder / "scenes.npy", folder / "captions.json"
    with process_state().main_process_first():
        if not (pixels.exists() and words.exists()):
            folder.mkdir(parents=True, exist_ok=True)
            settings = recipe.data
            jobs = [
                (settings["seed"], i, settings["captions_per_scene"], recipe.world) for i in range(settings["scenes"])
            ]
            with multiprocessing.get_context("spawn").Pool() as pool:
                drawn = list(tqdm(pool.imap(_draw_scene, jobs, chunksize=64), total=len(jobs), desc="scenes"))
            np.save(pixels, np.stack([picture for picture, _ in drawn]))
            words.write_text(json.dumps([captions for _, captions in drawn]))
    pictures = torch.from_numpy(np.load(pixels, mmap_mode="c"))
    return pictures.permute(0, 3, 1, 2), json.loads(words.read_text())


def make_tokenizer(folder: Path) -> CLIPTokenizer:
    """A CLIP tokenizer (byte-pair encoding, 77 tokens) whose vocabulary holds the words of the whole renderer."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    if not (folder / "tokenizer.json").exists():
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())  # all 256 bytes, so that no text is unknown
        bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
        bpe.normalizer, bpe.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
        rng = random.Random(0)
        world = World(categories=CATEGORIES, colours=tuple(COLOURS), patterns=PATTERNS, settings=SETTINGS)
        captions = [describe(random_scene(rng, world), rng) for _ in range(5000)]
        special = ["<|startoftext|>", "<|endoftext|>"]
        bpe.train_from_iterator(
            captions,
            trainers.BpeTrainer(
                vocab_size=1024,
                end_of_word_suffix="</w>",
                initial_alphabet=letters,
                special_tokens=special,
                show_progress=False,
            ),
        )
        model = json.loads(bpe.to_str())["model"]
        vocabulary = model["vocab"]
        for letter in letters:
            for token in (letter, letter + "</w>"):
                vocabulary.setdefault(token, len(vocabulary))
        merges = [tuple(merge) if isinstance(merge, list) else tuple(merge.split()) for merge in model["merges"]]
        tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MAX_TOKENS)
        tokenizer.save_pretrained(folder)
        # transformers 4 reads these two instead of tokenizer.json's model.
        (folder / "vocab.json").write_text(json.dumps(vocabulary))
        (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(merge) for merge in merges) + "\n")
    return CLIPTokenizer.from_pretrained(folder)


def stratified(limit: int, count: int, generator: torch.Generator) -> torch.Tensor:
    """`count` whole numbers below `limit`, one from each of `count` equal ranges, in random order.

    Every batch then sees all noise levels, which makes its gradient less noisy (Kingma et al. 2021, arXiv:2107.00630).
    """
    positions = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    return (positions * limit).long()[torch.randperm(count, generator=generator)]


# --- networks with their losses --------------------------------------------------------------------------------------


class AutoencoderLoss(nn.Module):
    """AutoencoderKL with L1, edge and KL terms, all means over elements."""

    def __init__(self, vae: AutoencoderKL, edge_weight: float, kl_weight: float):
        super().__init__()
        self.vae, self.edge_weight, self.kl_weight = vae, edge_weight, kl_weight

    def forward(self, pixels: torch.Tensor, noise: torch.Tensor) -> dict[str, torch.Tensor]:
        """`pixels`: uint8 `(batch, 3, height, width)`; `noise`: standard normal of the latents' shape."""
        images = pixels.float() / 127.5 - 1
        posterior = self.vae.encode(images).latent_dist
        decoded = self.vae.decode(posterior.mean + posterior.std * noise).sample.float()
        error = decoded - images
        edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        l1, kl = error.abs().mean(), posterior.kl().mean() / posterior.mean[0].numel()
        return {"loss": l1 + self.edge_weight * edges + self.kl_weight * kl, "l1": l1.detach(), "kl": kl.detach()}


class DiffusionLoss(nn.Module):
    """Text encoder and UNet: the mean squared error of v, trimmed where noise is so low that only texture is left.

    A step's weight is 1 up to a signal-to-noise ratio of `snr_gamma` and falls as `snr_gamma / snr` beyond: the cap of
    min-SNR (Hang et al. 2023, arXiv:2303.09556), without its discount of the noisiest steps, where words decide most.
    """

    def __init__(self, text_encoder: CLIPTextModel, unet: UNet2DConditionModel, snr_gamma: float):
        super().__init__()
        self.text_encoder, self.unet, self.snr_gamma = text_encoder, unet, snr_gamma
        self.schedule = DDPMScheduler(**NOISE)

    def forward(
        self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor, input_ids: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """`latents`, `noise`: `(batch, 4, h, w)`; `timesteps`: `(batch,)`; `input_ids`: `(batch, 77)`."""
        noisy = self.schedule.add_noise(latents, noise, timesteps)
        target = self.schedule.get_velocity(latents, noise, timesteps)
        prompt_embeds = self.text_encoder(input_ids)[0]
        prediction = self.unet(noisy, timesteps, prompt_embeds).sample.float()
        alphas = self.schedule.alphas_cumprod.to(latents.device)[timesteps]
        weights = (self.snr_gamma * (1 - alphas) / alphas).clamp(max=1.0)
        errors = (prediction - target).square().mean(dim=(1, 2, 3))
        return {"loss": (weights * errors).sum() / weights.sum(), "mse": errors.mean().detach()}


# --- stages ----------------------------------------------------------------------------------------------------------


def train_vae(recipe: Recipe, runs: Path, earlier: Path | None = None) -> None:
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


def start_from(folder: Path, text_encoder: CLIPTextModel, unet: UNet2DConditionModel, tokenizer: CLIPTokenizer) -> None:
    """Copy the weights of an earlier model of the same networks; the vocabularies may differ, words are matched."""
    earlier = CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32)
    vocabulary = CLIPTokenizer.from_pretrained(folder / "tokenizer").get_vocab()
    rows = [(row, vocabulary[token]) for token, row in tokenizer.get_vocab().items() if token in vocabulary]
    weights, embedding = earlier.state_dict(), "embeddings.token_embedding.weight"
    words = text_encoder.state_dict()[embedding].clone()
    words[[row for row, _ in rows]] = weights[embedding][[row for _, row in rows]]
    text_encoder.load_state_dict({**weights, embedding: words})
    unet.load_state_dict(UNet2DConditionModel.from_pretrained(folder / "unet").float().state_dict())


def train_diffusion(recipe: Recipe, runs: Path, earlier: Path | None = None) -> None:
    """Text encoder and UNet together on the latents of `runs/vae`; ends with `runs/text_encoder` and `runs/unet`."""
    if not (runs / "latents.npy").exists():
        raise FileNotFoundError(f"{runs / 'latents.npy'} is missing: run the `vae` stage first.")
    schedule, settings = split_schedule(recipe.diffusion)
    _, captions = scene_data(recipe, runs)
    scaling = AutoencoderKL.load_config(runs / "vae")["scaling_factor"]
    latents = torch.from_numpy(np.load(runs / "latents.npy")).float() * scaling
    with process_state().main_process_first():
        tokenizer = make_tokenizer(runs / "tokenizer")

    def tokenize(texts: list[str]) -> torch.Tensor:
        return tokenizer(
            texts, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt"
        ).input_ids

    input_ids = (
        tokenize([caption for group in captions for caption in group]).view(len(captions), -1, MAX_TOKENS).short()
    )
    no_caption = tokenize([""])[0].short()

    torch.manual_seed(schedule.seed)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **settings["text_encoder"],
        )
    )
    unet = UNet2DConditionModel(
        sample_size=latents.shape[-1],
        cross_attention_dim=settings["text_encoder"]["hidden_size"],
        **settings["unet"],
    )
    if earlier is not None:
        start_from(earlier, text_encoder, unet, tokenizer)
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
        }

    if settings["compile"]:
        unet.compile()
    model = DiffusionLoss(text_encoder, unet, settings["snr_gamma"])
    average = train(model, draw_batch, schedule, runs / "diffusion.pt", description="diffusion")
    if average is None or not process_state().is_main_process:
        return
    model.load_state_dict(average, strict=False)
    text_encoder.save_pretrained(runs / "text_encoder")
    unet.save_pretrained(runs / "unet")


def export(recipe: Recipe, runs: Path, output: Path) -> None:
    """Put the trained parts together as a Stable Diffusion folder in half precision."""
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
    parser.add_argument("stage", choices=("vae", "diffusion", "export"))
    parser.add_argument("--recipe", type=Path, default=HERE / "recipe.yaml", help="settings (default: %(default)s)")
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/base"), help="checkpoints and data (default: %(default)s)"
    )
    parser.add_argument(
        "--output", type=Path, default=HERE / "base", help="`export` writes here (default: %(default)s)"
    )
    parser.add_argument(
        "--start_from",
        type=Path,
        help="a diffusers folder: `vae` takes its autoencoder as it is, `diffusion` begins with its text encoder and "
        "UNet instead of random weights",
    )
    arguments = parser.parse_args(argv)
    recipe = Recipe.load(arguments.recipe)
    if arguments.stage == "vae":
        train_vae(recipe, arguments.runs, arguments.start_from)
    elif arguments.stage == "diffusion":
        train_diffusion(recipe, arguments.runs, arguments.start_from)
    else:
        export(recipe, arguments.runs, arguments.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
