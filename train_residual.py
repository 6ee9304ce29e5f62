"""Teach Stable Diffusion a subject from a few pictures: pictures + class phrase -> residual embedding.

    accelerate launch train_residual.py --instance_data_dir data/petrucci --instance_prompt person \\
        --output_dir output/petrucci

learns what `person` has to mean so that these pictures come out, and leaves in `output/petrucci`: the adapter
`petrucci.safetensors`, `residual.pt` for older tools, a model card with sample pictures, `config.yaml`, the loss curve,
validation pictures and checkpoints. `--help` explains every flag; `--config file.yaml` reads them from a file.

Everything random is a function of (seed, step, number of the sample in the step), never of what ran before. That is
why a resumed run ends where an uninterrupted one does, and several processes learn what one does with their batch.
"""

from __future__ import annotations

import copy
import hashlib
import io
import logging
import math
import random
import re
import signal
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import yaml
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedDataParallelKwargs
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from diffusers.optimization import SchedulerType, get_scheduler
from diffusers.utils.logging import disable_progress_bar
from huggingface_hub import whoami
from huggingface_hub.errors import HTTPError
from PIL import Image
from torch import nn
from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from multisubject.base_models import BASE_MODEL_MIRRORS, base_model_errors, fingerprint_text_encoder
from multisubject.hub_utils import inspect_subject, push_subject_to_hub, save_subject
from multisubject.model_card import sample_path, subject_card
from multisubject.pictures import picture_digests, png_bytes
from multisubject.residual_embeddings import ResidualEmbedding, find_token_spans
from multisubject.subject_file import check_class_phrase, write_atomically
from multisubject.tiny_world import EMBEDDED_BASE
from multisubject.training_checkpoints import (
    Interrupted,
    Progress,
    StopRequest,
    check_output,
    checkpoint_parameters,
    latest_checkpoint,
    remove_earlier_run,
    resume,
    save_checkpoint,
    writing,
)
from multisubject.training_config import LEARNING_RATES, TrainConfig, parse_config, read_concepts
from multisubject.training_data import Picture, bucket_size, crops, is_picture, load_pictures
from multisubject.visualization import contact_sheet

logger = logging.getLogger("train_residual")

# Sentences that say nothing about place, colour or manner: whatever those words would say, the pictures do not.
TEMPLATES = (
    "a photo of a {}",
    "a photo of the {}",
    "a photo of {}",
    "a picture of a {}",
    "a picture of the {}",
    "a picture of {}",
    "the photo of a {}",
    "a {}",
    "the {}",
    "{}",
)
VALIDATION_PROMPTS = (
    "a photo of a {}",
    "a photo of a {} on the beach",
    "a photo of a {} in the snow",
    "a photo of a {} at night",
)
CLASS_STEPS, CLASS_GUIDANCE_SCALE = 25, 7.5
"""How class pictures are drawn: not like validation pictures, which somebody may want quick and rough."""


# --- models ----------------------------------------------------------------------------------------------------------


@dataclass
class Models:
    """The frozen base. The encoders come first and the UNet last, so that they are never all in memory for nothing:
    `unet` is None until all data is encoded, `text_encoder` once nothing needs it any more."""

    tokenizer: Any
    text_encoder: nn.Module | None
    vae: AutoencoderKL
    unet: UNet2DConditionModel | None
    unet_config: dict[str, Any]
    noise_scheduler: DDPMScheduler
    sampling_scheduler: Any
    device: torch.device
    dtype: torch.dtype
    fingerprint: str | None

    @property
    def downscale(self) -> int:
        """Picture pixels per latent."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def native_resolution(self) -> int:
        """Picture size that the base was trained at."""
        return int(self.unet_config["sample_size"] * self.downscale)

    @property
    def size_multiple(self) -> int:
        """Picture sides have to be multiples of this for the UNet to halve them all the way down."""
        return int(self.downscale * 2 ** (len(self.unet_config["block_out_channels"]) - 1))


def load_encoders(config: TrainConfig, accelerator: Accelerator) -> Models:
    """All of the base but the UNet, frozen, on the accelerator's device; the VAE in the mixed precision's dtype."""
    dtype = weight_dtype(accelerator)
    source = base_path(config)
    with base_model_errors(source):
        pipe = StableDiffusionPipeline.from_pretrained(
            source,
            revision=config.revision,
            variant=config.variant,
            dtype={"vae": dtype, "default": torch.float32},
            unet=None,
            safety_checker=None,
            requires_safety_checker=False,
        )
        unet_config = UNet2DConditionModel.load_config(source, subfolder="unet", revision=config.revision)
    if unet_config["in_channels"] != pipe.vae.config.latent_channels:
        raise ValueError(
            f"--pretrained_model_name_or_path: {source!r} has a UNet of {unet_config['in_channels']} input and "
            f"{pipe.vae.config.latent_channels} latent channels; expected a text-to-image base, not an inpainting one."
        )
    noise_scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    if noise_scheduler.config.prediction_type not in ("epsilon", "v_prediction"):
        raise ValueError(
            f"--pretrained_model_name_or_path: {source!r} predicts {noise_scheduler.config.prediction_type!r}; "
            "expected a base that predicts 'epsilon' or 'v_prediction'."
        )
    return Models(
        tokenizer=pipe.tokenizer,
        text_encoder=frozen(pipe.text_encoder, accelerator.device, torch.float32),
        vae=frozen(pipe.vae, accelerator.device, dtype),
        unet=None,
        unet_config=unet_config,
        noise_scheduler=noise_scheduler,
        sampling_scheduler=pipe.scheduler,
        device=accelerator.device,
        dtype=dtype,
        fingerprint=fingerprint_text_encoder(pipe.text_encoder),
    )


def load_unet(config: TrainConfig, models: Models) -> UNet2DConditionModel:
    """The base's UNet, frozen, in the models' dtype and on their device."""
    source = base_path(config)
    with base_model_errors(source):
        unet = UNet2DConditionModel.from_pretrained(
            source, subfolder="unet", revision=config.revision, variant=config.variant, dtype=models.dtype
        )
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    return frozen(unet, models.device, models.dtype)


def weight_dtype(accelerator: Accelerator) -> torch.dtype:
    """The dtype of the frozen UNet and VAE in the accelerator's mixed precision."""
    return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)


