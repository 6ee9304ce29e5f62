"""Region guidance inside a UNet's attention: pull a subject's tokens into its region, keep them out of the others.

The context manager `region_attention` makes a UNet apply a method of `guidance_methods.py` and gives the UNet back as
it found it:

    with region_attention(pipe.unet, regions, scheduler=pipe.scheduler, resize_masks=masks_at):
        pipe(prompt)

Everything a method needs travels in the UNet's own call: the timestep gives the noise level, the sample's shape gives
the resolutions, and the batch size tells whether classifier-free guidance doubled it.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import EDMEulerScheduler
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import nn

from .guidance_methods import (
    HIDDEN,
    AttentionLayer,
    GuidanceMethod,
    GuidanceStep,
    KeyMoments,
    RegionMaps,
    TokenKind,
    resolve_guidance_method,
)

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


@dataclass(frozen=True, eq=False)
class RegionPrompts:
    """Each region's own prompt, encoded, for B images with up to R regions and L tokens each.

    Args:
        embeds: `(B, R, L, dim)`; rows of absent regions are ignored.
        tokens: `(B, R, L)` bool, the tokens that name the region's subject.
        token_kinds: `(B, R, L)` int64 of `TokenKind`.
    """

    embeds: torch.Tensor
    tokens: torch.Tensor
    token_kinds: torch.Tensor


@dataclass(frozen=True, eq=False)
class RegionConditioning:
    """Regions and the tokens that they place, for a batch of B images with up to R regions and T tokens each.

    Args:
        masks: `(B, R, H, W)` float32 in [0, 1], at any resolution; rows of absent regions are zero.
        tokens: `(B, R, T)` bool, the tokens that name each region's subject; rows of absent regions are False.
        weights: `(B, R)` float32, pull of each region's tokens inside it.
        token_kinds: `(B, T)` int64 of `TokenKind`.
        prompts: the regions' own prompts. `regional_prompts` and `attention_couple` need them; `multisubject` and
            `dense_diffusion` take a region's words from there, or else leave them as they are in the prompt.
    """

    masks: torch.Tensor
    tokens: torch.Tensor
    weights: torch.Tensor
    token_kinds: torch.Tensor
    prompts: RegionPrompts | None = None

    def repeated(self, times: int) -> RegionConditioning:
        """The same with each image's rows `times` in a row."""
        masks, tokens, weights, kinds = (
            tensor.repeat_interleave(times, dim=0)
            for tensor in (self.masks, self.tokens, self.weights, self.token_kinds)
        )
        prompts = self.prompts
        if prompts is not None:
            prompts = RegionPrompts(
                *(
                    tensor.repeat_interleave(times, dim=0)
                    for tensor in (prompts.embeds, prompts.tokens, prompts.token_kinds)
                )
            )
        return RegionConditioning(masks, tokens, weights, kinds, prompts)


class AttentionRecorder:
    """Collects where chosen tokens are attended to, one map per UNet call (conditional samples only).

    Args:
        tokens: `(B, S, K)` bool: for each image, S groups of tokens of its prompt and of its regions' own prompts.
        num_tokens: how many of the K are the prompt's (None: all). A map is the mean over a group's tokens there; what
            their copies in the regions' own prompts receive is added to it.
    """

    def __init__(self, tokens: torch.Tensor, num_tokens: int | None = None):
        self.batch = tokens.shape[0]
        counts = tokens[..., :num_tokens].sum(dim=-1, keepdim=True).clamp(min=1)
        self._token_weights = tokens.float() / counts
        self._calls: list[dict[tuple[int, int], list[torch.Tensor]]] = []

    def start_call(self) -> None:
        """Begin the maps of the next UNet call."""
        self._calls.append({})

    def add(self, logits: torch.Tensor, size: tuple[int, int]) -> None:
        """Add one cross-attention layer: logits `(B, heads, h * w, K)` with their bias, `size=(h, w)`."""
        probabilities = logits.float().softmax(dim=-1).mean(dim=1)  # [B, h * w, K]
        self._token_weights = weights = self._token_weights.to(logits.device)
        keys = min(weights.shape[-1], probabilities.shape[-1])  # own prompts are there at guided calls alone
        maps = weights[..., :keys] @ probabilities[..., :keys].transpose(-1, -2)
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
class LayerKeys:
    """Keys and values of one attention layer.

    Args:
        key, value: `(batch, heads, K, head_dim)`; in guided cross-attention K is a multiple of 8, see `num_tokens`.
        num_tokens: how many of the K are tokens; the last few may be fillers, which nothing must attend to.
        moments: of the conditional samples' tokens; None in self-attention.
    """

    key: torch.Tensor
    value: torch.Tensor
    num_tokens: int
    moments: KeyMoments | None = None


