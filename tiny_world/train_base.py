"""Train an embedded base model on drawn scenes, a stage at a time.

    python tiny_world/train_base.py vae            # AutoencoderKL: what a picture's latents are
    python tiny_world/train_base.py decoder        # its decoder, made crisp
    python tiny_world/train_base.py text_encoder   # CLIP text encoder
    python tiny_world/train_base.py diffusion      # UNet
    python tiny_world/train_base.py export         # the diffusers folder, half precision

Every stage resumes where it stopped (Ctrl-C saves), shows its progress, and uses a GPU where there is one. On several
processes: `torchrun --nproc_per_node 2 tiny_world/train_base.py vae`. To train a shipped model further without its
checkpoints: the stages with `--start_from tiny_world/base`. Settings live in `recipe.yaml` beside this file.

The base of Stable Diffusion XL's kind has a recipe of its own. It shares scenes and autoencoder with the other base,
and starts from its text encoder and UNet:

    xl="--recipe tiny_world/recipe_xl.yaml --runs runs/base_xl --scenes runs/base --start_from tiny_world/base"
    python tiny_world/train_base.py vae $xl      # encodes the scenes, trains nothing
    python tiny_world/train_base.py text_encoder $xl
    python tiny_world/train_base.py diffusion $xl
    python tiny_world/train_base.py export $xl
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import AttnProcessor
from tqdm.auto import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from multisubject.base_models import pixels_per_latent, tokenizer_of
from multisubject.tiny_world import EMBEDDED_BASE, EMBEDDED_BASE_XL
from multisubject.tiny_world.base_losses import (
    NOISE,
    AutoencoderLoss,
    CaptionLoss,
    DecoderLoss,
    DiffusionLoss,
    PatchDiscriminator,
    text_configs,
)
from multisubject.tiny_world.recipe import Recipe, scene_data, split_schedule, stratified
from multisubject.tiny_world.scenes import ADJECTIVES, CATEGORIES, COLOURS, SETTINGS
from multisubject.tiny_world.training import Batch, process_state, train
from multisubject.tiny_world.words import ATTRIBUTES, MAX_TOKENS, make_tokenizer, said_looks, tokenize, word_ids
from multisubject.training.models import TextEncoders

HERE = Path(__file__).parent
ENCODER_CLASSES = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}


@dataclass(frozen=True)
class Job:
    """What a stage is asked to do.

    Args:
        recipe: the settings.
        runs: folder of checkpoints and results.
        scenes: folder of the drawn scenes.
        earlier: a diffusers folder whose weights are the beginning; None for random ones.
    """

    recipe: Recipe
    runs: Path
    scenes: Path
    earlier: Path | None

    def scene_data(self) -> tuple[torch.Tensor, list[list[str]]]:
        """Pictures, on the device that trains, and captions."""
        pictures, captions = scene_data(self.recipe, self.scenes)
        return pictures.to(process_state().device), captions

    def needs(self, name: str, stage: str) -> Path:
        """A file or folder that an earlier stage leaves in `runs`. FileNotFoundError names the stage."""
        path = self.runs / name
        if not path.exists():
            raise FileNotFoundError(f"{path} is missing: run the `{stage}` stage first.")
        return path


# --- stages ----------------------------------------------------------------------------------------------------------


def train_vae(job: Job) -> None:
    """AutoencoderKL on the pictures; ends with `runs/vae` and `runs/latents.npy`.

    An earlier model's is taken as it is, and is the `decoder` stage's result too. Where its pictures are smaller, a new
    one is trained on its latents (see `AutoencoderLoss`).
    """
    schedule, settings = split_schedule(job.recipe.vae)
    pictures, _ = job.scene_data()
    teacher = None if job.earlier is None else AutoencoderKL.from_pretrained(job.earlier / "vae").float()
    if teacher is not None and teacher.config.sample_size == job.recipe.world.image_size:
        if process_state().is_main_process:
            save_vae(teacher, pictures, job.runs, teacher.config.scaling_factor)
            teacher.save_pretrained(job.runs / "decoder")
        return
    torch.manual_seed(schedule.seed)
    levels = len(settings["network"]["block_out_channels"])
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        latent_channels=4,
        sample_size=job.recipe.world.image_size,
        mid_block_add_attention=False,
        **settings["network"],
    )
    model = AutoencoderLoss(vae, settings["edge_weight"], settings["kl_weight"], teacher)
    average = train(model, picture_batches(vae, pictures), schedule, job.runs / "vae.pt", description="vae")
    if average is None or not process_state().is_main_process:
        return
    model.load_state_dict(average, strict=False)
    save_vae(vae, pictures, job.runs, None if teacher is None else teacher.config.scaling_factor)


def picture_batches(vae: AutoencoderKL, pictures: torch.Tensor) -> Callable[[torch.Generator, int], Batch]:
    """Random pictures, and noise for their latents."""
    size = pictures.shape[-1] // pixels_per_latent(vae.config)

    def draw_batch(generator: torch.Generator, count: int) -> Batch:
        device = generator.device
        rows = torch.randint(len(pictures), (count,), generator=generator, device=device)
        noise = torch.randn(count, vae.config.latent_channels, size, size, generator=generator, device=device)
        return {"pixels": pictures[rows], "noise": noise}

    return draw_batch


def save_vae(vae: AutoencoderKL, pictures: torch.Tensor, runs: Path, scaling_factor: float | None = None) -> None:
    """Write the autoencoder and what it makes of the pictures."""
    vae.cpu().eval()
    latents = encode(vae, pictures)
    # Stable Diffusion's convention: the UNet sees latents of unit standard deviation.
    vae.register_to_config(scaling_factor=scaling_factor or round(1 / latents.std().item(), 5))
    vae.save_pretrained(runs / "vae")
    np.save(runs / "latents.npy", latents.half().numpy())


@torch.inference_mode()
def encode(vae: AutoencoderKL, pictures: torch.Tensor, batch_size: int = 128) -> torch.Tensor:
    """Posterior means `(scenes, 4, h, w)` of uint8 pictures, unscaled."""
    vae.to(pictures.device)
    batches = [
        vae.encode(pictures[i : i + batch_size].float() / 127.5 - 1).latent_dist.mean.cpu()
        for i in tqdm(range(0, len(pictures), batch_size), desc="latents")
    ]
    vae.cpu()
    return torch.cat(batches)


def train_decoder(job: Job) -> None:
    """The decoder of `runs/vae` against a discriminator; ends with `runs/decoder`, the autoencoder that is exported."""
    vae = AutoencoderKL.from_pretrained(job.needs("vae", "vae")).float()
    schedule, settings = split_schedule(job.recipe.decoder)
    pictures, _ = job.scene_data()
    torch.manual_seed(schedule.seed)
    discriminator = PatchDiscriminator(settings.pop("discriminator")["channels"])
    model = DecoderLoss(vae, discriminator, **settings)
    average = train(model, picture_batches(vae, pictures), schedule, job.runs / "decoder.pt", description="decoder")
    if average is None or not process_state().is_main_process:
        return
    model.load_state_dict(average, strict=False)
    vae.save_pretrained(job.runs / "decoder")


def make_text_encoders(job: Job, tokenizer: CLIPTokenizer) -> TextEncoders:
    """Random weights, or those of an earlier model as far as it has them."""
    encoders = {}
    for name, network in job.recipe.text_encoder["networks"].items():
        if unknown := set(network) - set(CLIPTextConfig().to_dict()):
            raise ValueError(f"text_encoder.networks.{name}: unknown settings {sorted(unknown)} for a CLIPTextConfig.")
        config = CLIPTextConfig(
            vocab_size=len(tokenizer),
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **network,
        )
        encoders[name] = encoder = ENCODER_CLASSES[name](config)
        if job.earlier is not None and (job.earlier / name).exists():
            weights = type(encoder).from_pretrained(job.earlier / name, dtype=torch.float32).state_dict()
            encoder.load_state_dict(weights, strict=False)  # the first layers of one that has fewer
    if len(encoders) > 1:  # nothing reads the first one's last layer
        unread = getattr(encoders["text_encoder"], "text_model", encoders["text_encoder"])
        unread.encoder.layers[-1].requires_grad_(False)
        unread.final_layer_norm.requires_grad_(False)
    return TextEncoders(encoders)


def train_text_encoder(job: Job) -> None:
    """CLIP's text encoders on the captions; ends with `runs/text_encoder` (and `_2`) and `runs/input_ids.npy`."""
    schedule, _ = split_schedule(job.recipe.text_encoder)
    _, groups = scene_data(job.recipe, job.scenes)
    with process_state().main_process_first():
        if job.earlier is not None:
            shutil.copytree(job.earlier / "tokenizer", job.runs / "tokenizer", dirs_exist_ok=True)
        tokenizer = make_tokenizer(job.runs / "tokenizer")
    torch.manual_seed(schedule.seed)
    encoders, teacher = make_text_encoders(job, tokenizer), None
    if job.recipe.is_xl and job.earlier is not None and not (job.earlier / "text_encoder_2").exists():
        encoder = CLIPTextModel.from_pretrained(job.earlier / "text_encoder", dtype=torch.float32)
        teacher = TextEncoders({"text_encoder": encoder})

    captions = [group[0] for group in groups]
    all_ids = tokenize(tokenizer, [caption for group in groups for caption in group]).view(len(groups), -1, MAX_TOKENS)
    if process_state().is_main_process:
        np.save(job.runs / "input_ids.npy", all_ids.numpy())
    input_ids = all_ids[:, 0]
    names = {row: token.removesuffix("</w>") for token, row in tokenizer.get_vocab().items()}
    looks = np.full((*input_ids.shape, len(ATTRIBUTES)), -100, dtype=np.int8)
    settings = torch.zeros(len(captions), dtype=torch.long)
    things = [*CATEGORIES, *COLOURS]
    present = torch.zeros(len(captions), len(things))
    for row, (caption, ids) in enumerate(zip(captions, input_ids.tolist(), strict=True)):
        words = [names[token] for token in ids]
        for position, look in enumerate(said_looks(words)):
            if look is not None:
                looks[row, position] = [
                    values.index(look[attribute]) + 1 if attribute in look else 0
                    for attribute, values in ATTRIBUTES.items()
                ]
        settings[row] = next((i + 1 for i, setting in enumerate(SETTINGS) if caption.endswith(setting)), 0)
        present[row] = torch.tensor([float(thing in words) for thing in things])
    device = process_state().device
    whole = {
        "input_ids": input_ids.to(device),
        "looks": torch.from_numpy(looks).to(device),
        "settings": settings.to(device),
        "present": present.to(device),
    }

    def draw_batch(generator: torch.Generator, count: int) -> Batch:
        rows = torch.randint(len(captions), (count,), generator=generator, device=generator.device)
        batch = {name: values[rows] for name, values in whole.items()}
        return {**batch, "input_ids": batch["input_ids"].long(), "looks": batch["looks"].long()}

    classes = {name: len(values) + 1 for name, values in ATTRIBUTES.items()}
    model = CaptionLoss(encoders, {**classes, "setting": len(SETTINGS) + 1, "present": len(things)}, teacher)
    average = train(model, draw_batch, schedule, job.runs / "text_encoder.pt", description="text encoder")
    if average is None or not process_state().is_main_process:
        return
    model.load_state_dict(average, strict=False)
    for name, encoder in encoders.encoders.items():
        cast(Any, encoder).save_pretrained(job.runs / name)