def frozen(module: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """`module` on that device in that dtype, in evaluation mode, without gradients of its own."""
    module = module.requires_grad_(False).eval().to(device)
    return module if module.dtype == dtype else module.to(dtype)


def base_path(config: TrainConfig) -> str:
    """Hub id or folder of the base."""
    return config.pretrained_model_name_or_path or str(EMBEDDED_BASE)


def encode_prompts(text_encoder: nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
    """Token ids `(prompts, length)` -> embeddings `(prompts, length, embed_dim)`, as the UNet reads them."""
    return text_encoder(input_ids)[0]


# --- data: everything that does not change during training, computed once --------------------------------------------


@dataclass(frozen=True)
class Prompts:
    """Prompts with their frozen embeddings.

    Args:
        texts: the prompts; the class phrase is in each.
        input_ids: `(prompts, length)`.
        positions: `(prompts, num_tokens)`, where the class phrase's tokens are; BOS is 0.
        base_embeds: float32 `(prompts, length, embed_dim)` of the *untuned* encoder.
        negative_embeds: `(1, length, embed_dim)` of the empty prompt.
    """

    texts: list[str]
    input_ids: torch.Tensor
    positions: torch.Tensor
    base_embeds: torch.Tensor
    negative_embeds: torch.Tensor

    def rows(self, texts: Sequence[str]) -> list[int]:
        """Where these prompts are."""
        return [self.texts.index(text) for text in texts]


@dataclass(frozen=True)
class View:
    """One crop of a picture: latents `(channels, h, w)`, and the subject's share of each cell `(1, h, w)` in [0, 1]."""

    latents: torch.Tensor
    mask: torch.Tensor | None


@dataclass(frozen=True)
class TrainingPicture:
    """A picture's views, and the rows of `Prompts` that it is learnt with."""

    views: list[View]
    rows: list[int]


@dataclass(frozen=True)
class Concept:
    """One subject ready to be learnt. `held_out` is empty without `--validation`; `digest` is of all its pictures."""

    config: TrainConfig
    prompts: Prompts
    pictures: list[TrainingPicture]
    held_out: list[TrainingPicture]
    validation_rows: list[int]
    digest: str
    class_pictures: list[TrainingPicture] = field(default_factory=list)
    picture_digests: Sequence[str] = ()  # by which the file says what it was trained on


def class_phrase_of(config: TrainConfig, tokenizer: Any) -> tuple[str, int]:
    """The class phrase and its number of tokens, checked against `token_num`."""
    phrase = " ".join((config.instance_prompt or "").split())
    if not phrase:
        raise ValueError("--instance_prompt: is empty; expected what the subject is, e.g. `person` or `red guitar`.")
    if "{}" in phrase:
        raise ValueError(
            f"--instance_prompt: {phrase!r}; expected the class phrase alone (`person`), sentences are --templates."
        )
    if re.match(r"(an?|the|my)\s|.*\b(photo|picture|image) of\b", phrase, re.IGNORECASE):
        raise ValueError(
            f"--instance_prompt: {phrase!r}; expected the class phrase alone, `dog` rather than `a photo of a dog`. "
            "There is no identifier word (`sks`): the subject gets its name when it is used. Sentences are --templates."
        )
    try:
        check_class_phrase(phrase)
    except ValueError as error:
        raise ValueError(f"--instance_prompt: {error}") from None
    count = len(find_token_spans(tokenizer, phrase, phrase)[0])
    if config.token_num is not None and config.token_num != count:
        tokens = tokenizer.tokenize(phrase)
        raise ValueError(
            f"--token_num: {config.token_num}, but --instance_prompt {phrase!r} is {count} tokens, {tokens}; "
            f"pass --token_num={count} or leave it out, or choose another class phrase."
        )
    return phrase, count


@torch.no_grad()
def build_prompts(said: Mapping[str, Sequence[str]], class_phrase: str, models: Models) -> Prompts:
    """Tokenise sentences, find the class phrase in each, and embed them with the untuned encoder.

    Args:
        said: where sentences come from (a flag, a caption's picture) -> the sentences.

    Raises:
        ValueError: a sentence does not say the class phrase; the message names where it comes from.
    """
    assert models.text_encoder is not None
    tokenizer = models.tokenizer

    def tokenize(sentences: list[str]) -> torch.Tensor:
        batch = tokenizer(
            sentences, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
        )
        return batch.input_ids.to(models.device)

    positions: dict[str, list[int]] = {}
    for origin, sentences in said.items():
        for sentence in sentences:
            try:
                # A prompt that says the phrase twice has the subject at the first place.
                positions[sentence] = list(find_token_spans(tokenizer, sentence, class_phrase)[0])
            except ValueError:
                raise ValueError(
                    f"{origin}: {sentence!r} does not say {class_phrase!r} as words of their own, in the first "
                    f"{tokenizer.model_max_length - 2} tokens; put it, or {{}}, where the subject is meant."
                ) from None
    texts = list(positions)
    input_ids = tokenize(texts)
    return Prompts(
        texts=texts,
        input_ids=input_ids,
        positions=torch.tensor(list(positions.values()), device=models.device),
        base_embeds=torch.cat([encode_prompts(models.text_encoder, chunk) for chunk in input_ids.split(16)]),
        negative_embeds=encode_prompts(models.text_encoder, tokenize([""])),
    )


@torch.no_grad()
def encode_picture(picture: Picture, config: TrainConfig, models: Models) -> list[View]:
    """Latents of a picture's crops and their mirror images, with the masks at the latents' size."""
    resolution = cast(int, config.resolution)
    size = (resolution, resolution)
    if config.aspect_ratio_buckets:
        size = bucket_size(*picture.image.size, resolution=resolution, multiple=models.size_multiple)
    rng = random.Random(f"{config.seed}/{picture.path.name}")
    views = []
    for image, mask in crops(picture, size, config.num_crops, rng):
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].to(models.device) / 127.5 - 1
        pixels_and_mirror = torch.cat([pixels, pixels.flip(-1)]) if config.random_flip else pixels
        latents = models.vae.encode(pixels_and_mirror.to(models.dtype)).latent_dist.mode().float()
        latents = latents * models.vae.config.scaling_factor
        weights = None
        if mask is not None:
            shares = torch.from_numpy(np.array(mask)).to(models.device)[None, None] / 255
            weights = nn.functional.interpolate(shares, latents.shape[-2:], mode="area")[0]
            if not weights.any():
                raise ValueError(
                    f"{picture.path}: nothing of its mask is left in the crop; crop it around the subject."
                )
        for index, latent in enumerate(latents):
            views.append(View(latent, weights.flip(-1) if weights is not None and index else weights))
    return views


def prepare_concept(config: TrainConfig, models: Models) -> Concept:
    """Read a subject's folder, check all of it, and cache its latents and prompt embeddings."""
    if config.instance_data_dir is None:
        raise ValueError("--instance_data_dir: missing; expected the folder with the subject's pictures.")
    class_phrase, token_num = class_phrase_of(config, models.tokenizer)
    found = load_pictures(config.instance_data_dir, strict=config.strict, use_masks=config.use_masks)
    if len(found) == 1:
        logger.warning(
            "%s: one picture only; its background will be learnt with it. Three to six are better.", config.subject_name
        )
    masked = sum(picture.mask is not None for picture in found)
    captioned = sum(picture.caption is not None for picture in found)
    logger.info("%s: %d pictures, %d masks in use, %d captions.", config.subject_name, len(found), masked, captioned)
    logger.info("%s: learnt in place of %r, %d token(s).", config.subject_name, class_phrase, token_num)

    patterns = config.templates or list(TEMPLATES)
    validation_patterns = config.validation_prompts or list(VALIDATION_PROMPTS)
    class_pattern = config.class_prompt or TEMPLATES[0]
    config = replace(
        config,
        instance_prompt=class_phrase,
        token_num=token_num,
        templates=patterns,
        validation_prompts=validation_patterns,
        class_prompt=class_pattern,
    )
    templates, validation, (class_prompt,) = (
        [sentence.replace("{}", class_phrase) for sentence in sentences]
        for sentences in (patterns, validation_patterns, [class_pattern])
    )
    captions = [picture.caption and picture.caption.replace("{}", class_phrase) for picture in found]
    said = {
        f"caption of {picture.path}": [caption] for picture, caption in zip(found, captions, strict=True) if caption
    }
    said |= {"--templates": templates, "--validation_prompts": validation}
    if config.with_prior_preservation:
        said["--class_prompt"] = [class_prompt]
    prompts = build_prompts(said, class_phrase, models)

    def training_picture(picture: Picture, sentences: list[str]) -> TrainingPicture:
        return TrainingPicture(encode_picture(picture, config, models), prompts.rows(sentences))

    pictures = [
        training_picture(picture, [caption] if caption else templates)
        for picture, caption in zip(found, captions, strict=True)
    ]
    held_out: list[TrainingPicture] = []
    if config.validation and len(pictures) >= 3:
        held_out = [pictures.pop(config.seed % len(pictures))]
    elif config.validation:
        logger.warning(
            "%s: too few pictures to keep one for --validation; scored on the training pictures.", config.subject_name
        )
        held_out = pictures
    return Concept(
        config, prompts, pictures, held_out, prompts.rows(validation), digest_of(found),
        picture_digests=picture_digests(picture.image for picture in found),
    )  # fmt: skip


def digest_of(pictures: Sequence[Picture]) -> str:
    """The same for the same pictures, masks and captions under the same names."""
    digest = hashlib.sha256()
    for picture in pictures:
        digest.update(f"{picture.path.name}\n{picture.caption}\n".encode())
        for part in (picture.image, picture.mask):
            digest.update(part.tobytes() if part is not None else b"")
    return digest.hexdigest()


def with_class_pictures(concept: Concept, models: Models) -> Concept:
    """Add the plain class for prior preservation; the base draws the pictures that `class_data_dir` lacks."""
    config, prompts = concept.config, concept.prompts
    rows = prompts.rows([cast(str, config.class_prompt).replace("{}", cast(str, config.instance_prompt))])
    folder = Path(cast(str, config.class_data_dir))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"--class_data_dir: {str(folder)!r} cannot be made ({error}); choose another.") from error
    drawn = {folder / f"class-{number:04}.png": config.seed + 1 + number for number in range(config.num_class_images)}
    wanted = config.num_class_images - sum(is_picture(path) for path in folder.iterdir())
    missing = [path for path in drawn if not path.exists()][: max(0, wanted)]
    drawing = replace(config, validation_inference_steps=CLASS_STEPS, validation_guidance_scale=CLASS_GUIDANCE_SCALE)
    for path in tqdm(missing, desc="class pictures", disable=not missing):
        (image,) = generate(models, prompts.base_embeds[rows], prompts.negative_embeds, drawing, seed=drawn[path])
        save_png(image, path)
    found = load_pictures(folder, strict=config.strict, use_masks=config.use_masks, flag="class_data_dir")
    pictures = [TrainingPicture(encode_picture(picture, config, models), rows) for picture in found]
    return replace(concept, class_pictures=pictures, digest=f"{concept.digest} {digest_of(found)}")


