"""LoRAs that act where regions are, all of them in one call of the model.

diffusers loads a LoRA as peft layers: beside a layer, `lora_B(lora_A(x)) * scaling` is added to what it gives. Both are
linear and work place by place, or token by token, so that a factor between them says where a LoRA acts: a region's mask
at the layer's resolution, or which tokens are the region's. It takes the place of the product with `scaling`: a LoRA in
its region costs no more operations than the same LoRA everywhere.

`placed_loras` makes a model's layers ask where LoRAs act; `LoraCall` tells them, call by call. peft's own state (active
adapters, scales) is read and never changed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .shared_models import LoraSwitch, state_of

__multisubject_version__ = "0.1.0"

PLACES, TOKENS, TIME = "places", "tokens", "time"
"""What a layer's rows are: places of the picture, tokens of the prompt, or one for the whole picture."""

Scales = Sequence[Sequence[Mapping[str, float] | None]]
"""For each image and region the LoRAs that it holds -> scale."""


@dataclass(frozen=True, eq=False)
class LoraCall:
    """Where LoRAs act in one call of a model with N samples.

    Args:
        names: the LoRAs that act where this says, and nowhere else; others act as peft has them set.
        samples: N.
        tokens: LoRA -> `(N, T)` float32, its factor at each token; LoRAs that are left out act at none.
        places: number of places h * w of a layer -> LoRA -> `(N, h * w)` float32, its factor at each place.
        scale: of `cross_attention_kwargs`, for LoRAs that are not active: peft knows it for active ones alone.
        kept: factors in the forms in which layers have asked for them.
        waiting: of a residual block's time embedding, what is to be added by place where the block adds the rest.
    """

    names: Collection[str]
    samples: int
    tokens: Mapping[str, torch.Tensor] = field(default_factory=dict)
    places: Mapping[int, Mapping[str, torch.Tensor]] = field(default_factory=dict)
    scale: float = 1.0
    kept: dict[tuple[Any, ...], torch.Tensor] = field(default_factory=dict)
    waiting: dict[nn.Module, list[tuple[str, torch.Tensor]]] = field(default_factory=dict)

    def factor(self, name: str, rows: str, states: torch.Tensor, scaling: float = 1.0) -> torch.Tensor:
        """What to multiply `states` with: 1 channel, `scaling` included.

        Args:
            name: the LoRA.
            rows: `PLACES` or `TOKENS`.
            states: `(N, channels, h, w)`, `(N, rows, channels)` or `(N * rows, channels)`.
            scaling: of the LoRA in this layer.
        """
        channels = states.shape[1 if states.ndim == 4 else -1]
        count = states.numel() // (channels * self.samples)
        if rows == TOKENS:
            factors = self.tokens[name]
        else:
            if count not in self.places:
                raise ValueError(
                    f"A LoRA layer has {count} places, expected one of {list(self.places)} for this sample's shape."
                    " LoRAs in regions need a UNet that halves its sample from level to level."
                )
            factors = self.places[count][name]
        if torch.compiler.is_compiling():
            return _as_factor(factors, count, states, scaling)
        form = name, rows, count, states.ndim, scaling, states.dtype
        if form not in self.kept:
            self.kept[form] = _as_factor(factors, count, states, scaling)
        return self.kept[form]


def _as_factor(factors: torch.Tensor, count: int, states: torch.Tensor, scaling: float) -> torch.Tensor:
    factors = F.pad(factors, (0, count - factors.shape[1])) * scaling  # guided keys have fillers behind the tokens
    shape = (len(factors), 1, *states.shape[2:]) if states.ndim == 4 else (*states.shape[:-1], 1)
    return factors.to(states.device, states.dtype).view(shape)