def load_text_encoders(job: Job) -> TextEncoders:
    """What the `text_encoder` stage has left."""
    return TextEncoders(
        {
            name: ENCODER_CLASSES[name].from_pretrained(job.needs(name, "text_encoder"), dtype=torch.float32)
            for name in job.recipe.text_encoder["networks"]
        }
    )


def make_unet(recipe: Recipe, encoders: TextEncoders, sample_size: int) -> UNet2DConditionModel:
    """Random weights. Of two encoders it reads the outputs side by side, a pooled embedding and sizes."""
    settings = dict(recipe.diffusion["unet"])
    if recipe.is_xl:
        pooled = text_configs(encoders)[-1].projection_dim
        settings["addition_embed_type"] = "text_time"
        settings["projection_class_embeddings_input_dim"] = pooled + 6 * settings["addition_time_embed_dim"]
    return UNet2DConditionModel(
        sample_size=sample_size,
        cross_attention_dim=sum(config.hidden_size for config in text_configs(encoders)),
        **settings,
    )


def load_earlier_unet(unet: UNet2DConditionModel, earlier: Path) -> None:
    """Take the weights of an earlier model. Those of one that reads a single text encoder and no sizes are moved over
    so that the outputs are the same: what is new starts at zero."""
    old = UNet2DConditionModel.from_pretrained(earlier / "unet").float().state_dict()
    new = unet.state_dict()
    for name, weight in new.items():
        if name not in old:
            if name.startswith("add_embedding.linear_2."):
                weight.zero_()
        elif old[name].shape == weight.shape:
            weight.copy_(old[name])
        elif name.split(".")[-2] in ("to_k", "to_v") and old[name].shape[1] < weight.shape[1]:
            # The first encoder's columns come first.
            weight.zero_()[:, : old[name].shape[1]] = old[name]
        else:
            raise ValueError(
                f"--start_from {earlier}: its UNet's {name} is {tuple(old[name].shape)}, the recipe's "
                f"{tuple(weight.shape)}; expected a model of the same `diffusion.unet`."
            )
    unet.load_state_dict(new)