class Stamp:
    """Tells whether tensors are the ones that a result was computed from, and unchanged (but through `.data`).

    Args:
        tensors: what a result is computed from.
    """

    def __init__(self, *tensors: torch.Tensor):
        self._versions = [(tensor, tensor._version) for tensor in tensors]

    @staticmethod
    def possible(*tensors: torch.Tensor) -> bool:
        """False where a result must not outlive the call, or a change would go unseen: a compiled UNet, gradients,
        autocast, inference tensors."""
        return not (
            torch.compiler.is_compiling()
            or torch.is_grad_enabled()
            or torch.is_autocast_enabled(tensors[0].device.type)
            or any(tensor.is_inference() for tensor in tensors)
        )

    def holds(self, *tensors: torch.Tensor) -> bool:
        """Whether these are the stamped ones."""
        return all(
            old is new and version == new._version for (old, version), new in zip(self._versions, tensors, strict=True)
        )


class PromptKeys:
    """Keeps every layer's `LayerKeys` while the UNet is called with the same prompt embeddings, step after step.

    Only plain linear projections are trusted to give the same again: not LoRA layers, whose scale a callback may
    change, and not modules with hooks or a `forward` of their own, which do more than their weights say (offloading).
    """

    def __init__(self) -> None:
        self._kept: dict[Attention, tuple[Stamp, LayerKeys]] = {}

    def of(self, attn: Attention, prompt_embeds: torch.Tensor, regions: RegionCall) -> LayerKeys:
        """The keys of this layer: those of an earlier call if all that they were computed from is unchanged."""
        if not (_is_plain_linear(attn.to_k) and _is_plain_linear(attn.to_v)):
            return _prompt_keys(attn, prompt_embeds, regions)
        made_from = prompt_embeds, attn.to_k.weight, attn.to_v.weight
        if not Stamp.possible(*made_from):
            return _prompt_keys(attn, prompt_embeds, regions)
        kept = self._kept.get(attn)
        if kept is not None and kept[0].holds(*made_from):
            return kept[1]
        keys = _prompt_keys(attn, prompt_embeds, regions)
        self._kept[attn] = Stamp(*made_from), keys
        return keys


def _is_plain_linear(module: nn.Module) -> bool:
    return type(module) is nn.Linear and not (
        module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    )


@dataclass(frozen=True, eq=False)
class RegionCall:
    """What one UNet call tells its attention layers; travels in `cross_attention_kwargs`.

    Args:
        batch: number of conditional samples, the last ones of the UNet's batch.
        sizes: number of queries of a layer -> its `(h, w)`.
        method, maps, step: the guidance, with maps by number of queries; None and empty at an unguided call.
        region_prompts: `(B, R * L, dim)`, more tokens for cross-attention, if the method wants them.
        recorder: collects attention maps, if wanted.
        kept_keys: what earlier calls computed from the prompt alone.
        kept_biases: of this call, of methods that are `same_in_every_layer`.
        frames: of earlier calls, what surrounds a method's bias in the whole batch's; see `_framed`.
    """

    batch: int
    sizes: Mapping[int, tuple[int, int]]
    method: GuidanceMethod | None = None
    maps: Mapping[int, RegionMaps] | None = None
    step: GuidanceStep | None = None
    region_prompts: torch.Tensor | None = None
    recorder: AttentionRecorder | None = None
    kept_keys: PromptKeys = field(default_factory=PromptKeys)
    kept_biases: dict[tuple[int, bool], torch.Tensor | None] = field(default_factory=dict)
    frames: dict[tuple[Any, ...], torch.Tensor] = field(default_factory=dict)


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
        query = _split_heads(attn, attn.to_q(hidden_states))
        if attn.norm_q is not None:
            query = attn.norm_q(query)
        if encoder_hidden_states is None:
            keys = _keys(attn, hidden_states)
        else:
            keys = regions.kept_keys.of(attn, encoder_hidden_states, regions)
        key, value = keys.key, keys.value

        # 2. Ask the guidance method for its bias
        bias = _kept_bias(regions, query, keys, attn.scale, is_cross)
        if attention_mask is not None:
            attention_mask = F.pad(attention_mask, (0, key.shape[2] - attention_mask.shape[-1]))
            attention_mask = attn.prepare_attention_mask(attention_mask, key.shape[2], key.shape[0])
            attention_mask = attention_mask.view(key.shape[0], attn.heads, -1, key.shape[2])
            bias = attention_mask if bias is None else bias + attention_mask

        # 3. Attend
        if is_cross and regions.recorder is not None:
            # In float32: fused attention scales before it multiplies, this product would overflow float16.
            logits = query[-regions.batch :].float() @ key[-regions.batch :].float().transpose(-1, -2) * attn.scale
            logits = logits if bias is None else logits + bias[-regions.batch :]
            regions.recorder.add(logits, regions.sizes[query.shape[2]])
        output = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=attn.scale)

        # 4. Project back
        output = output.transpose(1, 2).flatten(2).to(query.dtype)
        output = attn.to_out[1](attn.to_out[0](output))
        if attn.residual_connection:
            output = output + hidden_states
        return output / attn.rescale_output_factor


