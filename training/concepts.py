"""A subject ready to be learnt: its pictures as latents and its prompts as embeddings, all computed once."""

from __future__ import annotations

import hashlib
import logging
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from multisubject.pictures import picture_digests, png_bytes
from multisubject.residual_embeddings import find_token_spans
from multisubject.subject_file import write_atomically
from multisubject.training.checkpoints import check_resumed, identity
from multisubject.training.config import TrainConfig, class_phrase_of
from multisubject.training.models import Models, generate
from multisubject.training.pictures import Picture, bucket_size, check_size, crops, is_picture, load_pictures
from multisubject.training.progress import ProgressBar

logger = logging.getLogger(__name__)

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
CLASS_STEPS = 25
"""Steps of class pictures, which are not drawn like validation pictures: those somebody may want quick and rough."""


@dataclass(frozen=True)
class Prompts:
    """Prompts with their frozen embeddings.

    Args:
        texts: the prompts; the class phrase is in each.
        input_ids: `(prompts, encoders, length)`.
        positions: `(prompts, num_tokens)`, where the class phrase's tokens are; BOS is 0.
        base_embeds: float32 `(prompts, length, embed_dim)` of the *untuned* encoders, which lie side by side.
        negative_embeds: `(1, length, embed_dim)` of the empty prompt.
        pooled: float32 `(prompts, pooled_dim)`, where the UNet reads it: of the plain words, whatever is tuned.
        negative_pooled: `(1, pooled_dim)` of the empty prompt.
    """

    texts: list[str]
    input_ids: torch.Tensor
    positions: torch.Tensor
    base_embeds: torch.Tensor
    negative_embeds: torch.Tensor
    pooled: torch.Tensor | None = None
    negative_pooled: torch.Tensor | None = None

    def rows(self, texts: Sequence[str]) -> list[int]:
        """Where these prompts are."""
        return [self.texts.index(text) for text in texts]

    def pooled_at(self, rows: Sequence[int]) -> torch.Tensor | None:
        """The pooled embeddings of these rows `(rows, pooled_dim)`; None where the UNet reads none."""
        return None if self.pooled is None else self.pooled[list(rows)]


@dataclass(frozen=True)
class View:
    """One crop of a picture.

    Args:
        latents: `(channels, h, w)`.
        mask: the subject's share of each cell, `(1, h, w)` in [0, 1].
        time_ids: what Stable Diffusion XL's UNet is told of it, in pixels: the picture's own height and width, what was
            cut off at the top and on the left after resizing, the training height and width.
    """

    latents: torch.Tensor
    mask: torch.Tensor | None
    time_ids: tuple[int, ...] = ()


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


def counted_class_phrase(config: TrainConfig, tokenizer: Any) -> tuple[str, int]:
    """The class phrase and its number of tokens, checked against `token_num`."""
    phrase = class_phrase_of(config)
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
    """Tokenise sentences, find the class phrase in each, and embed them with the untuned encoders.

    Args:
        said: where sentences come from (a flag, a caption's picture) -> the sentences.

    Raises:
        ValueError: a sentence does not say the class phrase; the message names where it comes from.
    """
    tokenizer = models.tokenizer
    positions: dict[str, list[int]] = {}
    for origin, sentences in said.items():
        for sentence in sentences:
            try:
                # A prompt that says the phrase twice has the subject at the first place.
                spans = [find_token_spans(each, sentence, class_phrase)[0] for each in models.tokenizers.values()]
            except ValueError:
                raise ValueError(
                    f"{origin}: {sentence!r} does not say {class_phrase!r} as words of their own, in the first "
                    f"{tokenizer.model_max_length - 2} tokens; put it, or {{}}, where the subject is meant."
                ) from None
            if spans != [spans[0]] * len(spans):
                raise ValueError(
                    f"{origin}: in {sentence!r} the base's text encoders have {class_phrase!r} at different tokens;"
                    " leave out signs that they cut differently, such as several `!` in a row."
                )
            positions[sentence] = list(spans[0])
    texts = list(positions)
    input_ids = models.tokenize(texts)
    base_embeds, pooled = models.encode(input_ids)
    negative_embeds, negative_pooled = models.encode(models.tokenize([""]))
    if models.zero_negative:
        negative_embeds = torch.zeros_like(negative_embeds)
        negative_pooled = None if negative_pooled is None else torch.zeros_like(negative_pooled)
    return Prompts(
        texts=texts,
        input_ids=input_ids,
        positions=torch.tensor(list(positions.values()), device=models.device),
        base_embeds=base_embeds,
        negative_embeds=negative_embeds,
        pooled=pooled,
        negative_pooled=negative_pooled,
    )


