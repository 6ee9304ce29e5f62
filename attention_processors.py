"""Region guidance inside a UNet's attention: pull a subject's tokens into its region, keep them out of the others.

A *guidance method* is a function of one attention layer (`AttentionLayer`) that returns a bias for its logits. The
context manager `region_attention` makes a UNet apply such a method and gives the UNet back as it found it:

    with region_attention(pipe.unet, regions, scheduler=pipe.scheduler, resize_masks=masks_at):
        pipe(prompt)

Everything a method needs travels in the UNet's own call: the timestep gives the noise level, the sample's shape gives
the resolutions, and the batch size tells whether classifier-free guidance doubled it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import EDMEulerScheduler
from diffusers.models.attention_processor import Attention, AttnProcessor2_0

__multisubject_version__ = "0.1.0"

# Processors that compute plain softmax attention, so that replacing them for the time of a call loses nothing.
# By name: a pipeline loaded through `custom_pipeline` has its own copy of this module's classes.
REPLACEABLE_PROCESSORS = frozenset(
    {
        "AttnProcessor",
        "AttnProcessor2_0",
        "FusedAttnProcessor2_0",
        "RegionAttnProcessor",
        "SlicedAttnProcessor",
        "XFormersAttnProcessor",
    }
)


class TokenKind(IntEnum):
    """What stands at a position of the prompt's tokens."""

    START = 0
    WORD = 1
    END = 2
    PADDING = 3


@dataclass(frozen=True, eq=False)
class RegionConditioning:
    """Regions and the tokens that they place, for a batch of B images with up to R regions and T tokens each.

    Args:
        masks: `(B, R, H, W)` float32 in [0, 1], at any resolution; rows of absent regions are zero.
        tokens: `(B, R, T)` bool, the tokens that name each region's subject; rows of absent regions are False.
        weights: `(B, R)` float32, pull of each region's tokens inside it.
        token_kinds: `(B, T)` int64 of `TokenKind`.
    """

    masks: torch.Tensor
    tokens: torch.Tensor
    weights: torch.Tensor
    token_kinds: torch.Tensor


@dataclass(frozen=True, eq=False)
class RegionMaps:
    """`RegionConditioning` at the resolution of one attention layer with Q = h * w queries, row by row.

    Args:
        masks: `(B, R, Q)` float32 in [0, 1].
        tokens: `(B, R, T)` bool.
        token_kinds: `(B, T)` int64 of `TokenKind`.
        signed_weights: `(B, Q, T)` float32. At a region's tokens: `weight * mask` inside the region and
            `weight_negative` outside; 0 at every other token. Inside is where the mask reaches half of its peak at this
            resolution; for tokens of several regions the strongest one counts.
        weight_negative: the value outside.
    """

    masks: torch.Tensor
    tokens: torch.Tensor
    token_kinds: torch.Tensor
    signed_weights: torch.Tensor
    weight_negative: float


@dataclass(frozen=True, eq=False)
class GuidanceStep:
    """One denoising step, as scalar float32 tensors (numbers would make a compiled UNet recompile at every step).

    Args:
        sigma: noise level `sqrt((1 - alpha_bar) / alpha_bar)` of the UNet call's timestep.
        strength: `guidance_weight * ln(1 + sigma ** 2)`.
        progress: fraction of the schedule that lies behind, in [0, 1).
    """

    sigma: torch.Tensor
    strength: torch.Tensor
    progress: torch.Tensor


@dataclass(frozen=True, eq=False)
class AttentionLayer:
    """What a guidance method sees: one attention layer of one UNet call, conditional samples only.

    Args:
        query: `(B, heads, Q, head_dim)`.
        key: `(B, heads, K, head_dim)`; K is the number of tokens in cross-attention, Q in self-attention.
        scale: factor between `query @ key.T` and the logits.
        is_cross: cross-attention to the prompt (True) or self-attention (False).
        maps: the regions at this layer's resolution.
        step: noise level and strength.
    """

    query: torch.Tensor
    key: torch.Tensor
    scale: float
    is_cross: bool
    maps: RegionMaps
    step: GuidanceStep


