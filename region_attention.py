"""Region guidance around a UNet: pull a subject's tokens into its region, keep them out of the others.

The context manager `region_attention` makes a UNet apply a method of `guidance_methods.py` and gives the UNet back as
it found it:

    with region_attention(pipe.unet, regions, scheduler=pipe.scheduler, resize_masks=masks_at):
        pipe(prompt)

Everything a method needs travels in the UNet's own call: the timestep gives the noise level, the sample's shape gives
the resolutions, and the batch size tells whether classifier-free guidance doubled it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from .attention_processors import (
    AttentionRecorder,
    PromptKeys,
    RegionAttnProcessor,
    RegionCall,
    RegionIPAttnProcessor,
    Stamp,
    region_processor,
)
from .guidance_methods import GuidanceMethod, RegionMaps, TokenKind, resolve_guidance_method
from .guidance_schedule import GuidanceSchedule, check_number
from .region_conditioning import RegionConditioning, RegionPrompts, make_maps
from .region_ip_adapters import PictureCall, RegionPictures, keeps_pictures
from .region_loras import RegionLoras, placed_loras
from .region_moves import RegionLook, RegionMover
from .shared_models import LoraSwitch, inside, runs_in, state_of

__all__ = ["ExpectedCalls", "RegionConditioning", "RegionPrompts", "region_attention"]
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

_OURS = (RegionAttnProcessor.__name__, RegionIPAttnProcessor.__name__)


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
    mover: RegionMover | None = None,
) -> Iterator[None]:
    """Within the context, calls of `unet` are guided by `regions`; afterwards the UNet is as it was.

    Works around any pipeline that calls a `UNet2DConditionModel` with `cross_attention_kwargs` in reach, with or
    without classifier-free guidance in one batch. A context inside another one on the same UNet replaces it for its
    duration, also with `regions=None`. Guided are the calls of the code inside, and of what it starts by
    `asyncio.to_thread` or else with a copy of its context variables; calls and contexts of other threads and tasks on
    the same UNet go their own way. A backward pass with gradient checkpointing belongs inside.

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
        mover: is shown the steps that it wants to look at. A compiled UNet shows it nothing.

    Raises:
        ValueError: a custom attention processor of the UNet would be lost, a LoRA cannot act in a region, a bad
            argument, or a batch that does not fit the regions.
        RuntimeError: another thread or task guides the UNet with this scheduler; at the end, if only others have called
            the UNet: none of these calls was guided.
    """
    context = object()
    with state_of(unet) as state:
        _check_scheduler(scheduler, state.contexts)
        nested = any(runs_in(opened) for opened, _ in state.contexts)
    if regions is None and recorder is None and not nested:
        yield
        return

    # Not `unet.set_attn_processor`, which walks the whole UNet three times
    whole = getattr(unet, "_orig_mod", unet)  # what `torch.compile` wraps
    layers = {name: module for name, module in whole.named_modules() if hasattr(type(module), "set_processor")}
    hook = _RegionHook(
        context,
        regions,
        has_attention=_levels_with_attention(unet.config) if hasattr(unet, "config") else None,
        layers=list(layers.values()),
        schedule=GuidanceSchedule(scheduler, guidance_weight, guidance_steps),
        resize_masks=resize_masks,
        method=resolve_guidance_method(guidance_method),
        weight_negative=weight_negative,
        recorder=recorder,
        calls=calls,
        mover=None if whole is not unet or getattr(unet, "_compiled_call_impl", None) is not None else mover,
    )
    _check_processors({name: layer.get_processor() for name, layer in layers.items()})
    handle = None
    try:
        with state_of(unet) as state:
            if not state.contexts:
                state.processors = [(layer, layer.get_processor()) for layer in layers.values()]
            state.contexts.append((context, scheduler))
            for layer in layers.values():
                layer.set_processor(region_processor(layer.get_processor()))
        # Prepended: of nested contexts the innermost speaks first, and the outer ones then keep silent.
        handle = unet.register_forward_pre_hook(hook, prepend=True, with_kwargs=True)
        names = () if hook.loras is None else hook.loras.names
        with inside(context), placed_loras(unet, names) as hook.lora_switch:
            yield
    finally:
        with state_of(unet) as state:
            state.contexts = [opened for opened in state.contexts if opened[0] is not context]
            if not state.contexts:  # the last one of all threads', whatever the order
                for layer, processor in state.processors:
                    layer.set_processor(processor)
                state.processors = []
        if handle is not None:
            handle.remove()
    hook.check_it_was_heard()


def _check_scheduler(scheduler: Any, contexts: Sequence[tuple[object, Any]]) -> None:
    """Two threads or tasks that step through one scheduler at once would draw nonsense."""
    if any(other is scheduler and not runs_in(context) for context, other in contexts):
        raise RuntimeError(
            f"Another thread or task guides this UNet with the same {type(scheduler).__name__}, which serves one call"
            " at a time. Give each pipeline a scheduler of its own:"
            " `pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)`."
        )


def _check_processors(processors: Mapping[str, Any]) -> None:
    for name, processor in processors.items():
        kind = type(processor).__name__
        if kind not in REPLACEABLE_PROCESSORS and not keeps_pictures(processor):
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
    """Forward pre-hook of the UNet: adds a `RegionCall` to the `cross_attention_kwargs` of calls in its context."""

    def __init__(
        self,
        context: object,
        regions: RegionConditioning | None,
        *,
        has_attention: list[bool] | None,
        layers: list[Any],
        schedule: GuidanceSchedule,
        resize_masks: Callable[[torch.Tensor, tuple[int, int]], torch.Tensor],
        method: GuidanceMethod,
        weight_negative: float,
        recorder: AttentionRecorder | None,
        calls: ExpectedCalls | None,
        mover: RegionMover | None,
    ):
        check_number("weight_negative", weight_negative)
        if not -torch.finfo(torch.float32).max <= weight_negative <= 0:
            raise ValueError(f"`weight_negative` is {weight_negative}, expected a finite number that is at most 0.")
        wants_prompts = getattr(method, "uses_region_prompts", False) and schedule.guidance_steps != 0
        if regions is not None and regions.prompts is None and wants_prompts:
            raise ValueError(
                f"The guidance method {getattr(method, '__name__', method)!r} uses the regions' own prompts, but"
                " `regions.prompts` is None. Pass `RegionPrompts`, or choose another method."
            )
        has_prompts = regions is not None and regions.prompts is not None
        self.own_words = has_prompts and getattr(method, "uses_own_words", False)
        self.regions, self.has_attention, self.layers, self.schedule = regions, has_attention, layers, schedule
        self.resize_masks, self.method, self.weight_negative = resize_masks, method, weight_negative
        self.recorder, self.calls, self.mover = recorder, calls, mover
        self.regions_of_prompts = regions
        self.guiding: RegionConditioning | None = regions
        self.guiding_now: tuple[tuple[bool, ...], ...] | None = None
        self.repeats_of: Stamp | None = None
        self.own_words_kept: tuple[Stamp, torch.Tensor] | None = None
        self.kept_keys = PromptKeys()
        self.maps_by_shape: dict[tuple[torch.Size, torch.device], _MapsOfShape] = {}
        self.loras: RegionLoras | None = None
        self.lora_switch: LoraSwitch | None = None
        self.pictures: RegionPictures | None = None
        self._hold(regions)
        self.context = context
        self.heard, self.called_by_others = False, False

    def _hold(self, regions: RegionConditioning | None) -> None:
        """Make ready what regions hold beside words; unlike words it acts at every step."""
        if regions is not None and regions.loras:
            self.loras = RegionLoras(regions.loras, regions.masks, regions.tokens, self.resize_masks)
        if regions is not None and regions.ip_adapter_images:
            self.pictures = RegionPictures(regions.ip_adapter_images, regions.masks)

    def check_it_was_heard(self) -> None:
        """Raise if only others have called the UNet."""
        if self.called_by_others and not self.heard:
            raise RuntimeError(
                "The UNet was guided in one thread and called in another one, where nothing was guided. Call the"
                " pipeline in the thread that opened the context, or through `asyncio.to_thread` or"
                " `contextvars.copy_context().run`."
            )

    @torch.compiler.disable
    def __call__(self, unet: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict]:
        if not runs_in(self.context):
            self.called_by_others = True
            return args, kwargs
        self.heard = True
        call_kwargs = dict(kwargs.get("cross_attention_kwargs") or {})
        if "regions" in call_kwargs:  # a context inside this one has spoken
            return args, kwargs
        sample = args[0] if args else kwargs["sample"]
        timestep = torch.as_tensor(args[1] if len(args) > 1 else kwargs["timestep"])
        prompt_embeds = args[2] if len(args) > 2 else kwargs["encoder_hidden_states"]
        pictures = None
        if self.calls is not None and (self.loras is not None or self.pictures is not None):
            self._check_call(self.calls, sample, prompt_embeds)
        if self.pictures is not None:
            added = kwargs.get("added_cond_kwargs")
            added, pictures = self.pictures.add_to(unet, added, sample, self._sizes(sample))
            kwargs = {**kwargs, "added_cond_kwargs": added}
        call = self._region_call(sample, timestep.reshape(-1)[0], prompt_embeds, pictures)
        call_kwargs["regions"] = call
        self._tell_loras(call, sample, call_kwargs.get("scale", 1.0))
        if call is not None and call.maps is not None:
            self._check_length(prompt_embeds)
            if self.own_words:
                prompt_embeds = self._with_own_words(prompt_embeds)
                if len(args) > 2:
                    args = (*args[:2], prompt_embeds, *args[3:])
                else:
                    kwargs = {**kwargs, "encoder_hidden_states": prompt_embeds}
        return args, {**kwargs, "cross_attention_kwargs": call_kwargs}

    def _sizes(self, sample: torch.Tensor, *, of_attention: bool = True) -> dict[int, tuple[int, int]]:
        """Places -> `(h, w)` of the UNet's levels: of those with attention, or of all."""
        levels = self.has_attention
        if levels is not None and not of_attention:
            levels = [True] * len(levels)
        height, width = sample.shape[-2:]
        return {h * w: (h, w) for h, w in _level_sizes(height, width, levels)}

    def _tell_loras(self, call: RegionCall | None, sample: torch.Tensor, scale: float) -> None:
        assert self.lora_switch is not None
        if self.loras is None:
            self.lora_switch.set(None)
            return
        owners = None if call is None or call.maps is None else next(iter(call.maps.values())).owners
        sizes = self._sizes(sample, of_attention=False).values()
        where = self.loras.call(sizes, len(sample), sample.device, owners)
        self.lora_switch.set(replace(where, scale=scale, waiting={}))

    def _check_call(self, calls: ExpectedCalls, sample: torch.Tensor, prompt_embeds: torch.Tensor) -> None:
        """Raise if this call is not one that can be guided, and adapt to its number of pictures per prompt."""
        assert self.regions is not None and self.regions_of_prompts is not None
        if any(type(layer.processor).__name__ not in _OURS for layer in self.layers):
            raise ValueError(
                "The UNet's attention processors were replaced while it is guided. Use no pipeline and no setting that"
                " does so (PAG, SAG, Attend-and-Excite, attention slicing), or set it before."
            )
        if calls.pipeline.scheduler is not self.schedule.scheduler:
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
                self._take(self.regions_of_prompts.repeated(repeats))

    def _with_own_words(self, prompt_embeds: torch.Tensor) -> torch.Tensor:
        """`(batch, T, dim)` with the words of every region as they are in its own prompt, and at places of the padding
        its end, conditional samples only."""
        if not Stamp.possible(prompt_embeds):
            return self._replaced(prompt_embeds)
        kept = self.own_words_kept
        if kept is None or not kept[0].holds(prompt_embeds):
            self.own_words_kept = kept = Stamp(prompt_embeds), self._replaced(prompt_embeds)
        return kept[1]

    def _replaced(self, prompt_embeds: torch.Tensor) -> torch.Tensor:
        assert self.guiding is not None and self.guiding.prompts is not None
        prompts, tokens = self.guiding.prompts, self.guiding.tokens
        prompt_embeds = prompt_embeds.clone()
        for region in range(tokens.shape[1]):
            named = prompts.tokens[:, region] & tokens[:, region].any(dim=1, keepdim=True)  # none of an absent region
            own = prompts.embeds[:, region][named]  # row by row, as many as the prompt has
            prompt_embeds[-len(tokens) :][tokens[:, region]] = own.to(prompt_embeds)
        images, of_image, places = self.guiding.own_summaries(self.method)
        ends = (prompts.token_kinds[images, of_image] == TokenKind.END).int().argmax(dim=1)
        prompt_embeds[-len(tokens) :][images, places] = prompts.embeds[images, of_image, ends].to(prompt_embeds)
        return prompt_embeds

    def _take(self, regions: RegionConditioning) -> None:
        """Guide by other regions than before: nothing is kept of what was made of those."""
        self.regions = self.guiding = regions
        self.guiding_now = None
        self._forget()
        self._hold(regions)

    def _forget(self) -> None:
        self.maps_by_shape.clear()
        self.own_words_kept = None

    def _choose_guiding(self, timestep: torch.Tensor) -> bool:
        """Take the regions that guide at this step, the others as absent; False if none does."""
        assert self.regions is not None
        if not self.regions.times:
            return True
        now = self.regions.guiding(self.schedule.progress(timestep))
        if now != self.guiding_now:
            assert now is not None
            self.guiding, self.guiding_now = self.regions.restricted(now), now
            self._forget()
        return any(any(row) for row in now or ())

    def _check_length(self, prompt_embeds: torch.Tensor) -> None:
        assert self.regions is not None
        if prompt_embeds.shape[1] != self.regions.tokens.shape[2]:
            raise ValueError(
                f"The UNet was called with prompt embeddings of {prompt_embeds.shape[1]} tokens, expected"
                f" {self.regions.tokens.shape[2]}, the length of `regions.tokens`."
            )

    def _region_call(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        prompt_embeds: torch.Tensor,
        pictures: PictureCall | None,
    ) -> RegionCall | None:
        sizes = self._sizes(sample)
        if self.recorder is not None:
            self.recorder.start_call()
        if self.regions is None or not self.schedule.is_guided(timestep):
            return self._unguided_call(sample, sizes, pictures)

        if self.calls is not None:
            self._check_call(self.calls, sample, prompt_embeds)
        batch = self.regions.masks.shape[0]
        if sample.shape[0] not in (batch, 2 * batch):
            raise ValueError(
                f"The UNet was called with a batch of {sample.shape[0]}, expected {batch} (one sample per image of"
                f" `regions`) or {2 * batch} (with classifier-free guidance)."
            )
        if not self._choose_guiding(timestep):
            return self._unguided_call(sample, sizes, pictures)
        assert self.guiding is not None
        device, regions = sample.device, self.guiding
        key = (sample.shape[-2:], device)
        if key not in self.maps_by_shape:
            with torch.autocast(device.type, enabled=False):
                options = {"resize_masks": self.resize_masks, "weight_negative": self.weight_negative}
                maps = {
                    h * w: make_maps(regions, self.method, (h, w), device, **options)  # type: ignore[arg-type]
                    for h, w in sizes.values()
                }
            self.maps_by_shape[key] = _MapsOfShape(maps, {})
        of_shape, own, negatives = self.maps_by_shape[key], regions.appended(self.method), regions.negatives
        return RegionCall(
            batch,
            sizes,
            self.method,
            of_shape.maps,
            self.schedule.step(timestep),
            None if own is None else own.embeds.flatten(1, 2).to(device),
            None if negatives is None or len(sample) == batch else negatives.embeds.flatten(1, 2).to(device),
            recorder=self.recorder,
            pictures=pictures,
            look=self._look(of_shape.maps, sizes),
            kept_keys=self.kept_keys,
            frames=of_shape.frames,
        )

    def _look(self, maps: Mapping[int, RegionMaps], sizes: Mapping[int, tuple[int, int]]) -> RegionLook | None:
        if self.mover is None or not self.mover.looks_at():
            return None
        return self.mover.look([*maps.values()], [*sizes.values()])

    def _unguided_call(
        self, sample: torch.Tensor, sizes: Mapping[int, tuple[int, int]], pictures: PictureCall | None
    ) -> RegionCall | None:
        if self.recorder is None and pictures is None:
            return None
        batch = len(sample) if self.recorder is None else self.recorder.batch
        return RegionCall(batch, sizes, recorder=self.recorder, pictures=pictures)