class RegionLoras:
    """Where the LoRAs of regions act in a UNet, for B images with up to R regions and T tokens each.

    Args:
        loras: the LoRAs of each image and region.
        masks: `(B, R, H, W)` in [0, 1].
        tokens: `(B, R, T)` bool, each region's tokens in the prompt.
        resize_masks: as for `region_attention`.
    """

    def __init__(
        self,
        loras: Scales,
        masks: torch.Tensor,
        tokens: torch.Tensor,
        resize_masks: Callable[[torch.Tensor, tuple[int, int]], torch.Tensor],
    ):
        self.names = lora_names(loras)
        self._loras, self._masks, self._tokens, self._resize_masks = loras, masks, tokens, resize_masks
        self._calls: dict[tuple[Any, ...], LoraCall] = {}

    def call(
        self, sizes: Collection[tuple[int, int]], samples: int, device: torch.device, owners: torch.Tensor | None
    ) -> LoraCall:
        """Of one UNet call.

        Args:
            sizes: `(h, w)` of the UNet's levels.
            samples: of the call, B or, with unconditional ones before, a multiple.
            device: of the factors.
            owners: `(B, K)`, the region whose own prompt a key of cross-attention is of, -1 for the shared prompt's;
                None: all are.

        Raises:
            ValueError: another number of samples.
        """
        batch = len(self._masks)
        if samples % batch:
            raise ValueError(
                f"The UNet was called with a batch of {samples}, expected a multiple of {batch}: one sample per image"
                " of `regions`, with or without unconditional ones before."
            )
        form = (*sizes, samples, device, None if owners is None else owners.shape[1])
        if form not in self._calls:
            times = samples // batch
            # By place in every sample. The unconditional ones have none of the regions' tokens.
            places = {
                h * w: {name: at.repeat(times, 1) for name, at in self._at_places((h, w), device).items()}
                for h, w in sizes
            }
            tokens = {
                name: F.pad(at, (0, 0, samples - batch, 0)) for name, at in self._at_tokens(owners, device).items()
            }
            self._calls[form] = LoraCall(self.names, samples, tokens, places)
        return self._calls[form]

    def _at_places(self, size: tuple[int, int], device: torch.device) -> dict[str, torch.Tensor]:
        batch, regions = self._masks.shape[:2]
        masks = self._resize_masks(self._masks.flatten(0, 1).to(device), size)
        return joined_scales(self._loras, masks.view(batch, regions, -1))

    def _at_tokens(self, owners: torch.Tensor | None, device: torch.device) -> dict[str, torch.Tensor]:
        regions, length = self._tokens.shape[1:]
        tokens = self._tokens.to(device)
        if owners is not None:
            own = owners.to(device)[:, None] == torch.arange(regions, device=device)[:, None]  # [B, R, K]
            tokens = own.logical_or(F.pad(tokens, (0, own.shape[2] - length)))
        return joined_scales(self._loras, tokens.float())


def lora_names(loras: Scales) -> tuple[str, ...]:
    """Every LoRA that a region holds, once, in the order of the regions."""
    return tuple(dict.fromkeys(name for of_image in loras for held in of_image for name in held or ()))


def joined_scales(loras: Scales, shares: torch.Tensor) -> dict[str, torch.Tensor]:
    """LoRA -> `(B, N)`, its scale at each of N places or tokens.

    Args:
        loras: the LoRAs of each image and region.
        shares: `(B, R, N)` float32 in [0, 1], what each region has of a place. Where regions with one LoRA overlap,
            it counts once: their shares are of 1 at most, together.
    """
    joined = {}
    for name in lora_names(loras):
        scales = shares.new_tensor([[(held or {}).get(name, 0.0) for held in of_image] for of_image in loras])
        holds = shares.new_tensor([[name in (held or {}) for held in of_image] for of_image in loras])
        summed, together = ((which[:, None] @ shares).squeeze(1) for which in (scales, holds))
        joined[name] = summed / together.clamp(min=1)
    return joined


# --- the model's layers ----------------------------------------------------------------------------------------------