# --- the three ways to learn -----------------------------------------------------------------------------------------


class Learner(nn.Module):
    """What the loop asks of a method: embeddings for a batch of prompts, parameters to tune, and the delta so far."""

    def forward(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of the prompts `(batch,)` -> embeddings `(batch, length, embed_dim)`, and a penalty for the loss."""
        raise NotImplementedError

    def residual(self) -> torch.Tensor:
        """The delta as it would be saved now: float32 `(num_tokens, embed_dim)` on the CPU."""
        raise NotImplementedError

    def tuned(self) -> dict[str, nn.Parameter]:
        """The parameters that training changes, by name: all that a checkpoint has to hold of the learner."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}


class ResidualLearner(Learner):
    """The delta is the only parameter, added to frozen embeddings; gradients never enter the text encoder.

    Args:
        prompts: the prompts to learn in.
        unet: whose keys are to stay where they are.
        key_preservation: weight of how far they move, see `key_metric`.
    """

    base_embeds: torch.Tensor
    positions: torch.Tensor
    metric: torch.Tensor

    def __init__(self, prompts: Prompts, unet: nn.Module | None = None, key_preservation: float = 0.0) -> None:
        super().__init__()
        self.delta = nn.Parameter(torch.zeros(prompts.positions.shape[1], prompts.base_embeds.shape[2]))
        self.register_buffer("base_embeds", prompts.base_embeds, persistent=False)
        self.register_buffer("positions", prompts.positions, persistent=False)

        self.key_preservation = key_preservation
        if key_preservation:
            assert unet is not None
            words = prompts.base_embeds[torch.arange(len(prompts.positions))[:, None], prompts.positions]
            self.register_buffer("metric", key_metric(unet, words), persistent=False)

    def forward(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Frozen embeddings plus the delta; the penalty is how far the subject's keys have moved."""
        penalty = self.delta.new_zeros(())
        if self.key_preservation:
            moved = torch.einsum("td,tde,te->t", self.delta, self.metric, self.delta)
            penalty = self.key_preservation * moved.mean()
        return with_residual(self.base_embeds[rows], self.positions[rows], self.delta), penalty

    def residual(self) -> torch.Tensor:
        """The parameter."""
        return self.delta.detach().float().cpu().clone()


class TextEncoderLearner(Learner):
    """Cones 2 (arXiv:2305.19327): tune the encoder, hold every other token's embedding in place, then take the mean
    change at the subject's tokens. With LoRA layers in the encoder, only those are tuned."""

    input_ids: torch.Tensor
    base_embeds: torch.Tensor
    positions: torch.Tensor

    def __init__(self, prompts: Prompts, rows: list[int], text_encoder: nn.Module, config: TrainConfig) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.rows = rows  # the prompts that the residual is averaged over
        self.weights = (config.preservation_before, config.preservation_after)
        self.register_buffer("input_ids", prompts.input_ids, persistent=False)
        self.register_buffer("base_embeds", prompts.base_embeds, persistent=False)
        self.register_buffer("positions", prompts.positions, persistent=False)

    def forward(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Tuned embeddings; the penalty is how far the other tokens have drifted, before and after the subject's."""
        # Half precision's rounding is larger than the drift that the penalty is about.
        with torch.autocast(rows.device.type, enabled=False):
            embeds = encode_prompts(self.text_encoder, self.input_ids[rows])
        drift = embeds - self.base_embeds[rows]  # [B, L, D]
        token = torch.arange(drift.shape[1], device=drift.device)
        before = (token < self.positions[rows, :1])[..., None]  # [B, L, 1]
        after = (token > self.positions[rows, -1:])[..., None]
        lengths = [torch.linalg.vector_norm(drift * part, dim=(1, 2)).mean() for part in (before, after)]
        return embeds, self.weights[0] * lengths[0] + self.weights[1] * lengths[1]

    @torch.no_grad()
    def residual(self) -> torch.Tensor:
        """Mean over the training prompts of tuned minus base at the subject's tokens."""
        changes = []
        for chunk in torch.tensor(self.rows, device=self.positions.device).split(16):
            change = encode_prompts(self.text_encoder, self.input_ids[chunk]) - self.base_embeds[chunk]
            changes.append(change[torch.arange(len(chunk))[:, None], self.positions[chunk]])  # [B, num_tokens, D]
        return torch.cat(changes).mean(0).float().cpu()


def with_residual(prompt_embeds: torch.Tensor, positions: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """`delta` `(num_tokens, embed_dim)` added to `(batch, length, embed_dim)` at `positions` `(batch, num_tokens)`."""
    batch, _, embed_dim = prompt_embeds.shape
    index = positions[..., None].expand(-1, -1, embed_dim)
    return prompt_embeds.scatter_add(1, index, delta.to(prompt_embeds).expand(batch, -1, -1))


def key_metric(unet: nn.Module, words: torch.Tensor) -> torch.Tensor:
    """How far a change of a word's embedding moves its keys, in lengths of these keys.

    Args:
        unet: with `Attention` layers.
        words: `(prompts, num_tokens, embed_dim)`, the class phrase's embeddings.

    Returns:
        `(num_tokens, embed_dim, embed_dim)` float32: `delta @ metric @ delta` is the mean over the layers of
        cross-attention of `|W_k delta|^2 / |W_k word|^2`, the latter as its mean over the prompts.
    """
    layers = [module for module in unet.modules() if isinstance(module, Attention) and module.is_cross_attention]
    weights = [layer.to_k.weight.detach().float() for layer in layers]
    lengths = [(words.float() @ weight.T).square().sum(dim=-1).mean(dim=0) for weight in weights]  # [num_tokens]
    metrics = [weight.T @ weight / length[:, None, None] for weight, length in zip(weights, lengths, strict=True)]
    return torch.stack(metrics).mean(dim=0)


def make_learner(concept: Concept, text_encoder: nn.Module | None, unet: nn.Module | None) -> Learner:
    """The learner of `--method`. An encoder that is given is tuned in place."""
    config = concept.config
    if config.method == "residual":
        return ResidualLearner(concept.prompts, unet, config.key_preservation)
    assert text_encoder is not None
    if config.method == "text_encoder":
        text_encoder.requires_grad_(True)
    else:
        from peft import LoraConfig, get_peft_model

        targets = ["q_proj", "k_proj", "v_proj", "out_proj"]
        layers = LoraConfig(r=config.lora_rank, lora_alpha=config.lora_rank, target_modules=targets)
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)  # every process starts from the same layers
            text_encoder = cast(nn.Module, get_peft_model(text_encoder, layers))
    if config.gradient_checkpointing:
        text_encoder.gradient_checkpointing_enable()  # type: ignore[operator]
        text_encoder.train()  # transformers recomputes in this mode alone; CLIP has no dropout that it would turn on
    rows = sorted({row for picture in concept.pictures for row in picture.rows})
    return TextEncoderLearner(concept.prompts, rows, text_encoder, config)


# --- one step --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """One picture to denoise: latents and noise `(channels, h, w)`, mask `(1, h, w)`, row of its prompt, weight."""

    latents: torch.Tensor
    noise: torch.Tensor
    mask: torch.Tensor | None
    timestep: int
    row: int
    weight: float = 1.0


def _generator(*key: int) -> torch.Generator:
    """A random stream that depends on nothing but `key`."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1))


def draw_sample(
    pictures: Sequence[TrainingPicture],
    *,
    seed: int,
    step: int,
    index: int,
    batch: int,
    num_timesteps: int,
    noise_offset: float = 0.0,
    weight: float = 1.0,
) -> Sample:
    """Sample `index` of the `batch` that all processes together take in `step`.

    Pictures come in epochs, each in its own order; timesteps are uniform, and spread evenly over the batch, which makes
    gradients less noisy than independent ones.
    """
    epoch, place = divmod(step * batch + index, len(pictures))
    picture = pictures[np.random.default_rng((seed, epoch)).permutation(len(pictures))[place]]
    generator = _generator(seed, step, index)
    view = picture.views[int(torch.randint(len(picture.views), (), generator=generator))]
    row = picture.rows[int(torch.randint(len(picture.rows), (), generator=generator))]
    offset = float(torch.rand((), generator=_generator(seed, step)))
    timestep = min(num_timesteps - 1, int((index + offset) / batch * num_timesteps))
    noise = torch.randn(view.latents.shape, generator=generator)
    if noise_offset:
        noise = noise + noise_offset * torch.randn((view.latents.shape[0], 1, 1), generator=generator)
    return Sample(view.latents, noise.to(view.latents.device), view.mask, timestep, row, weight)


def compute_loss(
    prediction: torch.Tensor,
    target: torch.Tensor,
    snr: torch.Tensor,
    *,
    prediction_type: str,
    snr_gamma: float | None = None,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Squared error of each sample, weighted by its noise level and restricted to the subject.

    Args:
        prediction: the UNet's output `(batch, channels, height, width)`, any dtype; computed in float32.
        target: what it should be (the noise, or the velocity), same shape.
        snr: signal-to-noise ratio ᾱ / (1 − ᾱ) of each sample's timestep, `(batch,)`.
        prediction_type: `epsilon` or `v_prediction`.
        snr_gamma: γ of min-SNR weighting (Hang et al. 2023, arXiv:2303.09556); None or 0: off.
        mask: how much each latent cell counts, `(batch, 1, height, width)` in [0, 1]; a sample's weights are normalised
            by their sum, so that a small subject counts as much as a large one. None: all cells alike.

    Returns:
        `(batch,)` float32.
    """
    error = (prediction.float() - target.float()).square().mean(1)  # [B, h, w]
    if mask is None:
        loss = error.mean((1, 2))
    else:
        cells = mask[:, 0].float()
        loss = (error * cells).sum((1, 2)) / cells.sum((1, 2)).clamp(min=1e-6)
    if snr_gamma:
        capped = snr.clamp(max=snr_gamma)
        # In terms of the error of the clean picture both are min(SNR, γ).
        loss = loss * (capped / (snr + 1) if prediction_type == "v_prediction" else capped / snr.clamp(min=1e-8))
    return loss


def denoising_loss(
    samples: Sequence[Sample], prompt_embeds: torch.Tensor, models: Models, snr_gamma: float | None
) -> torch.Tensor:
    """Weighted mean of `compute_loss` over `samples`, whose prompts' embeddings are `(samples, length, embed_dim)`.

    Samples of one shape go through the UNet together, so a batch may mix aspect ratios.
    """
    scheduler, unet = models.noise_scheduler, cast(UNet2DConditionModel, models.unet)
    by_shape = defaultdict(list)
    for index, sample in enumerate(samples):
        by_shape[sample.latents.shape].append(index)
    total = prompt_embeds.new_zeros((), dtype=torch.float32)
    for members in by_shape.values():
        group = [samples[index] for index in members]
        latents = torch.stack([sample.latents for sample in group])
        noise = torch.stack([sample.noise for sample in group])
        timesteps = torch.tensor([sample.timestep for sample in group], device=latents.device)
        mask = None
        if any(sample.mask is not None for sample in group):
            whole = latents.new_ones((1, *latents.shape[-2:]))
            mask = torch.stack([whole if sample.mask is None else sample.mask for sample in group])
        noisy = scheduler.add_noise(latents, noise, timesteps)
        prediction_type = scheduler.config.prediction_type
        target = noise if prediction_type == "epsilon" else scheduler.get_velocity(latents, noise, timesteps)
        embeds = prompt_embeds[members].to(models.dtype)
        prediction = unet(noisy.to(models.dtype), timesteps, embeds, return_dict=False)[0]
        alphas = scheduler.alphas_cumprod.to(latents.device)[timesteps]
        losses = compute_loss(
            prediction, target, alphas / (1 - alphas), prediction_type=prediction_type, snr_gamma=snr_gamma, mask=mask
        )
        total = total + (losses * losses.new_tensor([sample.weight for sample in group])).sum()
    return total / len(samples)


# --- the loop --------------------------------------------------------------------------------------------------------


def identity(concept: Concept, models: Models, accelerator: Accelerator) -> dict[str, Any]:
    """What has to be the same for a checkpoint to be continued: everything that has a say in the result.

    The number of processes may change as long as they see the same batch together.
    """
    without_a_say = {
        "pretrained_model_name_or_path", "revision", "variant", "instance_data_dir", "name", "concepts_list", "strict",
        "output_dir", "overwrite_output_dir", "train_batch_size", "gradient_accumulation_steps", "class_data_dir",
        "gradient_checkpointing", "checkpointing_steps", "checkpoints_total_limit", "resume_from_checkpoint",
        "validation_steps", "validation_prompts", "validation_guidance_scale", "validation_inference_steps",
        "report_to", "push_to_hub", "hub_model_id", "hub_private", "license",
    }  # fmt: skip
    config = concept.config
    if config.lr_scheduler in ("constant", "constant_with_warmup"):
        without_a_say.add("max_train_steps")
    if config.validation:  # then they say which steps are scored
        without_a_say.remove("checkpointing_steps")
    return {
        **{key: value for key, value in asdict(config).items() if key not in without_a_say},
        "batch": config.train_batch_size * config.gradient_accumulation_steps * accelerator.num_processes,
        "pictures": concept.digest,
        "base": models.fingerprint,
    }


def make_optimizer(config: TrainConfig, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimiser of `--optimizer`. Raises ImportError that says what to install."""
    betas = (config.adam_beta1, config.adam_beta2)
    rate = cast(float, config.learning_rate)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters, rate, betas, config.adam_epsilon, config.weight_decay)
    try:
        if config.optimizer == "adamw8bit":
            from bitsandbytes.optim import AdamW8bit

            return AdamW8bit(parameters, rate, betas, config.adam_epsilon, config.weight_decay)
        from prodigyopt import Prodigy

        return Prodigy(
            parameters, rate, betas=betas, eps=config.adam_epsilon, weight_decay=config.weight_decay,
            use_bias_correction=True, safeguard_warmup=True,
        )  # fmt: skip
    except ImportError as error:
        package = {"adamw8bit": "bitsandbytes", "prodigy": "prodigyopt"}[config.optimizer]
        raise ImportError(f"--optimizer {config.optimizer}: needs `pip install {package}` ({error}).") from error


def learning_rate_factor(config: TrainConfig) -> Callable[[int], float]:
    """Step -> share of the peak rate; of the step alone, so neither resuming nor more processes move it."""
    scheduler = get_scheduler(
        SchedulerType(config.lr_scheduler),
        torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=1.0),
        num_warmup_steps=config.lr_warmup_steps,
        num_training_steps=config.max_train_steps,
    )
    return scheduler.lr_lambdas[0]


def fit(
    concept: Concept, models: Models, accelerator: Accelerator, stop: StopRequest, text_encoder: nn.Module | None
) -> Progress:
    """Learn one subject. Returns the finished progress with `best_residual` set to the delta to keep."""
    config = concept.config
    output = Path(config.output_dir)
    plain_learner = make_learner(concept, text_encoder, models.unet)
    parameters = list(plain_learner.tuned().values())
    learner, optimizer = accelerator.prepare(plain_learner, make_optimizer(config, parameters))
    hooks = checkpoint_parameters(plain_learner.tuned(), accelerator)
    rate_factor = learning_rate_factor(config)
    progress = Progress(identity(concept, models, accelerator))
    if config.resume_from_checkpoint:
        progress = resume(config, progress, accelerator)
    if accelerator.is_main_process:
        if progress.step == 0:  # not before all else has shown that the run can start
            remove_earlier_run(config)
        save_config(config)
    accelerator.wait_for_everyone()

    bar = tqdm(
        total=config.max_train_steps,
        initial=progress.step,
        desc=config.subject_name,
        unit="step",
        disable=not accelerator.is_main_process,
    )
    with bar, logging_redirect_tqdm():
        while progress.step < config.max_train_steps:
            for group in optimizer.param_groups:
                group["lr"] = cast(float, config.learning_rate) * rate_factor(progress.step)
            loss = torch.zeros((), device=accelerator.device)
            for micro_step in range(config.gradient_accumulation_steps):
                samples = draw_batch(concept, progress.step, micro_step, accelerator, models)
                with accelerator.accumulate(learner):
                    rows = torch.tensor([sample.row for sample in samples], device=accelerator.device)
                    prompt_embeds, penalty = learner(rows)
                    batch_loss = denoising_loss(samples, prompt_embeds, models, config.snr_gamma) + penalty
                    accelerator.backward(batch_loss)
                    loss += batch_loss.detach() / config.gradient_accumulation_steps
                    if accelerator.sync_gradients:
                        mean_loss = float(accelerator.reduce(loss, "mean"))
                        norm = accelerator.clip_grad_norm_(parameters, config.max_grad_norm or math.inf)
                        # In fp16 the gradient scaler skips steps with infinite gradients and lowers its scale.
                        gradients_matter = norm is not None and accelerator.scaler is None
                        if not math.isfinite(mean_loss) or (gradients_matter and not math.isfinite(norm)):
                            raise FloatingPointError(diverged(mean_loss, progress.step, output))
                    optimizer.step()
                    optimizer.zero_grad()
            progress.step += 1
            progress.losses.append(mean_loss)
            bar.update()
            bar.set_postfix(loss=f"{np.mean(progress.losses[-50:]):.4f}")
            values = {"loss": mean_loss, "learning_rate": optimizer.param_groups[0]["lr"]}
            accelerator.log(
                {f"{config.subject_name}/{key}": value for key, value in values.items()}, step=progress.step
            )

            last = progress.step == config.max_train_steps
            signal_number = stop.agreed(accelerator)
            due = last or progress.step % config.checkpointing_steps == 0
            if due or signal_number:
                if concept.held_out and due:  # a signal adds no score: the resumed run keeps the same best
                    score_residual(concept, models, plain_learner.residual(), progress)
                checkpoint = save_checkpoint(config, progress, accelerator)
                if signal_number and not last:
                    raise Interrupted(signal_number, checkpoint)
            if config.validation_steps and progress.step % config.validation_steps == 0 and not last:
                residual = plain_learner.residual()
                if accelerator.is_main_process:
                    save_validation_sheet(validation_pictures(concept, models, residual), progress.step, output)
                accelerator.wait_for_everyone()
    if not concept.held_out:
        progress.best_residual = plain_learner.residual().tolist()
    for hook in hooks:
        hook.remove()
    accelerator.free_memory(learner, optimizer)
    return progress


def draw_batch(concept: Concept, step: int, micro_step: int, accelerator: Accelerator, models: Models) -> list[Sample]:
    """This process's samples of one accumulation step; with prior preservation, as many of the class follow."""
    config = concept.config
    size = config.train_batch_size
    batch = size * accelerator.num_processes * config.gradient_accumulation_steps
    first = (micro_step * accelerator.num_processes + accelerator.process_index) * size
    num_timesteps = models.noise_scheduler.config.num_train_timesteps

    def draw(pictures: list[TrainingPicture], seed: int, weight: float) -> list[Sample]:
        return [
            draw_sample(
                pictures, seed=seed, step=step, index=index, batch=batch, num_timesteps=num_timesteps,
                noise_offset=config.noise_offset, weight=weight,
            )
            for index in range(first, first + size)
        ]  # fmt: skip

    if not concept.class_pictures:
        return draw(concept.pictures, config.seed, 1.0)
    # The mean runs over both halves; the factor two leaves the subject's half what it is alone.
    return draw(concept.pictures, config.seed, 2.0) + draw(
        concept.class_pictures, config.seed + 1, 2 * config.prior_loss_weight
    )


def diverged(loss: float, step: int, output: Path) -> str:
    """What to tell the user whose loss is no number."""
    good = latest_checkpoint(output)
    kept = f"the last good checkpoint is {good}" if good else "there is no checkpoint yet"
    return (
        f"step {step + 1} has a loss of {loss} or infinite gradients; stopped, {kept}. Start anew "
        "(--overwrite_output_dir) with a lower --learning_rate or with --mixed_precision no."
    )


@torch.no_grad()
def score_residual(concept: Concept, models: Models, residual: torch.Tensor, progress: Progress) -> None:
    """Denoising loss on the held-out picture, always with the same noise and timesteps; remembers the best residual."""
    draws = 16
    samples = [
        draw_sample(
            concept.held_out,
            seed=concept.config.seed,
            step=0,
            index=index,
            batch=draws,
            num_timesteps=models.noise_scheduler.config.num_train_timesteps,
        )
        for index in range(draws)
    ]
    losses = []
    for start in range(0, draws, 4):
        chunk = samples[start : start + 4]
        rows = torch.tensor([sample.row for sample in chunk], device=models.device)
        embeds = with_residual(
            concept.prompts.base_embeds[rows], concept.prompts.positions[rows], residual.to(models.device)
        )
        losses.append(float(denoising_loss(chunk, embeds, models, concept.config.snr_gamma)))
    score = float(np.mean(losses))
    if score < min(progress.scores.values(), default=math.inf):
        progress.best_residual = residual.tolist()
    progress.scores[progress.step] = score
    logger.info("step %d: validation score %.5f (lower is better)", progress.step, score)


# --- what a run leaves -----------------------------------------------------------------------------------------------


@torch.no_grad()
def generate(
    models: Models, prompt_embeds: torch.Tensor, negative_embeds: torch.Tensor, config: TrainConfig, *, seed: int
) -> list[Image.Image]:
    """One picture per row of `prompt_embeds` `(prompts, length, embed_dim)`."""
    pipe = StableDiffusionPipeline(
        models.vae, None, None, models.unet, models.sampling_scheduler, None, None, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    resolution = config.resolution
    images = []
    for index, embeds in enumerate(prompt_embeds):
        images += pipe(
            prompt_embeds=embeds[None].to(models.dtype),
            negative_prompt_embeds=negative_embeds.to(models.dtype),
            height=resolution,
            width=resolution,
            num_inference_steps=config.validation_inference_steps,
            guidance_scale=config.validation_guidance_scale,
            generator=torch.Generator().manual_seed(seed + index),
        ).images
    return images


def validation_pictures(concept: Concept, models: Models, residual: torch.Tensor) -> list[Image.Image]:
    """The validation prompts with the subject in them."""
    prompts, rows = concept.prompts, concept.validation_rows
    embeds = with_residual(prompts.base_embeds[rows], prompts.positions[rows], residual.to(models.device))
    return generate(models, embeds, prompts.negative_embeds, concept.config, seed=concept.config.seed)


def save_validation_sheet(pictures: list[Image.Image], step: int, output: Path) -> None:
    """The subject as it is after that step: `validation/step-….png`."""
    path = output / "validation" / f"step-{step:06}.png"
    with writing(path, output):
        save_png(contact_sheet(pictures, columns=4), path)


def save_png(image: Image.Image, path: Path) -> None:
    """Write a picture whole or not at all."""
    write_atomically(path, png_bytes(image))


def save_loss_curve(progress: Progress, folder: Path) -> None:
    """`loss.csv` with every step, and `loss.png`, where matplotlib is installed."""
    rows = "".join(f"{step},{loss!r}\n" for step, loss in enumerate(progress.losses, start=1))
    write_atomically(folder / "loss.csv", f"step,loss\n{rows}".encode())
    try:
        from matplotlib.figure import Figure
    except ImportError:
        logger.warning("matplotlib is not installed, so there is no loss.png: pip install 'multisubject[train]'.")
        return
    steps = np.arange(1, len(progress.losses) + 1)
    window = max(1, len(steps) // 20)
    smooth = np.convolve(progress.losses, np.ones(window) / window, mode="valid")
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, progress.losses, color="lightsteelblue", linewidth=0.7, label="each step")
    axes.plot(steps[window - 1 :], smooth, color="navy", label=f"mean of {window} steps")
    if progress.scores:
        axes.plot(
            list(progress.scores), list(progress.scores.values()), "o-", color="darkorange", label="held-out picture"
        )
    axes.set(xlabel="step", ylabel="loss")
    axes.legend()
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=120)
    write_atomically(folder / "loss.png", data.getvalue())


def save_result(concept: Concept, progress: Progress, models: Models) -> ResidualEmbedding:
    """Write the adapter first, then what explains it: sample pictures, loss curve, model card."""
    config = concept.config
    output = Path(config.output_dir)
    delta = torch.tensor(progress.best_residual)
    step = min(progress.scores, key=lambda step: progress.scores[step]) if progress.scores else progress.step
    metadata = {
        "base_model": base_model_name(config),
        "base_model_revision": config.revision,
        "text_encoder_fingerprint": models.fingerprint,
        "method": config.method,
        "steps": step,
        "resolution": config.resolution,
        "training_pictures": list(concept.picture_digests),
        "license": config.license,
        "library_versions": {name: version(name) for name in ("multisubject", "diffusers", "transformers", "torch")},
    }
    subject = ResidualEmbedding(
        cast(str, config.instance_prompt),
        {"text_encoder": delta},
        {key: value for key, value in metadata.items() if value is not None},
    )
    with writing(output / f"{config.subject_name}.safetensors", output):
        adapter = save_subject(subject, output / f"{config.subject_name}.safetensors")
        save_subject(subject, output / "residual.pt")
        save_loss_curve(progress, output)
    images = validation_pictures(concept, models, delta)
    prompts = [concept.prompts.texts[row] for row in concept.validation_rows]
    paths = [output / sample_path(config.subject_name, index) for index in range(len(images))]
    repo_id = config.hub_model_id or f"your-name/{config.subject_name}"
    entries = inspect_subject(adapter, name=config.subject_name)
    card = subject_card(repo_id, entries, {config.subject_name: prompts}, mirrors=BASE_MODEL_MIRRORS)
    save_validation_sheet(images, step, output)
    with writing(output / "README.md", output):
        for path, image in zip(paths, images, strict=True):
            save_png(image, path)
        write_atomically(output / "README.md", card.encode())
    logger.info("%s: saved in %s", config.subject_name, output)
    if config.push_to_hub:
        try:
            commit = push_subject_to_hub(
                adapter, repo_id, samples=list(zip(prompts, paths, strict=True)), private=config.hub_private
            )
        except (OSError, ValueError, HTTPError) as error:
            raise OSError(
                f"--push_to_hub: {error}; {adapter} is whole: `multisubject push {adapter} {repo_id}` tries again."
            ) from error
        logger.info("%s: pushed, %s", config.subject_name, commit.commit_url)
    return subject


def base_model_name(config: TrainConfig) -> str:
    """The base as a file that travels may name it: a Hub id, or a folder's own name without the way to it."""
    source = config.pretrained_model_name_or_path
    if source is None or Path(source).resolve() == EMBEDDED_BASE:
        return "tiny_world"
    return Path(source).name if Path(source).is_dir() else source


# --- the run ---------------------------------------------------------------------------------------------------------


def save_config(config: TrainConfig) -> None:
    """`config.yaml`: every flag's value, as `--config` reads it."""
    again = replace(config, overwrite_output_dir=False, resume_from_checkpoint=None)  # that is for each run to say
    text = yaml.safe_dump(asdict(again), sort_keys=False, allow_unicode=True)
    path = Path(config.output_dir) / "config.yaml"
    with writing(path, path.parent):
        write_atomically(path, text.encode())


def make_accelerator(config: TrainConfig) -> Accelerator:
    """Devices, processes and precision as `accelerate` sets them, unless the configuration says otherwise."""
    accelerator = Accelerator(
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        mixed_precision=config.mixed_precision,
        log_with=config.report_to,
        project_dir=config.output_dir,
        # The learners' buffers are frozen embeddings: every process has the same ones.
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    if accelerator.gradient_accumulation_steps != config.gradient_accumulation_steps:
        raise ValueError(
            f"--gradient_accumulation_steps: {config.gradient_accumulation_steps}, but the environment variable "
            f"ACCELERATE_GRADIENT_ACCUMULATION_STEPS or the DeepSpeed configuration says "
            f"{accelerator.gradient_accumulation_steps}; unset it or pass the same number."
        )
    if config.report_to not in (None, "all") and not accelerator.log_with:
        raise ImportError(f"--report_to {config.report_to}: not installed; `pip install {config.report_to}`.")
    return accelerator


def hub_user() -> str:
    """The user who is logged in. Raises OSError that says how to log in: before training, not after."""
    try:
        return str(whoami()["name"])
    except (OSError, HTTPError) as error:
        raise OSError(f"--push_to_hub: log in with `hf auth login` first ({error}).") from error


def resolve(config: TrainConfig, models: Models, accelerator: Accelerator, user: str | None) -> TrainConfig:
    """Fill in the defaults that depend on the base, the method, `accelerate config` or the Hub's `user`."""
    resolution = config.resolution or models.native_resolution
    if resolution % models.size_multiple:
        nearest = max(1, round(resolution / models.size_multiple)) * models.size_multiple
        raise ValueError(
            f"--resolution: {resolution}; this base needs a multiple of {models.size_multiple}, e.g. {nearest}."
        )
    rate = config.learning_rate
    if rate is None:
        rate = 1.0 if config.optimizer == "prodigy" else LEARNING_RATES[config.method]
    repo_id = config.hub_model_id
    return replace(
        config,
        resolution=resolution,
        learning_rate=rate,
        name=config.subject_name,
        mixed_precision=accelerator.mixed_precision,
        hub_model_id=repo_id if user is None or "/" in (repo_id or "") else f"{user}/{repo_id or config.subject_name}",
    )


def train(config: TrainConfig) -> dict[str, ResidualEmbedding]:
    """Learn every subject that `config` names; returns them by name, as they are saved in the output folders.

    Raises:
        ValueError: something about the configuration, the folder or its pictures; the message says what to do.
        OSError: the output folder or the disk.
        FloatingPointError: the loss is not a number any more; the last good checkpoint is kept.
        Interrupted: SIGINT or SIGTERM came; a checkpoint of that moment is kept.
    """
    accelerator = make_accelerator(config)
    logger.setLevel(logging.INFO if accelerator.is_main_process else logging.ERROR)
    for flag, need in config.without_effect().items():
        logger.warning("--%s has no effect: it needs %s.", flag, need)
    concept_configs = read_concepts(config)
    for concept_config in concept_configs:
        check_output(concept_config, accelerator)
    user = hub_user() if config.push_to_hub else None
    models = load_encoders(config, accelerator)
    concepts = []
    for item in concept_configs:
        try:
            concepts.append(prepare_concept(resolve(item, models, accelerator, user), models))
        except (ValueError, OSError) as error:
            if config.concepts_list is None:
                raise
            raise ValueError(f"--concepts_list: {item.subject_name!r}: {error}") from error
    text_encoder, models.text_encoder = models.text_encoder, None
    if config.method == "residual":
        text_encoder = None  # every prompt is embedded: nothing needs it any more
    models.unet = load_unet(config, models)
    if config.with_prior_preservation:
        with accelerator.main_process_first():
            concepts = [with_class_pictures(concept, models) for concept in concepts]
    if config.report_to:
        plain = {key: value for key, value in asdict(config).items() if isinstance(value, (bool, int, float, str))}
        accelerator.init_trackers("train_residual", config=plain)  # what every tracker can hold
    subjects = {}
    try:
        for number, concept in enumerate(concepts, start=1):
            tuned_encoder = text_encoder if number == len(concepts) else copy.deepcopy(text_encoder)
            with StopRequest() as stop:
                progress = fit(concept, models, accelerator, stop, tuned_encoder)
            if accelerator.is_main_process:
                subjects[concept.config.subject_name] = save_result(concept, progress, models)
            accelerator.wait_for_everyone()
    finally:
        for tracker in accelerator.trackers:
            tracker.finish()
    return subjects


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    config = parse_config(arguments)
    disable_progress_bar()  # of loading: the one of training is enough
    try:
        train(config)
    except Interrupted as stopped:
        logger.warning("%s", stopped)
        return 128 + stopped.signal
    except KeyboardInterrupt:
        logger.warning("stopped by SIGINT outside of training; checkpoints that were saved are intact.")
        return 128 + signal.SIGINT
    except torch.OutOfMemoryError as error:
        logger.error(
            "error: out of memory (%s); lower --train_batch_size or --resolution, or use --gradient_checkpointing and "
            "--mixed_precision.",
            error,
        )
        return 1
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        logger.error("error: %s", error)
        return 1
    finally:
        PartialState().destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