def _prompt_keys(attn: Attention, prompt_embeds: torch.Tensor, regions: RegionCall) -> LayerKeys:
    """Keys and values of a cross-attention layer: of the prompt `(batch, T, dim)` and of the regions' own prompts.

    Biased attention is fastest where the number of keys is a multiple of 8 (on a CPU with AVX-512 it is also faster
    than unbiased attention to the usual 77), so that a guided call gets fillers behind its tokens.
    """
    if regions.region_prompts is not None:  # tokens of the conditional samples alone, zeros for the others
        more = regions.region_prompts.to(prompt_embeds.dtype)
        more = F.pad(more, (0, 0, 0, 0, len(prompt_embeds) - len(more), 0))
        prompt_embeds = torch.cat([prompt_embeds, more], dim=1)
    if attn.norm_cross is not None:
        prompt_embeds = attn.norm_encoder_hidden_states(prompt_embeds)
    num_tokens = prompt_embeds.shape[1]
    if regions.method is None:
        return _keys(attn, prompt_embeds)
    keys = _keys(attn, F.pad(prompt_embeds, (0, 0, 0, -num_tokens % 8)))
    moments = KeyMoments(keys.key[-regions.batch :, :, :num_tokens])
    return replace(keys, num_tokens=num_tokens, moments=moments)


def _keys(attn: Attention, context: torch.Tensor) -> LayerKeys:
    key, value = _split_heads(attn, attn.to_k(context)), _split_heads(attn, attn.to_v(context))
    return LayerKeys(key if attn.norm_k is None else attn.norm_k(key), value, context.shape[1])


def _split_heads(attn: Attention, projected: torch.Tensor) -> torch.Tensor:
    """`(batch, tokens, heads * head_dim)` -> `(batch, heads, tokens, head_dim)`."""
    return projected.unflatten(-1, (attn.heads, -1)).transpose(1, 2)


def _kept_bias(
    regions: RegionCall, query: torch.Tensor, keys: LayerKeys, scale: float, is_cross: bool
) -> torch.Tensor | None:
    """`_region_bias`, from an earlier layer of this UNet call where the method allows it."""
    if torch.compiler.is_compiling() or not getattr(regions.method, "same_in_every_layer", False):
        return _region_bias(regions, query, keys, scale, is_cross)
    kind = (query.shape[2], is_cross)
    if kind in regions.kept_biases:
        return regions.kept_biases[kind]
    bias = _region_bias(regions, query, keys, scale, is_cross)
    if bias is None or not bias.requires_grad:  # gradient checkpointing wants it computed again
        regions.kept_biases[kind] = bias
    return bias