@contextmanager
def placed_loras(model: Any, names: Collection[str]) -> Iterator[LoraSwitch]:
    """Within the context, the layers of a model ask at each call where these LoRAs act.

    What is set with `LoraSwitch.set` holds for the calls of the code inside; without, and for other threads and tasks,
    LoRAs act as peft has them set. Contexts on one model may be nested, and open and close in any order.

    Args:
        model: a UNet or text encoder, compiled or not.
        names: the LoRAs that are going to be set; those that the model does not have are left out.

    Raises:
        ValueError: one of them cannot act by place.
    """
    whole = getattr(model, "_orig_mod", model)  # what `torch.compile` wraps
    layers = _lora_layers(whole, names)
    with state_of(model) as state:
        state.lora_users += 1
        for layer, rows, block in layers:
            if layer not in state.forwards:
                _exchange(state.forwards, layer, _placed_forward(layer, rows, block, state.loras))
            if rows == TIME and block.norm2 not in state.forwards:
                _exchange(state.forwards, block.norm2, _forward_with_waiting(block, state.loras))
        switch = state.loras
    before = switch.get()
    try:
        yield switch
    finally:
        switch.set(before)
        with state_of(model) as state:
            state.lora_users -= 1
            if not state.lora_users:
                for module, forward in state.forwards.items():
                    del module.forward
                    if forward is not None:
                        module.forward = forward
                state.forwards.clear()


def _exchange(forwards: dict[nn.Module, Any], module: nn.Module, forward: Callable[..., torch.Tensor]) -> None:
    forwards[module] = vars(module).get("forward")  # mostly none of its own
    module.forward = forward


def check_loras(models: Sequence[Any], holders: Mapping[str, str]) -> None:
    """Raise `ValueError` unless one of these models has loaded every LoRA.

    Args:
        models: UNet and text encoders.
        holders: name of a LoRA -> what to call the region that holds it.
    """
    loaded = list(dict.fromkeys(name for model in models for name in getattr(model, "peft_config", None) or ()))
    for name, region in holders.items():
        if name not in loaded:
            raise ValueError(
                f"{region} has the LoRA {name!r}, but loaded are {loaded or 'none'}. Load it with"
                f" `pipe.load_lora_weights(…, adapter_name={name!r})`; one that is fused into the weights must be"
                " loaded again after `pipe.unfuse_lora()`."
            )


def _lora_layers(model: Any, names: Collection[str]) -> list[tuple[Any, str, Any]]:
    """The peft layers of a model that have one of these LoRAs, what their rows are, and the block that they are in."""
    configs = getattr(model, "peft_config", None) or {}
    wanted = [name for name in names if name in configs]
    for name in wanted:
        kind = str(getattr(configs[name].peft_type, "value", configs[name].peft_type))
        if kind != "LORA":
            raise ValueError(
                f"The adapter {name!r} of a region is of the kind {kind}, expected a LoRA: others cannot act in a part"
                " of the picture. Leave it out of the layout to use it everywhere."
            )
    if not wanted:
        return []
    modules = dict(model.named_modules())
    layers = []
    for path, layer in modules.items():
        held = [name for name in wanted if name in getattr(layer, "lora_A", ())]
        held += [name for name in wanted if name in getattr(layer, "lora_embedding_A", ())]
        if held:
            rows, block = _rows_of(path, layer, modules)
            for name in held:
                _check_layer(path, layer, name, rows)
            assert rows is not None
            layers.append((layer, rows, block))
    return layers


def _rows_of(path: str, layer: Any, modules: Mapping[str, Any]) -> tuple[str | None, Any]:
    """What a layer's rows are, None for what cannot be told, and the block that it is in."""
    parent, _, name = path.rpartition(".")
    block = modules.get(parent)
    if not hasattr(modules[""], "time_embedding"):  # a text encoder
        return (None if name == "text_projection" else TOKENS), block  # which makes the pooled embedding
    if name == "time_emb_proj":
        return (TIME if getattr(block, "time_embedding_norm", None) == "default" else None), block
    if path.split(".")[0] in ("time_embedding", "add_embedding", "class_embedding", "encoder_hid_proj"):
        return None, block
    if name in ("to_k", "to_v") and getattr(block, "is_cross_attention", False):
        return TOKENS, block
    return PLACES, block