def training_size(picture: Picture, config: TrainConfig, models: Models) -> tuple[int, int]:
    """The `(width, height)` that a picture is cropped and resized to."""
    resolution = cast(int, config.resolution)
    if not config.aspect_ratio_buckets:
        return resolution, resolution
    return bucket_size(*picture.image.size, resolution=resolution, multiple=models.size_multiple)


def read_pictures(folder: str | Path, config: TrainConfig, models: Models, flag: str) -> list[Picture]:
    """The pictures of a folder that can be learnt from at the configuration's resolution."""

    def check(picture: Picture) -> None:
        check_size(picture, training_size(picture, config, models), models.downscale)

    return load_pictures(folder, strict=config.strict, use_masks=config.use_masks, flag=flag, check=check)


@torch.no_grad()
def encode_picture(picture: Picture, config: TrainConfig, models: Models) -> list[View]:
    """Latents of a picture's crops and their mirror images, with the masks at the latents' size.

    A mirror image is told of as the same crop of the mirrored picture: what was cut off on the right is on its left.
    """
    size = training_size(picture, config, models)
    rng = random.Random(f"{config.seed}/{picture.path.name}")
    views = []
    for crop in crops(picture, size, config.num_crops, rng):
        pixels = torch.from_numpy(np.array(crop.image)).permute(2, 0, 1)[None].to(models.device) / 127.5 - 1
        pixels_and_mirror = torch.cat([pixels, pixels.flip(-1)]) if config.random_flip else pixels
        latents = models.vae.encode(pixels_and_mirror.to(models.vae.dtype)).latent_dist.mode().float()
        latents = latents * models.vae.config.scaling_factor
        weights = None
        if crop.mask is not None:
            shares = torch.from_numpy(np.array(crop.mask)).to(models.device)[None, None] / 255
            weights = nn.functional.interpolate(shares, latents.shape[-2:], mode="area")[0]
            if not weights.any():
                raise ValueError(
                    f"{picture.path}: nothing of its mask is left in the crop; crop it around the subject."
                )
        for latent, left, is_mirror in zip(latents, (crop.left, crop.right), (False, True), strict=False):
            shown = weights.flip(-1) if weights is not None and is_mirror else weights
            time_ids = (*picture.image.size[::-1], crop.top, left, *size[::-1])
            views.append(View(latent, shown, time_ids))
    return views


def prepare_concept(config: TrainConfig, models: Models) -> Concept:
    """Read a subject's folder, check all of it, and cache its latents and prompt embeddings."""
    class_phrase, token_num = counted_class_phrase(config, models.tokenizer)
    found = read_pictures(cast(str, config.instance_data_dir), config, models, "instance_data_dir")
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
    digest = digest_of(found)
    wanted = identity(config, digest, models.fingerprint)
    if config.with_prior_preservation:  # whose pictures are of the digest, and not known yet
        del wanted["pictures"]
    check_resumed(config, wanted)
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
        config,
        prompts,
        pictures,
        held_out,
        prompts.rows(validation),
        digest,
        picture_digests=picture_digests(picture.image for picture in found),
    )


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
    drawing = replace(
        config, validation_inference_steps=CLASS_STEPS, validation_guidance_scale=models.default_guidance_scale
    )
    with ProgressBar("class pictures", len(missing), "picture", silent=not missing) as bar:
        for path in missing:
            (image,) = generate(
                models, prompts.base_embeds[rows], prompts.negative_embeds, drawing, seed=drawn[path],
                pooled=prompts.pooled_at(rows), negative_pooled=prompts.negative_pooled,
            )  # fmt: skip
            write_atomically(path, png_bytes(image))
            bar.advance()
    found = read_pictures(folder, config, models, "class_data_dir")
    pictures = [TrainingPicture(encode_picture(picture, config, models), rows) for picture in found]
    return replace(concept, class_pictures=pictures, digest=f"{concept.digest} {digest_of(found)}")