GuidanceMethod = Callable[[AttentionLayer], torch.Tensor | None]
"""Returns the bias `(B, 1 or heads, Q, K)` added to the layer's logits, or None to leave the layer alone."""


def cones2(layer: AttentionLayer) -> torch.Tensor | None:
    """Cones 2 (Liu et al. 2023, arXiv:2305.19327): `strength * signed_weights * std(query @ key.T) * scale`.

    The standard deviation is per sample, so a picture does not depend on the batch it is made in.
    """
    if not layer.is_cross:
        return None
    per_sample = layer.step.strength * layer.scale * _product_std(layer.query, layer.key)
    return (per_sample * layer.maps.signed_weights)[:, None]


def masked(layer: AttentionLayer) -> torch.Tensor | None:
    """Tokens of a subject cannot be attended to outside their region; inside, nothing pulls."""
    if not layer.is_cross:
        return None
    return layer.maps.signed_weights.clamp(max=0)[:, None]


def cones2_padding_hidden(layer: AttentionLayer) -> torch.Tensor | None:
    """`cones2`; besides, the tokens after the last word (end of text, padding) cannot be attended to inside a region.

    A causal text encoder puts a summary of the whole prompt there, by which each region hears of the others' subjects.
    """
    bias = cones2(layer)
    if bias is None:
        return None
    masks = layer.maps.masks
    inside = ((masks >= masks.amax(dim=-1, keepdim=True) / 2) & (masks > 0)).any(dim=1)  # [B, Q]
    summary = layer.maps.token_kinds >= TokenKind.END  # [B, T]
    return bias.masked_fill((inside[:, :, None] & summary[:, None, :])[:, None], -1e8)


GUIDANCE_METHODS: dict[str, GuidanceMethod] = {
    "cones2": cones2,
    "cones2_padding_hidden": cones2_padding_hidden,
    "masked": masked,
}
"""Guidance methods by name. Any callable of the same signature is accepted where a name is."""


def resolve_guidance_method(guidance_method: str | GuidanceMethod) -> GuidanceMethod:
    """The function behind a name of `GUIDANCE_METHODS`; a callable is returned as it is. ValueError otherwise."""
    if callable(guidance_method):
        return guidance_method
    if guidance_method not in GUIDANCE_METHODS:
        raise ValueError(
            f"`guidance_method` is {guidance_method!r}, expected one of {sorted(GUIDANCE_METHODS)} or a function of an"
            " `AttentionLayer` that returns a bias."
        )
    return GUIDANCE_METHODS[guidance_method]