@dataclass(frozen=True, eq=False)
class _MapsOfShape:
    """Of one shape of samples: the regions' maps by number of queries, and what layers keep that depends on them."""

    maps: dict[int, RegionMaps]
    frames: dict[tuple[Any, ...], torch.Tensor]


def _levels_with_attention(config: Any) -> list[bool]:
    """For each of a UNet's levels whether its blocks attend; SDXL's first, where maps would be largest, does not."""
    kinds = zip(config.down_block_types, reversed(config.up_block_types), strict=True)
    *levels, _ = ("Attn" in down or "Attn" in up for down, up in kinds)
    return [*levels, True]  # the block in the middle is of the last one


def _level_sizes(height: int, width: int, has_attention: list[bool] | None) -> list[tuple[int, int]]:
    """Sizes of a UNet's levels that attend, for a sample of this size: each level halves the one before, odd sizes
    rounded up. Without `has_attention` all, down to a single cell."""
    sizes = [(height, width)]
    while sizes[-1] != (1, 1) if has_attention is None else len(sizes) < len(has_attention):
        height, width = (height + 1) // 2, (width + 1) // 2
        sizes.append((height, width))
    return (
        sizes
        if has_attention is None
        else [size for size, attends in zip(sizes, has_attention, strict=True) if attends]
    )