def _region_bias(
    regions: RegionCall, query: torch.Tensor, keys: LayerKeys, scale: float, is_cross: bool
) -> torch.Tensor | None:
    """The bias for the whole batch, `(batch, 1 or heads, Q, K)` in the queries' dtype, or None: the method's on the
    conditional samples, and -inf at keys that are fillers."""
    if regions.method is None or regions.maps is None or regions.step is None:
        return None
    if query.shape[2] not in regions.maps:
        raise ValueError(
            f"An attention layer has {query.shape[2]} queries, expected one of {list(regions.sizes)} for this sample's"
            " shape. Region guidance needs a UNet that halves its sample from level to level."
        )
    batch, num_tokens, rest = regions.batch, keys.num_tokens, query.shape[0] - regions.batch
    # Classifier-free guidance batches [unconditional, conditional].
    layer = AttentionLayer(
        query[rest:],
        keys.key[rest:, :, :num_tokens],
        scale,
        is_cross,
        regions.maps[query.shape[2]],
        regions.step,
        keys.moments,
    )
    bias = regions.method(layer)
    num_fillers = keys.key.shape[2] - num_tokens
    if bias is None:
        if not num_fillers:
            return None
        bias = query.new_zeros(batch, 1, query.shape[2], num_tokens)
    if not isinstance(bias, torch.Tensor):
        raise TypeError(f"The guidance method returned a {type(bias).__name__}, expected a tensor or None.")
    heads = query.shape[1]
    if bias.shape not in [(batch, some, query.shape[2], num_tokens) for some in (1, heads)]:
        raise ValueError(
            f"The guidance method returned a bias of shape {tuple(bias.shape)}, expected (batch, 1 or heads, queries,"
            f" keys) = ({batch}, 1 or {heads}, {query.shape[2]}, {num_tokens})."
        )
    # -1e8 is infinite in float16, and an infinite logit turns a fully masked row into NaN.
    limit = min(torch.finfo(query.dtype).max, torch.finfo(torch.float32).max) / 2
    bias = bias.float().clamp(-limit, limit)
    if is_cross:
        return _framed(bias, query, keys, regions)
    bias = bias.to(query.dtype)
    if getattr(regions.method, "guides_all_self_attention", False):
        return bias.repeat(query.shape[0] // batch, 1, 1, 1)
    return F.pad(bias, (0, 0) * 3 + (rest, 0))


def _framed(bias: torch.Tensor, query: torch.Tensor, keys: LayerKeys, regions: RegionCall) -> torch.Tensor:
    """A bias of cross-attention `(B, 1 or heads, Q, num_tokens)` as part of the whole batch's, in the queries' dtype.

    What surrounds it is the same at every call and kept where possible, since on a GPU each operation that is not
    called for costs more than its arithmetic.
    """
    shape = (query.shape[0], *bias.shape[1:3], keys.key.shape[2])
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        frame = _make_frame(shape, query, keys, regions)
    else:
        kind = (shape, regions.batch, query.dtype, query.device, torch.is_inference_mode_enabled())
        if kind not in regions.frames:
            regions.frames[kind] = _make_frame(shape, query, keys, regions)
        frame = regions.frames[kind]
    frame[-regions.batch :, ..., : keys.num_tokens] = bias
    return frame


def _make_frame(shape: tuple[int, ...], query: torch.Tensor, keys: LayerKeys, regions: RegionCall) -> torch.Tensor:
    """Zero in the unconditional half, but -inf at the regions' own tokens and at fillers."""
    own_tokens = 0 if regions.region_prompts is None else regions.region_prompts.shape[1]
    frame = query.new_full(shape, -torch.inf)
    frame[: -regions.batch, ..., : keys.num_tokens - own_tokens] = 0
    return frame


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
    calls: ExpectedCalls | None = None,
) -> Iterator[None]:
    """Within the context, calls of `unet` are guided by `regions`; afterwards the UNet is as it was.

    Works around any pipeline that calls a `UNet2DConditionModel` with `cross_attention_kwargs` in reach, with or
    without classifier-free guidance in one batch. A context inside another one on the same UNet replaces it for its
    duration, also with `regions=None`. Whoever else calls this UNet meanwhile, from another thread, is guided too; a
    backward pass with gradient checkpointing belongs inside.

    Args:
        unet: the `UNet2DConditionModel`.
        regions: masks and tokens of the B images that a call denoises; None: no guidance.
        scheduler: the scheduler that drives the UNet; gives noise levels and counts steps.
        resize_masks: `(N, H, W), (h, w) -> (N, h, w)`; `layout.masks_at` keeps regions that are smaller than a cell.
        guidance_method: name in `GUIDANCE_METHODS`, or a function of an `AttentionLayer`.
        guidance_weight: factor of the strength, at most 1e6.
        weight_negative: signed weight of a subject's tokens outside its region; at most 0 and finite.
        guidance_steps: guide the scheduler's first steps only; None: all.
        recorder: collects attention maps of every UNet call, guided or not.
        calls: what the UNet will be called with, where somebody else's pipeline calls it; None: not checked, and every
            call has one conditional sample for each image of `regions`.

    Raises:
        ValueError: an attention processor of the UNet would be lost (IP-Adapter, custom ones), a bad argument, or a
            batch that does not fit the regions.
    """
    # Not `unet.set_attn_processor`, which walks the whole UNet three times
    layers = {name: module for name, module in unet.named_modules() if hasattr(type(module), "set_processor")}
    processors = {name: layer.get_processor() for name, layer in layers.items()}
    nested = any(type(processor).__name__ == RegionAttnProcessor.__name__ for processor in processors.values())
    if regions is None and recorder is None and not nested:
        yield
        return

    _check_processors(processors)
    hook = _RegionHook(
        len(unet.config.block_out_channels) if hasattr(unet, "config") else None,
        regions,
        scheduler,
        resize_masks,
        resolve_guidance_method(guidance_method),
        guidance_weight,
        weight_negative,
        guidance_steps,
        recorder,
        calls,
        list(layers.values()),
    )
    handle = None
    try:
        for layer in layers.values():
            layer.set_processor(RegionAttnProcessor())
        # Prepended: of nested contexts the innermost speaks first, and the outer ones then keep silent.
        handle = unet.register_forward_pre_hook(hook, prepend=True, with_kwargs=True)
        yield
    finally:
        if handle is not None:
            handle.remove()
        for name, layer in layers.items():
            layer.set_processor(processors[name])


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