def _product_std(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Unbiased standard deviation of `S = query @ key.T` over heads, queries and keys: `(B, 1, 1)` float32.

    S itself is built only where it is smaller than its factors. Elsewhere: with centred keys `k' = k - mean(k)` every
    row of S splits into its mean `m = q · mean(k)` and a rest whose squares sum to `<QᵀQ, K'ᵀK'>`. Both parts are sums
    of squares, so nothing cancels in float32.
    """
    query, key = query.float(), key.float()
    heads, queries, keys = query.shape[1], query.shape[2], key.shape[2]
    if queries * keys <= (queries + keys) * query.shape[3]:
        return (query @ key.transpose(-1, -2)).flatten(1).std(dim=1)[:, None, None]
    mean_key = key.mean(dim=2, keepdim=True)
    key = key - mean_key
    row_means = query @ mean_key.transpose(-1, -2)  # [B, heads, queries, 1]
    within = ((query.transpose(-1, -2) @ query) * (key.transpose(-1, -2) @ key)).sum(dim=(1, 2, 3))
    between = row_means.var(dim=(1, 2, 3), correction=0) * (heads * queries * keys)
    return ((within + between) / (heads * queries * keys - 1)).sqrt()[:, None, None]


class AttentionRecorder:
    """Collects where chosen tokens are attended to, one map per UNet call (conditional samples only).

    Args:
        tokens: `(B, S, T)` bool: for each image, S groups of tokens; a map is the mean over a group's tokens.
    """

    def __init__(self, tokens: torch.Tensor):
        self.batch = tokens.shape[0]
        counts = tokens.sum(dim=-1, keepdim=True).clamp(min=1)
        self._token_weights = tokens.float() / counts
        self._calls: list[dict[tuple[int, int], list[torch.Tensor]]] = []

    def start_call(self) -> None:
        """Begin the maps of the next UNet call."""
        self._calls.append({})

    def add(self, logits: torch.Tensor, size: tuple[int, int]) -> None:
        """Add one cross-attention layer: logits `(B, heads, h * w, T)` with their bias, `size=(h, w)`."""
        probabilities = logits.float().softmax(dim=-1).mean(dim=1)  # [B, h * w, T]
        maps = self._token_weights.to(logits.device) @ probabilities.transpose(-1, -2)
        self._calls[-1].setdefault(size, []).append(maps.unflatten(-1, size))

    def maps(self) -> torch.Tensor:
        """Mean over heads and layers at the finest layer's resolution: `(calls, B, S, h, w)` float32 on the CPU."""
        finest = max(size for call in self._calls for size in call)
        return torch.stack(
            [
                torch.cat(
                    [
                        F.interpolate(torch.cat(layers), finest, mode="nearest-exact").unflatten(0, (len(layers), -1))
                        for layers in call.values()
                    ]
                ).mean(dim=0)
                for call in self._calls
            ]
        ).cpu()


@dataclass(frozen=True, eq=False)
class RegionCall:
    """What one UNet call tells its attention layers; travels in `cross_attention_kwargs`.

    Args:
        batch: number of conditional samples, the last ones of the UNet's batch.
        sizes: number of queries of a layer -> its `(h, w)`.
        method, maps, step: the guidance, with maps by number of queries; None and empty at an unguided call.
        recorder: collects attention maps, if wanted.
    """

    batch: int
    sizes: Mapping[int, tuple[int, int]]
    method: GuidanceMethod | None = None
    maps: Mapping[int, RegionMaps] | None = None
    step: GuidanceStep | None = None
    recorder: AttentionRecorder | None = None


class RegionAttnProcessor(AttnProcessor2_0):
    """Scaled-dot-product attention with a region bias on the conditional samples. Stateless.

    Without `regions` it is diffusers' `AttnProcessor2_0`, bit for bit.
    """

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
        *args: Any,
        regions: RegionCall | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """`hidden_states` `(batch, Q, dim)` -> the same shape; `regions` is set by `region_attention`."""
        if regions is None or hidden_states.ndim == 4 or attn.group_norm is not None:  # not in a transformer block
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, temb, *args, **kwargs)

        # 1. Project to queries, keys and values
        is_cross = encoder_hidden_states is not None
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        if is_cross and attn.norm_cross is not None:
            context = attn.norm_encoder_hidden_states(context)
        query, key, value = (
            projected.unflatten(-1, (attn.heads, -1)).transpose(1, 2)  # [batch, heads, tokens, head_dim]
            for projected in (attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context))
        )
        if attn.norm_q is not None:
            query = attn.norm_q(query)
        if attn.norm_k is not None:
            key = attn.norm_k(key)

        # 2. Ask the guidance method for its bias
        bias = _region_bias(regions, query, key, attn.scale, is_cross)
        if attention_mask is not None:
            attention_mask = attn.prepare_attention_mask(attention_mask, key.shape[2], key.shape[0])
            attention_mask = attention_mask.view(key.shape[0], attn.heads, -1, key.shape[2])
            bias = attention_mask if bias is None else bias + attention_mask

        # 3. Attend
        if is_cross and regions.recorder is not None:
            logits = query @ key.transpose(-1, -2) * attn.scale
            logits = logits if bias is None else logits + bias
            regions.recorder.add(logits[-regions.batch :], regions.sizes[query.shape[2]])
        output = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=attn.scale)

        # 4. Project back
        output = output.transpose(1, 2).flatten(2).to(query.dtype)
        output = attn.to_out[1](attn.to_out[0](output))
        if attn.residual_connection:
            output = output + hidden_states
        return output / attn.rescale_output_factor


