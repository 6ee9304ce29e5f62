"""Reference pictures of regions: a loaded IP-Adapter (Ye et al. 2023, arXiv:2308.06721) whose attention stays in place.

A region's picture goes through the UNet as one more picture of the adapter, and what a place gets from it is multiplied
by the region's mask, as diffusers does with `ip_adapter_masks`. Pictures of the call itself act as in diffusers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.image_processor import IPAdapterMaskProcessor
from diffusers.models.attention_processor import Attention, IPAdapterAttnProcessor2_0
from diffusers.models.embeddings import (
    ImageProjection,
    IPAdapterFaceIDImageProjection,
    IPAdapterFaceIDPlusImageProjection,
)
from torch import nn

__multisubject_version__ = "0.1.0"

Pictures = Sequence[Sequence["Sequence[tuple[torch.Tensor, torch.Tensor] | None] | None"]]
"""For each image and region, for each adapter its picture's embeddings: `(negative, positive)`, `(1, 1, …)` each."""


@dataclass(frozen=True, eq=False)
class PictureCall:
    """Whose pictures are where in one UNet call of N samples.

    Args:
        counts: for each adapter, how many of its pictures are the call's own; those of regions follow.
        masks: for each adapter `(B, R, H, W)`, where each of the regions' pictures acts.
        sizes: number of queries of a layer -> its `(h, w)`.
        kept: masks in the forms in which layers have asked for them.
    """

    counts: Sequence[int]
    masks: Sequence[torch.Tensor]
    sizes: Mapping[int, tuple[int, int]]
    kept: dict[tuple[Any, ...], torch.Tensor] = field(default_factory=dict)

    def mask(self, adapter: int, query: torch.Tensor) -> torch.Tensor:
        """`(N, R, Q, 1)` for queries `(N, heads, Q, head_dim)`, resampled as diffusers resamples given masks."""
        form = adapter, query.shape, query.dtype
        if torch.compiler.is_compiling() or form not in self.kept:
            masks = self.masks[adapter]
            small = F.interpolate(masks.to(query.device), self.sizes[query.shape[2]], mode="bicubic")
            small = small.flatten(2)[..., None].repeat(len(query) // len(masks), 1, 1, 1).to(query.dtype)
            if torch.compiler.is_compiling():
                return small
            self.kept[form] = small
        return self.kept[form]


class RegionPictures:
    """The pictures of B images' regions, as a UNet with IP-Adapters takes them.

    Args:
        pictures: what regions hold.
        masks: `(B, R, H, W)` of all regions.
    """

    def __init__(self, pictures: Pictures, masks: torch.Tensor):
        adapters = max(len(held) for of_image in pictures for held in of_image if held is not None)
        self._embeds: list[tuple[torch.Tensor, torch.Tensor] | None] = []
        self._masks: list[torch.Tensor] = []
        for adapter in range(adapters):
            grid = [[None if held is None else held[adapter] for held in of_image] for of_image in pictures]
            regions = [region for region in range(masks.shape[1]) if any(row[region] is not None for row in grid)]
            if not regions:
                self._embeds.append(None)
                self._masks.append(masks[:, :0])
                continue
            some = next(held for row in grid for held in row if held is not None)
            rows = [[held or tuple(map(torch.zeros_like, some)) for held in row] for row in grid]
            negative, positive = (
                torch.cat([torch.cat([row[region][half] for region in regions], dim=1) for row in rows])
                for half in (0, 1)
            )
            has = torch.tensor([[row[region] is not None for region in regions] for row in grid])
            self._embeds.append((negative, positive))
            self._masks.append(masks[:, regions] * has[..., None, None])
        self._calls: dict[tuple[Any, ...], PictureCall] = {}

    def add_to(
        self, unet: Any, added: Mapping[str, Any] | None, sample: torch.Tensor, sizes: Mapping[int, tuple[int, int]]
    ) -> tuple[dict[str, Any], PictureCall]:
        """The UNet's `added_cond_kwargs` with the regions' pictures behind the call's own.

        An adapter that has neither gets a blank one, which the UNet wants and which acts nowhere.

        Args:
            unet: the UNet.
            added: as they came.
            sample: `(N, C, H, W)`, B samples or, with unconditional ones before, twice as many.
            sizes: number of queries of a layer -> its `(h, w)`.
        """
        added = dict(added or {})
        given = added.get("image_embeds")
        given = [None] * len(self._embeds) if given is None else given
        image_embeds = []
        for layer, own, more in zip(adapter_layers(unet) or (), given, self._embeds, strict=True):
            rows = []
            if own is not None:
                rows.append(own)
            elif more is None:
                rows.append(sample.new_zeros(len(sample), 1, 1, picture_width(layer)))
            if more is not None:
                of_regions = torch.cat(more) if len(sample) == 2 * len(more[0]) else more[1]
                rows.append(of_regions.to(sample.device, sample.dtype if own is None else own.dtype))
            image_embeds.append(torch.cat(rows, dim=1))
        counts = tuple(0 if own is None else own.shape[1] for own in given)
        form = counts, *sizes
        if form not in self._calls:
            self._calls[form] = PictureCall(counts, self._masks, sizes)
        return added | {"image_embeds": image_embeds}, self._calls[form]


def adapter_layers(unet: Any) -> list[nn.Module] | None:
    """The layers that project the pictures of each IP-Adapter of a UNet; None where none is loaded."""
    if getattr(unet.config, "encoder_hid_dim_type", None) != "ip_image_proj":
        return None
    return list(unet.encoder_hid_proj.image_projection_layers)


def picture_width(layer: nn.Module) -> int:
    """The width of the embeddings that an IP-Adapter's layer projects."""
    return next(part.in_features for part in layer.modules() if isinstance(part, nn.Linear))


# Of h94/IP-Adapter, by the width that an adapter takes and whether it reads one embedding per picture or one per patch
_RELEASED_ENCODERS = {
    (1024, False): "models/image_encoder",
    (1280, False): "sdxl_models/image_encoder",
    (1280, True): "models/image_encoder",
    (1664, True): "sdxl_models/image_encoder",
}


def released_encoder(width: int, of_patches: bool) -> str | None:
    """The folder of `h94/IP-Adapter` with the image encoder that gives embeddings of a width; None: none there does.

    Args:
        width: that an IP-Adapter takes.
        of_patches: whether it reads an embedding per patch (Plus, full face) rather than one per picture.
    """
    return _RELEASED_ENCODERS.get((width, of_patches))


def reads_patches(layer: nn.Module) -> bool:
    """Whether an IP-Adapter's layer projects an embedding per patch of a picture, rather than one per picture."""
    return not isinstance(layer, ImageProjection)


def check_encoder_width(where: str, width: int, adapter: int, layer: nn.Module) -> None:
    """Raise `ValueError` for an image encoder of another width than an IP-Adapter takes.

    Args:
        where: what to call the picture in messages.
        width: of the encoder's embeddings: per patch if the layer `reads_patches`, else per picture.
        adapter: its number.
        layer: it projects them.
    """
    wanted = picture_width(layer)
    if width == wanted:
        return
    remedy = "call `pipe.register_modules(image_encoder=…)` with the image encoder that it was made for"
    if folder := released_encoder(wanted, reads_patches(layer)):
        remedy = (
            "for one of h94/IP-Adapter call `pipe.unload_ip_adapter()`, then `pipe.load_ip_adapter(…)` with the"
            f" `image_encoder_folder` {folder!r}; for another one {remedy}"
        )
    if isinstance(layer, (IPAdapterFaceIDImageProjection, IPAdapterFaceIDPlusImageProjection)):
        remedy = "write a face's embeddings, or load another IP-Adapter"
    raise ValueError(
        f"{where} is a picture, and the image encoder gives embeddings of width {width}, expected {wanted} for"
        f" IP-Adapter {adapter}: {remedy}."
    )


def encode_pictures(
    pipeline: Any, images: Sequence[Sequence[Any]], places: Sequence[Sequence[str]], device: torch.device
) -> Pictures:
    """The embeddings of what regions hold as `ip_adapter_image`.

    Args:
        pipeline: has the IP-Adapters on its UNet, and encodes.
        images: for each image and region a picture, embeddings `(1 or 2, 1, …)` in the form of
            `ip_adapter_image_embeds`, a list of one of these for each adapter, a dict of them by the adapter's number,
            `"0"` first, or None.
        places: for each image what to call its regions in messages; absent regions at the end may be left out.
        device: where to encode.

    Raises:
        ValueError: no IP-Adapter is loaded, or none that takes pictures here; what a region holds fits no adapter; an
            adapter takes embeddings of another width than those of the image encoder, or those that a region holds.
    """
    layers = adapter_layers(pipeline.unet)
    encoded: list[list[Any]] = []
    for of_image, names in zip(images, places, strict=True):
        encoded.append([None] * len(of_image))
        for region, (held, name) in enumerate(zip(of_image, names, strict=False)):
            if held is not None:
                encoded[-1][region] = _encode(pipeline, layers, held, f"{name}: ip_adapter_image", device)
    return encoded


def pictures_by_adapter(held: Any, count: int, where: str) -> list[Any]:
    """What a region holds as `ip_adapter_image`: for each of `count` loaded IP-Adapters its picture, or None.

    Raises:
        ValueError: it is not one for each of them, nor a dict of them by the adapter's number; `where` names it.
    """
    numbers = [str(number) for number in range(count)]
    if isinstance(held, Mapping):
        if unknown := sorted(set(held) - {*numbers}):
            raise ValueError(f"{where} is for the IP-Adapters {unknown}, expected some of {numbers}, by their numbers.")
        pictures = [held.get(number) for number in numbers]
    else:
        pictures = list(held) if isinstance(held, (list, tuple)) else [held]
    for picture in pictures:
        if isinstance(picture, (list, tuple)):
            raise ValueError(f"{where} has {len(picture)} pictures for one IP-Adapter, expected one.")
    if len(pictures) != count:
        raise ValueError(
            f"{where} has {len(pictures)} picture(s), expected one for each of the {count} IP-Adapters that are loaded,"
            " or a dict of them by the adapter's number, such as {'0': picture}."
        )
    return pictures


def _encode(
    pipeline: Any, layers: Sequence[nn.Module] | None, held: Any, where: str, device: torch.device
) -> list[tuple[torch.Tensor, torch.Tensor] | None]:
    if layers is None:
        raise ValueError(f"{where} needs an IP-Adapter, and none is loaded: call `pipe.load_ip_adapter(…)` first.")
    encoded: list[tuple[torch.Tensor, torch.Tensor] | None] = []
    for adapter, (layer, picture) in enumerate(zip(layers, pictures_by_adapter(held, len(layers), where), strict=True)):
        if picture is None:
            encoded.append(None)
            continue
        if hasattr(layer, "clip_embeds"):
            raise ValueError(
                f"{where} is for a FaceID-Plus adapter, which keeps `clip_embeds` of its own for the pictures of the"
                " call: in regions it cannot be used. Pass its picture to the call, or load another IP-Adapter."
            )
        width = picture_width(layer)
        if isinstance(picture, torch.Tensor):
            if picture.ndim not in (3, 4) or picture.shape[0] not in (1, 2) or picture.shape[1] != 1:
                raise ValueError(
                    f"{where} has embeddings of shape {tuple(picture.shape)}, expected (1 or 2, 1, …): those of one"
                    " picture, behind the negative ones or alone, as in `ip_adapter_image_embeds`."
                )
            if picture.shape[-1] != width:
                raise ValueError(
                    f"{where} has embeddings of width {picture.shape[-1]}, expected {width} for IP-Adapter {adapter}:"
                    " those of the image encoder that it was made for."
                )
            positive = picture[-1:]
            encoded.append((picture[:1] if len(picture) == 2 else torch.zeros_like(positive), positive))
            continue
        if pipeline.image_encoder is None:
            raise ValueError(
                f"{where} is a picture, which needs an image encoder, and none is loaded: call"
                " `pipe.load_ip_adapter(…)` with `image_encoder_folder`, or write embeddings (a tensor) there."
            )
        positive, negative = pipeline.encode_image(picture, device, 1, reads_patches(layer))
        check_encoder_width(where, positive.shape[-1], adapter, layer)
        encoded.append((negative[None], positive[None]))
    return encoded


# --- in the UNet -----------------------------------------------------------------------------------------------------


def add_pictures(
    processor: Any,
    attn: Attention,
    query: torch.Tensor,
    output: torch.Tensor,
    pictures: Sequence[torch.Tensor],
    given_masks: Any,
    call: PictureCall | None,
) -> torch.Tensor:
    """What an attention layer gives, `(N, Q, dim)`, with what places get from pictures.

    Args:
        processor: diffusers' processor of the layer, with weights and scales of its IP-Adapters.
        attn: the layer.
        query: `(N, heads, Q, head_dim)`.
        output: of the attention to the prompt.
        pictures: for each adapter its pictures' tokens `(N, pictures, tokens, dim)`.
        given_masks: `ip_adapter_masks` of the call, for the call's own pictures.
        call: where the regions' pictures are; None: there are none.

    Raises:
        ValueError: masks or scales that do not fit the pictures.
    """
    counts = [states.shape[1] for states in pictures] if call is None else call.counts
    masks = _checked_masks(given_masks, processor.scale, counts)
    for adapter, (states, scale, count) in enumerate(zip(pictures, processor.scale, counts, strict=True)):
        scales = scale if isinstance(scale, list) else [scale]
        if not any(scales):
            continue
        to_k, to_v = processor.to_k_ip[adapter], processor.to_v_ip[adapter]
        mask = masks[adapter]
        if mask is not None:
            for number in range(count):
                small = IPAdapterMaskProcessor.downsample(mask[:, number], len(query), query.shape[2], 1)
                found = _attend(attn, query, states[:, number], to_k, to_v)
                output = output + scales[number % len(scales)] * (found * small.to(query.device, query.dtype))
        elif count:
            output = output + scale * _attend(attn, query, states[:, :count].flatten(1, 2), to_k, to_v)
        if call is None or not call.masks[adapter].shape[1]:
            continue
        if isinstance(scale, list):
            raise ValueError(
                f"IP-Adapter {adapter} has a scale for each picture of the call, {scale}, but regions hold pictures as"
                " well, expected one scale for all of them: call `pipe.set_ip_adapter_scale(…)` with a number."
            )
        places = call.mask(adapter, query)
        for region in range(places.shape[1]):
            found = _attend(attn, query, states[:, count + region], to_k, to_v)
            output = output + scale * (found * places[:, region])
    return output


def _attend(
    attn: Attention, query: torch.Tensor, states: torch.Tensor, to_k: nn.Module, to_v: nn.Module
) -> torch.Tensor:
    """Attention of a layer's queries to tokens of pictures `(N, tokens, dim)`: `(N, Q, heads * head_dim)`."""
    key, value = (part(states).unflatten(-1, (attn.heads, -1)).transpose(1, 2) for part in (to_k, to_v))
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2).to(query.dtype)