@dataclass(frozen=True, eq=False)
class ExpectedCalls:
    """What the UNet is called with by a pipeline that was given these embeddings.

    Args:
        pipeline: the pipeline.
        latent_size: `(h, w)` of its samples.
        prompt_embeds: `(B, T, dim)`.
        negative_prompt_embeds: `(B, T, dim)`, not the same.
    """

    pipeline: Any
    latent_size: tuple[int, int]
    prompt_embeds: torch.Tensor
    negative_prompt_embeds: torch.Tensor

    def images_per_prompt(self, prompt_embeds: torch.Tensor) -> int | None:
        """How often a call has each prompt, alone or behind as many negative ones; None: it is another call."""
        times = len(prompt_embeds) // len(self.prompt_embeds)

        def consists_of(times: int, *parts: torch.Tensor) -> bool:
            expected = torch.cat([part.repeat_interleave(times, dim=0) for part in parts])
            return expected.shape == prompt_embeds.shape and torch.equal(expected.to(prompt_embeds), prompt_embeds)

        if consists_of(times, self.prompt_embeds):
            return times
        if consists_of(times // 2, self.negative_prompt_embeds, self.prompt_embeds):
            return times // 2
        return None


class _RegionHook:
    """Forward pre-hook of the UNet: adds a `RegionCall` to the call's `cross_attention_kwargs`."""

    def __init__(
        self,
        num_levels: int | None,
        regions: RegionConditioning | None,
        scheduler: Any,
        resize_masks: Callable[[torch.Tensor, tuple[int, int]], torch.Tensor],
        method: GuidanceMethod,
        guidance_weight: float,
        weight_negative: float,
        guidance_steps: int | None,
        recorder: AttentionRecorder | None,
        calls: ExpectedCalls | None,
        layers: list[Any],
    ):
        for name, value in (("weight_negative", weight_negative), ("guidance_weight", guidance_weight)):
            if not isinstance(value, numbers.Real):
                raise TypeError(f"`{name}` is {value!r}, expected a number.")
        if not -torch.finfo(torch.float32).max <= weight_negative <= 0:
            raise ValueError(f"`weight_negative` is {weight_negative}, expected a finite number that is at most 0.")
        if not abs(guidance_weight) <= 1e6:
            raise ValueError(f"`guidance_weight` is {guidance_weight}, expected a number from -1e6 to 1e6.")
        if guidance_steps is not None and guidance_steps < 0:
            raise ValueError(f"`guidance_steps` is {guidance_steps}, expected at least 0, or None to guide all steps.")
        if not hasattr(scheduler, "alphas_cumprod") and not isinstance(scheduler, EDMEulerScheduler):
            raise ValueError(
                f"{type(scheduler).__name__} has no `alphas_cumprod`, expected one of KarrasDiffusionSchedulers."
            )
        self.appended = getattr(method, "uses_region_prompts", False)
        if regions is not None and regions.prompts is None and self.appended:
            raise ValueError(
                f"The guidance method {getattr(method, '__name__', method)!r} uses the regions' own prompts, but"
                " `regions.prompts` is None. Pass `RegionPrompts`, or choose another method."
            )
        has_prompts = regions is not None and regions.prompts is not None
        self.own_words = has_prompts and getattr(method, "uses_own_words", False)
        self.num_levels, self.regions, self.scheduler, self.resize_masks = num_levels, regions, scheduler, resize_masks
        self.method, self.guidance_weight, self.weight_negative = method, guidance_weight, weight_negative
        self.guidance_steps, self.recorder = guidance_steps, recorder
        self.calls, self.layers = calls, layers
        self.regions_of_prompts = regions
        self.repeats_of: Stamp | None = None
        self.sigmas: torch.Tensor | None = None
        if hasattr(scheduler, "alphas_cumprod"):
            # Zero-terminal-SNR schedules end in alpha_bar = 0; diffusers' own floor keeps the noise level finite.
            alphas_cumprod = scheduler.alphas_cumprod.float().clamp(min=2**-24)
            self.sigmas = ((1 - alphas_cumprod) / alphas_cumprod).sqrt()
        self.own_words_kept: tuple[Stamp, torch.Tensor] | None = None
        self.timesteps_of_run: torch.Tensor | None = None
        self.first_timestep: torch.Tensor | None = None
        self.last_timestep: torch.Tensor | None = None
        self.kept_keys = PromptKeys()
        self.frames: dict[tuple[Any, ...], torch.Tensor] = {}
        self.maps_by_shape: dict[tuple[torch.Size, torch.device], dict[int, RegionMaps]] = {}

    @torch.compiler.disable
    def __call__(self, unet: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict]:
        call_kwargs = dict(kwargs.get("cross_attention_kwargs") or {})
        if "regions" in call_kwargs:  # a context inside this one has spoken
            return args, kwargs
        sample = args[0] if args else kwargs["sample"]
        timestep = torch.as_tensor(args[1] if len(args) > 1 else kwargs["timestep"])
        prompt_embeds = args[2] if len(args) > 2 else kwargs["encoder_hidden_states"]
        call_kwargs["regions"] = call = self._region_call(sample, timestep.reshape(-1)[0], prompt_embeds)
        if call is not None and call.maps is not None:
            self._check_length(prompt_embeds)
            if self.own_words:
                prompt_embeds = self._with_own_words(prompt_embeds)
                if len(args) > 2:
                    args = (*args[:2], prompt_embeds, *args[3:])
                else:
                    kwargs = {**kwargs, "encoder_hidden_states": prompt_embeds}
        return args, {**kwargs, "cross_attention_kwargs": call_kwargs}

    def _check_call(self, calls: ExpectedCalls, sample: torch.Tensor, prompt_embeds: torch.Tensor) -> None:
        """Raise if this call is not one that can be guided, and adapt to its number of pictures per prompt."""
        assert self.regions is not None and self.regions_of_prompts is not None
        if any(type(layer.processor).__name__ != RegionAttnProcessor.__name__ for layer in self.layers):
            raise ValueError(
                "The UNet's attention processors were replaced while it is guided. Use no pipeline and no setting that"
                " does so (PAG, SAG, Attend-and-Excite, attention slicing), or set it before."
            )
        if calls.pipeline.scheduler is not self.scheduler:
            raise ValueError("The pipeline's scheduler was replaced while it is guided. Set it before.")
        if sample.shape[-2:] != calls.latent_size:
            height, width = self.regions_of_prompts.masks.shape[-2:]
            raise ValueError(
                f"The layout was made for pictures of {height} x {width} pixels (height x width), whose latents are"
                f" {' x '.join(map(str, calls.latent_size))}, but these are {sample.shape[-2]} x {sample.shape[-1]}."
                " Pass the `height` and `width` of the pictures; one that is drawn in parts cannot be guided."
            )
        if self.repeats_of is None or not self.repeats_of.holds(prompt_embeds):
            repeats = calls.images_per_prompt(prompt_embeds)
            if repeats is None or len(sample) != len(prompt_embeds):
                raise ValueError(
                    f"The UNet was called with {len(sample)} samples and {len(prompt_embeds)} prompt embeddings,"
                    " expected those of the prompts, alone or behind as many negative ones. Call the pipeline with the"
                    " embeddings that were made for it, unchanged; one that batches otherwise (InstructPix2Pix,"
                    " AnimateDiff) cannot be guided."
                )
            self.repeats_of = None if prompt_embeds.is_inference() else Stamp(prompt_embeds)
            if len(self.regions.masks) != repeats * len(self.regions_of_prompts.masks):
                self.regions = self.regions_of_prompts.repeated(repeats)
                self.maps_by_shape.clear()

    def _with_own_words(self, prompt_embeds: torch.Tensor) -> torch.Tensor:
        """`(batch, T, dim)` with the words of every region as they are in its own prompt, conditional samples only."""
        if not Stamp.possible(prompt_embeds):
            return self._replaced(prompt_embeds)
        kept = self.own_words_kept
        if kept is None or not kept[0].holds(prompt_embeds):
            self.own_words_kept = kept = Stamp(prompt_embeds), self._replaced(prompt_embeds)
        return kept[1]

    def _replaced(self, prompt_embeds: torch.Tensor) -> torch.Tensor:
        assert self.regions is not None and self.regions.prompts is not None
        prompts, tokens = self.regions.prompts, self.regions.tokens
        prompt_embeds = prompt_embeds.clone()
        for region in range(tokens.shape[1]):
            own = prompts.embeds[:, region][prompts.tokens[:, region]]  # row by row, as many as the prompt has
            prompt_embeds[-len(tokens) :][tokens[:, region]] = own.to(prompt_embeds)
        return prompt_embeds

    def _check_length(self, prompt_embeds: torch.Tensor) -> None:
        assert self.regions is not None
        if prompt_embeds.shape[1] != self.regions.tokens.shape[2]:
            raise ValueError(
                f"The UNet was called with prompt embeddings of {prompt_embeds.shape[1]} tokens, expected"
                f" {self.regions.tokens.shape[2]}, the length of `regions.tokens`."
            )

    def _region_call(
        self, sample: torch.Tensor, timestep: torch.Tensor, prompt_embeds: torch.Tensor
    ) -> RegionCall | None:
        height, width = sample.shape[-2:]
        sizes = {h * w: (h, w) for h, w in _level_sizes(height, width, self.num_levels)}
        if self.recorder is not None:
            self.recorder.start_call()
        if not self._is_guided(timestep):
            recorder = self.recorder
            return None if recorder is None else RegionCall(recorder.batch, sizes, recorder=recorder)

        if self.calls is not None:
            self._check_call(self.calls, sample, prompt_embeds)
        assert self.regions is not None
        batch = self.regions.masks.shape[0]
        if sample.shape[0] not in (batch, 2 * batch):
            raise ValueError(
                f"The UNet was called with a batch of {sample.shape[0]}, expected {batch} (one sample per image of"
                f" `regions`) or {2 * batch} (with classifier-free guidance)."
            )
        key = (sample.shape[-2:], sample.device)
        if key not in self.maps_by_shape:
            with torch.autocast(sample.device.type, enabled=False):
                self.maps_by_shape[key] = {h * w: self._maps_at((h, w), sample.device) for h, w in sizes.values()}
        prompts = self.regions.prompts if self.appended else None
        more = None if prompts is None else prompts.embeds.flatten(1, 2).to(sample.device)
        maps, step = self.maps_by_shape[key], self._step(timestep)
        return RegionCall(
            batch, sizes, self.method, maps, step, more, self.recorder, self.kept_keys, frames=self.frames
        )

    def _is_guided(self, timestep: torch.Tensor) -> bool:
        """Whether this call is guided, decided on the host without waiting for the device where that is possible."""
        if self.regions is None or self.guidance_steps == 0:
            return False
        if self.scheduler.timesteps is not self.timesteps_of_run:  # `set_timesteps` makes new ones
            self.timesteps_of_run, self.first_timestep = self.scheduler.timesteps, timestep
        steps = getattr(self.scheduler, "num_inference_steps", None)
        if self.guidance_steps is None or (steps is not None and self.guidance_steps >= steps):
            return True
        if hasattr(self.scheduler, "step_index"):
            return _step_index(self.scheduler) < self.guidance_steps
        # DDIM, DDPM and PNDM look their coefficients up by the timestep's value and so read it from the device anyway.
        if self.last_timestep is None or timestep > self.last_timestep:  # time runs backwards: a new run
            self.first_timestep = timestep
        self.last_timestep = timestep
        timesteps = self.scheduler.timesteps.to(timestep.device)
        taken = timesteps[(timesteps > timestep) & (timesteps <= self.first_timestep)]
        return taken.unique().numel() < self.guidance_steps

    def _step(self, timestep: torch.Tensor) -> GuidanceStep:
        sigma = self._sigma(timestep)
        timesteps = self.scheduler.timesteps.to(timestep.device)
        assert self.first_timestep is not None
        self.first_timestep = torch.maximum(self.first_timestep, timestep)
        taken = timesteps <= self.first_timestep  # image-to-image begins later
        return GuidanceStep(
            sigma=sigma,
            strength=self.guidance_weight * (sigma**2).log1p(),
            progress=(taken & (timesteps > timestep)).sum() / taken.sum().clamp(min=1),
            time=timestep.float() / self.scheduler.config.num_train_timesteps,
        )

    def _sigma(self, timestep: torch.Tensor) -> torch.Tensor:
        """Noise level at `timestep`, interpolated between training timesteps, on the timestep's device."""
        if self.sigmas is None:  # EDM's timesteps count no training steps
            return self.scheduler.sigmas[self.scheduler.step_index].to(timestep.device)
        self.sigmas = self.sigmas.to(timestep.device)
        timestep = timestep.clamp(0, len(self.sigmas) - 1)
        if not timestep.is_floating_point():
            return self.sigmas.take(timestep.long())
        position = timestep.float()
        below = position.floor().long()
        above = (below + 1).clamp(max=len(self.sigmas) - 1)
        # `take`, because indexing by a scalar tensor would wait for the device
        return torch.lerp(self.sigmas.take(below), self.sigmas.take(above), position.frac())

    def _maps_at(self, size: tuple[int, int], device: torch.device) -> RegionMaps:
        regions = self.regions
        assert regions is not None
        masks = self.resize_masks(regions.masks.flatten(0, 1).to(device), size)
        masks = masks.flatten(1).unflatten(0, regions.tokens.shape[:2])  # [B, R, Q]
        tokens, kinds = regions.tokens.to(device), regions.token_kinds.to(device)
        owners = torch.full(tokens.shape[2:], -1, device=device)
        if self.appended:
            assert regions.prompts is not None
            num_regions, length = regions.prompts.tokens.shape[1:]
            numbers = torch.arange(num_regions, device=device)
            own = numbers.repeat_interleave(length)  # [R * L]
            own_tokens = regions.prompts.tokens.to(device).flatten(1)[:, None] & (own == numbers[:, None])
            tokens = torch.cat([tokens, own_tokens], dim=2)
            kinds = torch.cat([kinds, regions.prompts.token_kinds.to(device).flatten(1)], dim=1)
            owners = torch.cat([owners, own])

        inside = masks >= masks.amax(dim=-1, keepdim=True) / 2
        weights = torch.where(inside, regions.weights.to(device)[..., None] * masks, self.weight_negative)
        signed_weights = torch.full(
            (len(masks), masks.shape[2], tokens.shape[2]), -torch.inf, dtype=torch.float32, device=device
        )
        for region in range(masks.shape[1]):  # one by one: all at once would need R times the memory
            of_region = torch.where(tokens[:, region, None, :], weights[:, region, :, None], -torch.inf)
            signed_weights = torch.maximum(signed_weights, of_region)
        signed_weights = signed_weights.where(tokens.any(dim=1)[:, None, :], 0)
        inside = inside & (masks > 0)
        anywhere = inside.any(dim=1)[:, :, None]  # [B, Q, 1]
        inside_weights = signed_weights.where(anywhere, 0)
        summary = (kinds >= TokenKind.END) & (owners < 0)  # [B, K]
        hidden_summary = HIDDEN * (anywhere & summary[:, None, :])
        covered = regions.masks.amax(dim=1).mean(dim=(1, 2)).to(device)  # [B], the same at every resolution
        least = HIDDEN * (covered <= 2 / 3) - 2.0
        held_back_summary = hidden_summary.maximum(least[:, None, None])
        biases = (maps[:, None] for maps in (signed_weights, inside_weights, hidden_summary, held_back_summary))
        return RegionMaps(masks, inside, tokens, kinds, owners, *biases)


def _level_sizes(height: int, width: int, num_levels: int | None) -> list[tuple[int, int]]:
    """Sizes of a UNet's levels for a sample of this size: each halves the one before, odd sizes rounded up. Without
    `num_levels` down to a single cell."""
    sizes = [(height, width)]
    while sizes[-1] != (1, 1) and len(sizes) != num_levels:
        height, width = (height + 1) // 2, (width + 1) // 2
        sizes.append((height, width))
    return sizes


def _step_index(scheduler: Any) -> int:
    """0-based index of the step that a scheduler with a `step_index` is at, on the host; of a second-order step's two
    UNet calls both count as one."""
    first = getattr(scheduler, "begin_index", None) or 0
    index = first if scheduler.step_index is None else scheduler.step_index
    return (index - first) // scheduler.order