def _region_bias(
    regions: RegionCall, query: torch.Tensor, key: torch.Tensor, scale: float, is_cross: bool
) -> torch.Tensor | None:
    """The method's bias for the whole batch: `(batch, 1 or heads, Q, K)` in the queries' dtype, or None."""
    if regions.method is None or regions.maps is None or regions.step is None:
        return None
    if query.shape[2] not in regions.maps:
        raise ValueError(
            f"An attention layer has {query.shape[2]} queries, expected one of {list(regions.sizes)} for this sample's"
            " shape. Region guidance needs a UNet that halves its sample from level to level."
        )
    conditional = slice(-regions.batch, None)  # classifier-free guidance batches [unconditional, conditional]
    layer = AttentionLayer(
        query[conditional], key[conditional], scale, is_cross, regions.maps[query.shape[2]], regions.step
    )
    bias = regions.method(layer)
    if bias is None:
        return None
    if bias.ndim != 4 or bias.shape[0] != regions.batch or bias.shape[2:] != (query.shape[2], key.shape[2]):
        raise ValueError(
            f"The guidance method returned a bias of shape {tuple(bias.shape)}, expected (batch, 1 or heads, queries,"
            f" keys) = ({regions.batch}, 1 or {query.shape[1]}, {query.shape[2]}, {key.shape[2]})."
        )
    # -1e8 is infinite in float16, and an infinite logit turns a fully masked row into NaN.
    limit = torch.finfo(query.dtype).max / 2
    bias = bias.clamp(-limit, limit).to(query.dtype)
    return F.pad(bias, (0, 0) * 3 + (query.shape[0] - regions.batch, 0))


@contextmanager
def region_attention(
    unet: Any,
    regions: RegionConditioning | None,
    *,
    scheduler: Any,
    resize_masks: Callable[[torch.Tensor, tuple[int, int]], torch.Tensor],
    guidance_method: str | GuidanceMethod = "cones2",
    guidance_weight: float = 0.08,
    weight_negative: float = -1e8,
    guidance_steps: int | None = None,
    recorder: AttentionRecorder | None = None,
) -> Iterator[None]:
    """Within the context, calls of `unet` are guided by `regions`; afterwards the UNet is as it was.

    Works around any pipeline that calls a `UNet2DConditionModel` with `cross_attention_kwargs` in reach, with or
    without classifier-free guidance in one batch. A context inside another one on the same UNet replaces it for its
    duration, also with `regions=None`.

    Args:
        unet: the `UNet2DConditionModel`.
        regions: masks and tokens of the B images that a call denoises; None: no guidance.
        scheduler: the scheduler that drives the UNet; gives noise levels and counts steps.
        resize_masks: `(N, H, W), (h, w) -> (N, h, w)`; `layout.masks_at` keeps regions that are smaller than a cell.
        guidance_method: name in `GUIDANCE_METHODS`, or a function of an `AttentionLayer`.
        guidance_weight: factor of the strength.
        weight_negative: signed weight of a subject's tokens outside its region; at most 0 and finite.
        guidance_steps: guide the scheduler's first steps only; None: all.
        recorder: collects attention maps of every UNet call, guided or not.

    Raises:
        ValueError: an attention processor of the UNet would be lost (IP-Adapter, custom ones), a bad argument, or a
            batch that does not fit the regions.
    """
    processors = dict(unet.attn_processors)
    nested = any(type(processor).__name__ == RegionAttnProcessor.__name__ for processor in processors.values())
    if regions is None and recorder is None and not nested:
        yield
        return

    _check_processors(processors)
    hook = _RegionHook(
        regions,
        scheduler,
        resize_masks,
        resolve_guidance_method(guidance_method),
        guidance_weight,
        weight_negative,
        guidance_steps,
        recorder,
    )
    handle = None
    try:
        unet.set_attn_processor(RegionAttnProcessor())
        # Prepended: of nested contexts the innermost speaks first, and the outer ones then keep silent.
        handle = unet.register_forward_pre_hook(hook, prepend=True, with_kwargs=True)
        yield
    finally:
        if handle is not None:
            handle.remove()
        unet.set_attn_processor(processors)