def _checked_masks(masks: Any, scales: Sequence[Any], counts: Sequence[int]) -> list[torch.Tensor | None]:
    """`ip_adapter_masks` as diffusers takes them: for each adapter `(1, pictures, H, W)` or None."""
    if masks is None:
        return [None] * len(counts)
    if not isinstance(masks, list):
        masks = list(masks.unsqueeze(1))
    if not len(masks) == len(scales) == len(counts):
        raise ValueError(
            f"`ip_adapter_masks` has {len(masks)} entries, expected one for each of the {len(scales)} IP-Adapters."
        )
    for adapter, (mask, scale, count) in enumerate(zip(masks, scales, counts, strict=True)):
        if mask is None:
            continue
        if not isinstance(mask, torch.Tensor) or mask.ndim != 4 or mask.shape[1] != count:
            shape = tuple(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__
            raise ValueError(
                f"`ip_adapter_masks[{adapter}]` is {shape}, expected a tensor (1, {count}, height, width) for the"
                f" {count} pictures of the call; `IPAdapterMaskProcessor` makes one."
            )
        if isinstance(scale, list) and len(scale) != count:
            raise ValueError(f"IP-Adapter {adapter} has {len(scale)} scales, expected one for each of {count} masks.")
    return masks


def keeps_pictures(processor: Any) -> bool:
    """Whether an attention processor is one of diffusers' with the weights of IP-Adapters, or ours around one."""
    kinds = {kind.__name__ for kind in type(processor).__mro__}
    known = {"IPAdapterAttnProcessor", "IPAdapterAttnProcessor2_0", "IPAdapterXFormersAttnProcessor"}
    return bool(kinds & known) and hasattr(processor, "to_k_ip")


class SharedWeights(IPAdapterAttnProcessor2_0):
    """One of diffusers' processors again, around the same weights and scales under the same names: they stay part of
    the UNet, for whoever moves it or sets a scale.

    Args:
        original: the processor, or one of this class around it.
    """

    def __init__(self, original: Any):
        nn.Module.__init__(self)
        self._original = getattr(original, "_original", (original,))  # a tuple: no second way to the weights
        original = self._original[0]
        self.hidden_size, self.cross_attention_dim = original.hidden_size, original.cross_attention_dim
        self.num_tokens, self.scale = original.num_tokens, original.scale
        self.to_k_ip, self.to_v_ip = original.to_k_ip, original.to_v_ip

    def as_in_diffusers(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The processor's own call."""
        return self._original[0](*args, **kwargs)