def draw_conditions(
    recipe: Recipe, encoders: int, captioned: torch.Tensor, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """How `DiffusionLoss` is to read the captions of a batch.

    Of two encoders both carry the caption in a third of the rows and one alone in a third each. Where there is no
    caption, half of the rows are zeros, as an absent negative prompt of Stable Diffusion XL is, and half are the empty
    text. Sizes and crops are drawn at random, from a quarter of a picture to four pictures, and so say nothing: drawn
    scenes look the same at any size.

    Args:
        encoders: how many there are.
        captioned: `(batch,)` bool, which rows have a caption.
    """
    device, count = generator.device, len(captioned)

    def draw(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator, device=device)

    conditions = {
        "condensed": (draw(count) < recipe.diffusion["condensed_captions"]) & captioned,
        "carrying": torch.ones(count, encoders, dtype=torch.bool, device=device),
    }
    if encoders == 2:
        share, zeros = draw(count), draw(count) < 0.5
        both = torch.stack([share < 2 / 3, (share < 1 / 3) | (share >= 2 / 3)], dim=1)
        conditions["carrying"] = torch.where(captioned[:, None], both, zeros[:, None])
        size = recipe.world.image_size
        original = size * 4.0 ** (2 * draw(count, 2) - 1)
        cropped = draw(count, 2) * (draw(count, 1) < 0.5) * size
        target = torch.full_like(original, size)
        conditions["time_ids"] = torch.cat([original, cropped, target], dim=1).round()
    return conditions


def train_diffusion(job: Job) -> None:
    """UNet on the latents of `runs/vae` and the words of `runs/text_encoder`; ends with `runs/unet`."""
    recipe, device = job.recipe, process_state().device
    schedule, settings = split_schedule(recipe.diffusion)
    stored = np.load(job.needs("latents.npy", "vae"))
    scaling = AutoencoderKL.load_config(job.runs / "vae")["scaling_factor"]
    latents = torch.from_numpy(stored).to(device)
    input_ids = torch.from_numpy(np.load(job.needs("input_ids.npy", "text_encoder"))).to(device)
    tokenizer = CLIPTokenizer.from_pretrained(job.runs / "tokenizer")
    encoders = load_text_encoders(job)
    no_caption = tokenize(tokenizer, [""])[0].to(device)
    if len(latents) != len(input_ids):
        raise ValueError(
            f"{job.runs} has latents of {len(latents)} scenes and captions of {len(input_ids)}; run the `vae` and the "
            "`text_encoder` stage on the same scenes."
        )

    torch.manual_seed(schedule.seed)
    unet = make_unet(recipe, encoders, latents.shape[-1])
    if job.earlier is not None:
        load_earlier_unet(unet, job.earlier)
    timesteps = len(DDPMScheduler(**NOISE).alphas_cumprod)

    def draw_batch(generator: torch.Generator, count: int) -> Batch:
        rows = torch.randint(len(latents), (count,), generator=generator, device=device)
        variants = torch.randint(input_ids.shape[1], (count,), generator=generator, device=device)
        captioned = torch.rand(count, generator=generator, device=device) >= settings["caption_dropout"]
        return {
            "latents": latents[rows].float() * scaling,
            "noise": torch.randn(count, *latents.shape[1:], generator=generator, device=device),
            "timesteps": stratified(timesteps, count, generator),
            "input_ids": torch.where(captioned[:, None], input_ids[rows, variants], no_caption).long(),
            **draw_conditions(recipe, len(encoders.encoders), captioned, generator),
        }

    if device.type == "cpu":
        # Plain matrix products: fused attention, whose gradient is slow on a CPU, made a step take 1.3 times as long.
        unet.set_attn_processor(AttnProcessor())
    if settings["compile"]:
        unet.compile(mode="reduce-overhead" if device.type == "cuda" else "default")
    words = (word_ids(tokenizer, words) for words in (ADJECTIVES, CATEGORIES))
    model = DiffusionLoss(encoders, unet, settings["snr_gamma"], *words)
    average = train(model, draw_batch, schedule, job.runs / "diffusion.pt", description="diffusion")
    if average is None or not process_state().is_main_process:
        return
    model.load_state_dict(average, strict=False)
    unet.save_pretrained(job.runs / "unet")


def export(job: Job, output: Path) -> None:
    """Put the trained parts together as a folder of Stable Diffusion (XL) in half precision; replaces an earlier one.

    Raises FileExistsError where `output` is something else, which would be lost.
    """
    if output.exists() and not (output / "model_index.json").is_file() and (output.is_file() or any(output.iterdir())):
        raise FileExistsError(f"--output {output} holds no earlier model (no model_index.json); choose another.")
    encoders = load_text_encoders(job).encoders
    tokenizer_names = [tokenizer_of(name) for name in encoders]
    parts: dict[str, Any] = {
        "vae": AutoencoderKL.from_pretrained(job.needs("decoder", "decoder")),
        "unet": UNet2DConditionModel.from_pretrained(job.needs("unet", "diffusion")),
        **encoders,
        **{name: CLIPTokenizer.from_pretrained(job.runs / "tokenizer") for name in tokenizer_names},
    }
    pipeline: DiffusionPipeline
    if job.recipe.is_xl:
        pipeline = StableDiffusionXLPipeline(
            **parts,
            scheduler=EulerDiscreteScheduler(**NOISE, timestep_spacing="leading", steps_offset=1),
            force_zeros_for_empty_prompt=True,
            add_watermarker=False,
        )
    else:
        pipeline = StableDiffusionPipeline(
            **parts,
            scheduler=DDIMScheduler(**NOISE, clip_sample=False, set_alpha_to_one=False, steps_offset=1),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    pipeline.to(torch.float16).save_pretrained(partial)
    for name in ("vae", "unet", *encoders):
        config = partial / name / "config.json"
        settings = json.loads(config.read_text())
        settings.pop("_name_or_path", None)  # of this machine
        if name in encoders:
            # transformers 5 takes the dtype of the files when none is asked for, diffusers float32: agree on float32.
            settings["dtype"] = "float32"
        config.write_text(json.dumps(settings, indent=2) + "\n")
    for tokenizer in tokenizer_names:
        for name in ("vocab.json", "merges.txt"):
            shutil.copy(job.runs / "tokenizer" / name, partial / tokenizer / name)
    if (output / "README.md").exists():  # the model card is written by hand
        shutil.copy(output / "README.md", partial / "README.md")
    shutil.rmtree(output, ignore_errors=True)
    partial.rename(output)
    size = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
    print(f"{output}: {size / 2**20:.1f} MiB")


def main(argv: list[str] | None = None) -> int:
    """Command line: see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("vae", "decoder", "text_encoder", "diffusion", "export"))
    parser.add_argument("--recipe", type=Path, default=HERE / "recipe.yaml", help="settings (default: %(default)s)")
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/base"), help="checkpoints and results (default: %(default)s)"
    )
    parser.add_argument("--scenes", type=Path, help="the drawn scenes (default: in --runs)")
    parser.add_argument(
        "--output", type=Path, help="`export` writes here (default: tiny_world/base, or base_xl of two text encoders)"
    )
    parser.add_argument(
        "--start_from",
        type=Path,
        help="a diffusers folder: `vae` takes its autoencoder as it is, `text_encoder` and `diffusion` begin with its "
        "weights instead of random ones",
    )
    arguments = parser.parse_args(argv)
    job = Job(Recipe.load(arguments.recipe), arguments.runs, arguments.scenes or arguments.runs, arguments.start_from)
    if arguments.stage == "export":
        export(job, arguments.output or (EMBEDDED_BASE_XL if job.recipe.is_xl else EMBEDDED_BASE))
    else:
        stages = {
            "vae": train_vae,
            "decoder": train_decoder,
            "text_encoder": train_text_encoder,
            "diffusion": train_diffusion,
        }
        stages[arguments.stage](job)
    return 0


if __name__ == "__main__":
    sys.exit(main())