def _check_processors(processors: Mapping[str, Any]) -> None:
    for name, processor in processors.items():
        kind = type(processor).__name__
        if "IPAdapter" in kind:
            raise ValueError(
                f"The UNet has an IP-Adapter ({kind} at {name}), which region guidance would switch off. Call"
                " `pipe.unload_ip_adapter()` first, or call the pipeline without `layout` and attention maps."
            )
        if kind not in REPLACEABLE_PROCESSORS:
            raise ValueError(
                f"The UNet's attention processor {kind} at {name} is not one of {sorted(REPLACEABLE_PROCESSORS)}, so"
                " region guidance would lose what it does. Call `unet.set_default_attn_processor()` first."
            )


class _RegionHook:
    """Forward pre-hook of the UNet: adds a `RegionCall` to the call's `cross_attention_kwargs`."""

    def __init__(
        self,
        regions: RegionConditioning | None,
        scheduler: Any,
        resize_masks: Callable[[torch.Tensor, tuple[int, int]], torch.Tensor],
        method: GuidanceMethod,
        guidance_weight: float,
        weight_negative: float,
        guidance_steps: int | None,
        recorder: AttentionRecorder | None,
    ):
        if not -torch.finfo(torch.float32).max <= weight_negative <= 0:
            raise ValueError(f"`weight_negative` is {weight_negative}, expected a finite number that is at most 0.")
        if not abs(guidance_weight) <= torch.finfo(torch.float32).max:
            raise ValueError(f"`guidance_weight` is {guidance_weight}, expected a finite number.")
        if guidance_steps is not None and guidance_steps < 0:
            raise ValueError(f"`guidance_steps` is {guidance_steps}, expected at least 0, or None to guide all steps.")
        if not hasattr(scheduler, "alphas_cumprod") and not isinstance(scheduler, EDMEulerScheduler):
            raise ValueError(
                f"{type(scheduler).__name__} has no `alphas_cumprod`, expected one of KarrasDiffusionSchedulers."
            )
        self.regions, self.scheduler, self.resize_masks = regions, scheduler, resize_masks
        self.method, self.guidance_weight, self.weight_negative = method, guidance_weight, weight_negative
        self.guidance_steps, self.recorder = guidance_steps, recorder
        self.sigmas: torch.Tensor | None = None
        if hasattr(scheduler, "alphas_cumprod"):
            # Zero-terminal-SNR schedules end in alpha_bar = 0; diffusers' own floor keeps the noise level finite.
            alphas_cumprod = scheduler.alphas_cumprod.float().clamp(min=2**-24)
            self.sigmas = ((1 - alphas_cumprod) / alphas_cumprod).sqrt()
        self.maps_by_shape: dict[tuple[torch.Size, torch.device], dict[int, RegionMaps]] = {}

    @torch.compiler.disable
    def __call__(self, unet: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict]:
        call_kwargs = dict(kwargs.get("cross_attention_kwargs") or {})
        if "regions" in call_kwargs:  # a context inside this one has spoken
            return args, kwargs
        sample = args[0] if args else kwargs["sample"]
        timestep = torch.as_tensor(args[1] if len(args) > 1 else kwargs["timestep"])
        call_kwargs["regions"] = self._region_call(sample, timestep.reshape(-1)[0])
        return args, {**kwargs, "cross_attention_kwargs": call_kwargs}

    def _region_call(self, sample: torch.Tensor, timestep: torch.Tensor) -> RegionCall | None:
        sizes = {h * w: (h, w) for h, w in _level_sizes(*sample.shape[-2:])}
        if self.recorder is not None:
            self.recorder.start_call()
        if not self._is_guided(timestep):
            recorder = self.recorder
            return None if recorder is None else RegionCall(recorder.batch, sizes, recorder=recorder)

        assert self.regions is not None
        batch = self.regions.masks.shape[0]
        if sample.shape[0] not in (batch, 2 * batch):
            raise ValueError(
                f"The UNet was called with a batch of {sample.shape[0]}, expected {batch} (one sample per image of"
                f" `regions`) or {2 * batch} (with classifier-free guidance)."
            )
        key = (sample.shape[-2:], sample.device)
        if key not in self.maps_by_shape:
            self.maps_by_shape[key] = {h * w: self._maps_at((h, w), sample.device) for h, w in sizes.values()}
        return RegionCall(batch, sizes, self.method, self.maps_by_shape[key], self._step(timestep), self.recorder)

    def _is_guided(self, timestep: torch.Tensor) -> bool:
        """Whether this call is guided, decided on the host without waiting for the device where that is possible."""
        if self.regions is None or self.guidance_steps == 0:
            return False
        return self.guidance_steps is None or _step_index(self.scheduler, timestep) < self.guidance_steps

    def _step(self, timestep: torch.Tensor) -> GuidanceStep:
        sigma = self._sigma(timestep)
        return GuidanceStep(
            sigma=sigma,
            strength=self.guidance_weight * (sigma**2).log1p(),
            progress=(self.scheduler.timesteps.to(timestep.device) > timestep).float().mean(),
        )

    def _sigma(self, timestep: torch.Tensor) -> torch.Tensor:
        """Noise level at `timestep`, interpolated between training timesteps, on the timestep's device."""
        if self.sigmas is None:  # EDM's timesteps count no training steps
            return self.scheduler.sigmas[self.scheduler.step_index].to(timestep.device)
        self.sigmas = self.sigmas.to(timestep.device)
        position = timestep.float().clamp(0, len(self.sigmas) - 1)
        below = position.floor().long()
        above = (below + 1).clamp(max=len(self.sigmas) - 1)
        # `take`, because indexing by a scalar tensor would wait for the device
        return torch.lerp(self.sigmas.take(below), self.sigmas.take(above), position.frac())

    def _maps_at(self, size: tuple[int, int], device: torch.device) -> RegionMaps:
        regions = self.regions
        assert regions is not None
        masks = self.resize_masks(regions.masks.flatten(0, 1).to(device), size)
        masks = masks.flatten(1).unflatten(0, regions.tokens.shape[:2])  # [B, R, Q]
        tokens = regions.tokens.to(device)

        inside = masks >= masks.amax(dim=-1, keepdim=True) / 2
        weights = torch.where(inside, regions.weights.to(device)[..., None] * masks, self.weight_negative)
        signed_weights = torch.full(
            (len(masks), masks.shape[2], tokens.shape[2]), -torch.inf, dtype=torch.float32, device=device
        )
        for region in range(masks.shape[1]):  # one by one: all at once would need R times the memory
            of_region = torch.where(tokens[:, region, None, :], weights[:, region, :, None], -torch.inf)
            signed_weights = torch.maximum(signed_weights, of_region)
        signed_weights = signed_weights.where(tokens.any(dim=1)[:, None, :], 0)
        return RegionMaps(masks, tokens, regions.token_kinds.to(device), signed_weights, self.weight_negative)


def _level_sizes(height: int, width: int) -> list[tuple[int, int]]:
    """Sizes of a UNet's levels for a sample of this size: each halves the one before, odd sizes rounded up."""
    sizes = [(height, width)]
    while sizes[-1] != (1, 1):
        height, width = sizes[-1]
        sizes.append(((height + 1) // 2, (width + 1) // 2))
    return sizes


def _step_index(scheduler: Any, timestep: torch.Tensor) -> int:
    """0-based index of the scheduler's step that a UNet call at `timestep` belongs to.

    Schedulers with a `step_index` count on the host (a second-order step counts once). DDIM, DDPM and PNDM look their
    coefficients up by the timestep's value and so read it from the device anyway.
    """
    if hasattr(scheduler, "step_index"):
        first = getattr(scheduler, "begin_index", None) or 0
        index = first if scheduler.step_index is None else scheduler.step_index
        return (index - first) // scheduler.order
    timesteps = scheduler.timesteps
    return int(timesteps[timesteps > timestep.to(timesteps.device)].unique().numel())
