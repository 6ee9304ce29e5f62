"""Regions as tensors: what a call of a UNet is guided by, and the maps that its attention layers see of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import torch

from .guidance_methods import HIDDEN, GuidanceMethod, RegionMaps, TokenKind, own_summary_weight, places_words
from .region_loras import Scales

__multisubject_version__ = "0.1.0"

SHARED, NOBODYS = -1, -2
"""Owners of keys: the prompt that all regions share; a place that no token stands at."""


@dataclass(frozen=True, eq=False)
class RegionPrompts:
    """Texts of regions, encoded, for B images with up to N texts of L tokens each.

    Args:
        embeds: `(B, N, L, dim)`; rows of absent texts are ignored.
        tokens: `(B, N, L)` bool, the tokens that name the region's subject.
        token_kinds: `(B, N, L)` int64 of `TokenKind`.
        owners: `(B, N)` int64, whose text each one is, -2 for absent ones; None: each region has one, in their order.
    """

    embeds: torch.Tensor
    tokens: torch.Tensor
    token_kinds: torch.Tensor
    owners: torch.Tensor | None = None

    def owners_of_keys(self) -> torch.Tensor:
        """`(B, N * L)` int64: the region that each token is of."""
        batch, texts, length = self.tokens.shape
        owners = torch.arange(texts).expand(batch, -1) if self.owners is None else self.owners
        return owners.repeat_interleave(length, dim=1)


@dataclass(frozen=True, eq=False)
class RegionConditioning:
    """Regions and the tokens that they place, for a batch of B images with up to R regions and T tokens each.

    Args:
        masks: `(B, R, H, W)` float32 in [0, 1], at any resolution; rows of absent regions are zero.
        tokens: `(B, R, T)` bool, the tokens that name each region's subject; rows of absent regions are False.
        weights: `(B, R)` float32, pull of each region's tokens inside it.
        token_kinds: `(B, T)` int64 of `TokenKind`.
        prompts: the regions' own prompts. `regional_prompts` and `attention_couple` need them; `multisubject` and
            `dense_diffusion` take a region's words from there (the former its end, too), or else leave them as they are
            in the prompt.
        words: what regions hold as `prompt`: more keys of cross-attention, each seen by its region alone. Where the
            kind is padding there is none. A method that `uses_region_prompts` has them in `prompts`.
        negatives: the negative prompts of those regions that hold one, the picture's own included: in unconditional
            samples their places see these instead.
        background: `(B, R)` bool, regions that are what no other one covers; None: none is.
        times: for each image and region the fractions of the steps between which it guides; empty: always.
        loras: for each image and region the LoRAs that act there -> scale, or None; empty: none.
        ip_adapter_images: for each image and region its reference pictures, or None; empty: none. What a UNet is guided
            by has their embeddings, see `encode_pictures`.
    """

    masks: torch.Tensor
    tokens: torch.Tensor
    weights: torch.Tensor
    token_kinds: torch.Tensor
    prompts: RegionPrompts | None = None
    words: RegionPrompts | None = None
    negatives: RegionPrompts | None = None
    background: torch.Tensor | None = None
    times: Sequence[Sequence[tuple[float, float]]] = ()
    loras: Scales = ()
    ip_adapter_images: Sequence[Sequence[Any]] = ()

    def repeated(self, times: int) -> RegionConditioning:
        """The same with each image's rows `times` in a row."""

        def repeat(value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                return value.repeat_interleave(times, dim=0)
            if isinstance(value, RegionPrompts):
                return RegionPrompts(*(repeat(getattr(value, part.name)) for part in fields(value)))
            return value if value is None else tuple(row for row in value for _ in range(times))

        return RegionConditioning(**{part.name: repeat(getattr(self, part.name)) for part in fields(self)})

    def appended(self, method: GuidanceMethod | None) -> RegionPrompts | None:
        """Whose tokens are keys of cross-attention behind the prompt's own."""
        return self.prompts if getattr(method, "uses_region_prompts", False) else self.words

    def own_summaries(self, method: GuidanceMethod | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Which images' regions have the end of their own prompt among the prompt's tokens, and where: three
        `(N,)` int64. A prompt that leaves no padding has no place for it."""
        batch, regions, length = self.tokens.shape
        places = (length - 1 - torch.arange(regions, device=self.tokens.device)).clamp(min=0).expand(batch, -1)
        if self.prompts is None or not getattr(method, "uses_own_summaries", False):
            has_one = torch.zeros_like(places, dtype=torch.bool)
        else:
            has_one = self.are_one_object & (self.prompts.token_kinds == TokenKind.END).any(dim=2)
            has_one = has_one & (self.token_kinds.gather(1, places) == TokenKind.PADDING)
        images, of_image = has_one.nonzero(as_tuple=True)
        return images, of_image, places[images, of_image]

    @cached_property
    def are_one_object(self) -> torch.Tensor:
        """`(B, R)` bool: not so the background, a region without pull, and one in which more than half of another lies
        that says something."""
        objects = self.weights > 0 if self.background is None else (self.weights > 0) & ~self.background
        says = places_words(self.tokens)
        if self.words is not None and self.words.owners is not None:
            numbers = torch.arange(says.shape[1], device=says.device)
            says = says | (self.words.owners[:, None] == numbers[:, None]).any(dim=2)
        masks = self.masks.flatten(2) * (objects & says)[..., None]
        with torch.autocast(masks.device.type, enabled=False):  # sums of many pixels
            shared = masks @ masks.transpose(1, 2)  # [B, R, R]
        held = shared > masks.sum(dim=2)[:, None] / 2  # [B, holding, held]
        held.diagonal(dim1=1, dim2=2).fill_(False)
        return objects & ~held.any(dim=2)

    def guiding(self, progress: float) -> tuple[tuple[bool, ...], ...] | None:
        """For each image and region whether it guides when this share of the steps lies behind; None: all do."""
        if not self.times:
            return None
        return tuple(tuple(begin <= progress < end for begin, end in row) for row in self.times)

    def restricted(self, guiding: tuple[tuple[bool, ...], ...]) -> RegionConditioning:
        """The same with all other regions absent."""
        stays = torch.tensor(guiding, device=self.masks.device)
        return replace(self, masks=self.masks * stays[..., None, None], tokens=self.tokens & stays[..., None])


def make_maps(
    regions: RegionConditioning,
    method: GuidanceMethod,
    size: tuple[int, int],
    device: torch.device,
    *,
    resize_masks: Callable[[torch.Tensor, tuple[int, int]], torch.Tensor],
    weight_negative: float,
) -> RegionMaps:
    """The regions as attention layers of one resolution see them.

    Args:
        regions: the regions.
        method: the guidance method, which says what is among the keys.
        size: `(h, w)` of the layers.
        device: where the maps shall be.
        resize_masks, weight_negative: as for `region_attention`.
    """
    masks = resize_masks(regions.masks.flatten(0, 1).to(device), size)
    masks = masks.flatten(1).unflatten(0, regions.tokens.shape[:2])  # [B, R, Q]
    tokens, kinds = regions.tokens.to(device), regions.token_kinds.to(device)
    owners = torch.full_like(kinds, SHARED)
    images, of_image, places = (part.to(device) for part in regions.own_summaries(method))
    owners[images, places] = of_image
    appended = regions.appended(method)
    if appended is not None:
        numbers = torch.arange(tokens.shape[1], device=device)
        own_kinds, own = appended.token_kinds.to(device).flatten(1), appended.owners_of_keys().to(device)
        if appended is regions.words:
            own = own.masked_fill(own_kinds == TokenKind.PADDING, NOBODYS)
        is_here = masks.amax(dim=2)[:, :, None] > 0  # a region that is absent pulls nothing
        own_tokens = appended.tokens.to(device).flatten(1)[:, None] & (own[:, None] == numbers[:, None]) & is_here
        tokens = torch.cat([tokens, own_tokens], dim=2)
        kinds = torch.cat([kinds, own_kinds], dim=1)
        owners = torch.cat([owners, own], dim=1)

    inside = masks >= masks.amax(dim=-1, keepdim=True) / 2
    weights = torch.where(inside, regions.weights.to(device)[..., None] * masks, weight_negative)
    signed_weights = torch.full(
        (len(masks), masks.shape[2], tokens.shape[2]), -torch.inf, dtype=torch.float32, device=device
    )
    for region in range(masks.shape[1]):  # one by one: all at once would need R times the memory
        of_region = torch.where(tokens[:, region, None, :], weights[:, region, :, None], -torch.inf)
        signed_weights = torch.maximum(signed_weights, of_region)
    signed_weights = signed_weights.where(tokens.any(dim=1)[:, None, :], 0)
    inside = inside & (masks > 0)
    # The background is a place of its own words alone; for everything else it lies outside all regions.
    # So it does for a region that places no words.
    placing = places_words(tokens)  # [B, R]
    if regions.background is not None:
        placing = placing & ~regions.background.to(device)
    subjects = inside & placing[..., None]
    anywhere = subjects.any(dim=1)[:, :, None]  # [B, Q, 1]
    inside_weights = signed_weights.where(anywhere, 0)
    summary = (kinds >= TokenKind.END) & (owners == SHARED)  # [B, K]
    hidden_summary = HIDDEN * (anywhere & summary[:, None, :])
    covering = regions.masks * placing.to(regions.masks.device)[..., None, None]
    covered = covering.amax(dim=1).mean(dim=(1, 2)).to(device)  # [B], the same at every resolution
    least = HIDDEN * (covered <= 2 / 3) - 2.0
    summaries = hidden_summary.maximum(least[:, None, None])
    areas = regions.masks.mean(dim=(2, 3)).to(device)  # [B, R]
    weights = own_summary_weight(summary.sum(dim=1)[images], areas[images, of_image])
    summaries[images, :, places] = torch.where(inside[images, of_image], weights[:, None], HIDDEN)
    biases = (maps[:, None] for maps in (signed_weights, inside_weights, hidden_summary, summaries))
    maps = RegionMaps(masks, inside, tokens, kinds, owners, *biases)
    if regions.words is not None and appended is regions.words:
        unseen = (owners != SHARED)[:, None] & ~maps.inside_owner()
        absent = owners == NOBODYS if (regions.words.token_kinds == TokenKind.PADDING).any() else None
        maps = replace(maps, unseen=unseen[:, None], absent=absent)
    if regions.negatives is not None:
        maps = replace(maps, unseen_negatives=_unseen_negatives(regions.negatives, inside, regions.tokens.shape[2]))
    return maps


def _unseen_negatives(negatives: RegionPrompts, inside: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """`(B, 1, Q, T + N * L)` bool: what a place does not see in the unconditional samples. A region that has a negative
    prompt sees that, everything else the picture's own."""
    owners = negatives.owners_of_keys().to(inside.device)[:, None]  # [B, 1, N * L]
    owned = (owners == torch.arange(inside.shape[1], device=inside.device)[:, None]).float()  # [B, R, N * L]
    seen = inside.transpose(1, 2).float() @ owned > 0  # [B, Q, N * L]
    has_own = seen.any(dim=2, keepdim=True).expand(-1, -1, num_tokens)
    return torch.cat([has_own, ~seen], dim=2)[:, None]