def _check_layer(path: str, layer: Any, name: str, rows: str | None) -> None:
    variant = getattr(layer, "lora_variant", {}).get(name)
    if variant is not None or getattr(layer, "use_dora", {}).get(name):
        kind = type(variant).__name__ if variant is not None else "DoRA"
        raise ValueError(
            f"The LoRA {name!r} of a region is none that adds to what a layer gives ({kind} at {path}): it cannot act"
            " in a region alone. Leave it out of the layout to use it everywhere."
        )
    if rows is None or name in getattr(layer, "lora_embedding_A", ()):
        raise ValueError(
            f"The LoRA {name!r} of a region changes {path}, which acts on the whole picture or prompt: it cannot act in"
            " a region alone. Leave it out of the layout to use it everywhere."
        )
    if name in layer.merged_adapters:
        raise ValueError(
            f"The LoRA {name!r} of a region is fused into the weights, which are everywhere. Call"
            " `pipe.unfuse_lora()` first."
        )
    if layer.disable_adapters:
        raise ValueError(
            f"The LoRA {name!r} of a region is switched off with all others. Call `pipe.enable_lora()` first, or leave"
            " it out of the layout."
        )


def _placed_forward(layer: Any, rows: str, block: Any, switch: LoraSwitch) -> Callable[..., torch.Tensor]:
    """A peft layer's `forward`, in which LoRAs act where the model's `LoraCall` says."""
    original = layer.forward

    def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        call = switch.get()
        names = [] if call is None else [name for name in call.names if name in layer.lora_A]
        if call is None or not names:
            return original(x, *args, **kwargs)
        result = _without(layer, names, original, x, args, kwargs)
        dtype = result.dtype
        for name in names:
            lora_A, lora_B = layer.lora_A[name], layer.lora_B[name]
            scaling = layer.scaling[name] * (1 if name in layer.active_adapters else call.scale)
            if scaling == 0 or (rows == TOKENS and name not in call.tokens):
                continue
            states = lora_A(layer.lora_dropout[name](x.to(lora_A.weight.dtype)))
            if rows == TIME:
                call.waiting.setdefault(block, []).append((name, lora_B(states) * scaling))
            elif lora_B.bias is not None:  # which belongs where the LoRA acts
                change = lora_B(states)
                result = result + change * call.factor(name, rows, change, scaling)
            else:
                result = result + lora_B(states * call.factor(name, rows, states, scaling))
        return result.to(dtype)

    return forward


def _without(
    layer: Any, names: Collection[str], original: Callable[..., torch.Tensor], x: torch.Tensor, args: Any, kwargs: Any
) -> torch.Tensor:
    """What a peft layer gives without these LoRAs."""
    others = [name for name in layer.active_adapters if name not in names and name in layer.lora_A]
    if layer.merged or not others:
        return layer.base_layer(x, *args, **kwargs)
    twin = copy.copy(layer)  # with the same weights and scales; the layer itself may be in use by another thread
    twin._active_adapter = others
    return type(layer).forward(twin, x, *args, **kwargs)


def _forward_with_waiting(block: Any, switch: LoraSwitch) -> Callable[..., torch.Tensor]:
    """The `forward` of a residual block's second norm: to what it gets, the block has added the time embedding for the
    whole picture; what LoRAs change of it is added here, by place."""
    original = block.norm2.forward

    def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        call = switch.get()
        if call is not None:
            for name, change in call.waiting.pop(block, ()):
                factor = call.factor(name, PLACES, x)
                x = torch.addcmul(x, change.to(x.dtype)[:, :, None, None], factor)
        return original(x, *args, **kwargs)

    return forward
