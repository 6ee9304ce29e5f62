"""What one attention layer does in a guided call of a UNet: it asks a guidance method for a bias, and attends with it.

`RegionAttnProcessor` is stateless: all it needs comes in a `RegionCall`, which `region_attention` puts into the UNet's
`cross_attention_kwargs` at every call. What may be kept from call to call is kept there as well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import nn

from .guidance_methods import AttentionLayer, GuidanceMethod, GuidanceStep, KeyMoments, RegionMaps
from .region_ip_adapters import PictureCall, SharedWeights, add_pictures, keeps_pictures
from .region_moves import RegionLook

__multisubject_version__ = "0.1.0"


class AttentionRecorder:
    """Collects where chosen tokens are attended to, one map per UNet call (conditional samples only).

    Args:
        tokens: `(B, S, K)` bool: for each image, S groups of tokens of its prompt and of its regions' own prompts.
        num_tokens: how many of the K are the prompt's (None: all). A map is the mean over a group's tokens there; what
            regions' own words for the same receive, on average, is added to it.
    """

    def __init__(self, tokens: torch.Tensor, num_tokens: int | None = None):
        self.batch = tokens.shape[0]
        num_tokens = tokens.shape[-1] if num_tokens is None else num_tokens
        parts = tokens.float().split([num_tokens, tokens.shape[-1] - num_tokens], dim=-1)
        self._token_weights = torch.cat([part / part.sum(dim=-1, keepdim=True).clamp(min=1) for part in parts], dim=-1)
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


_KeysAndMoments = tuple[torch.Tensor, KeyMoments | None]


class PromptKeys:
    """Keeps every layer's keys of the prompt while the UNet is called with the same prompt embeddings, step after step.

    Values are not kept: they would need as much memory again, which counts where seventy layers read the prompt, and
    cost little to project anew. Only plain linear projections are trusted to give the same again: not LoRA layers,
    whose scale a callback may change, and not modules with hooks or a `forward` of their own, which do more than their
    weights say (offloading).
    """

    def __init__(self) -> None:
        self._context: tuple[Stamp, torch.Tensor] | None = None
        self._keys: dict[Attention, tuple[Stamp, _KeysAndMoments]] = {}

    def of(self, attn: Attention, prompt_embeds: torch.Tensor, regions: RegionCall) -> LayerKeys:
        """This layer's keys and values: of the prompt `(batch, T, dim)` and of the regions' own prompts."""
        own_tokens = 0 if regions.region_prompts is None else regions.region_prompts.shape[1]
        num_tokens = prompt_embeds.shape[1] + own_tokens
        context = self._context_of(attn, prompt_embeds, regions)
        key, moments = self._keys_of(attn, prompt_embeds, lambda: _prompt_keys(attn, context, num_tokens, regions))
        return LayerKeys(key, _projected(attn, attn.to_v, context), num_tokens, moments)

    def _context_of(self, attn: Attention, prompt_embeds: torch.Tensor, regions: RegionCall) -> torch.Tensor:
        if attn.norm_cross is not None or not Stamp.possible(prompt_embeds):
            return _prompt_context(attn, prompt_embeds, regions)
        kept = self._context
        if kept is None or not kept[0].holds(prompt_embeds):
            self._context = kept = Stamp(prompt_embeds), _prompt_context(attn, prompt_embeds, regions)
        return kept[1]

    def _keys_of(
        self, attn: Attention, prompt_embeds: torch.Tensor, make: Callable[[], _KeysAndMoments]
    ) -> _KeysAndMoments:
        if not _is_plain_linear(attn.to_k):
            return make()
        made_from = prompt_embeds, attn.to_k.weight
        if not Stamp.possible(*made_from):
            return make()
        kept = self._keys.get(attn)
        if kept is None or not kept[0].holds(*made_from):
            self._keys[attn] = kept = Stamp(*made_from), make()
        return kept[1]


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
        region_prompts: `(B, N, dim)`, more tokens for cross-attention, of the regions' own prompts.
        region_negatives: `(B, M, dim)`, the same for the unconditional samples.
        recorder: collects attention maps, if wanted.
        pictures: where the regions' reference pictures are, if they hold any.
        look: collects where the regions' objects are, if they are to be moved after this call.
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
    region_negatives: torch.Tensor | None = None
    recorder: AttentionRecorder | None = None
    pictures: PictureCall | None = None
    look: RegionLook | None = None
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

        output, _ = self._attended(attn, hidden_states, encoder_hidden_states, attention_mask, regions)
        return self._projected_back(attn, output, hidden_states)

    def _attended(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        regions: RegionCall,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the layer attends to, `(batch, Q, heads * head_dim)`, and its queries `(batch, heads, Q, head_dim)`."""
        # 1. Project to queries, keys and values
        is_cross = encoder_hidden_states is not None
        query = _projected(attn, attn.to_q, hidden_states)
        if attn.norm_q is not None:
            query = attn.norm_q(query)
        if encoder_hidden_states is None:
            value = _projected(attn, attn.to_v, hidden_states)
            keys = LayerKeys(_key(attn, hidden_states), value, hidden_states.shape[1])
        else:
            keys = regions.kept_keys.of(attn, encoder_hidden_states, regions)
        key, value = keys.key, keys.value

        # 2. Ask the guidance method for its bias
        if regions.look is not None:
            _look_at(regions, query, keys, attn.scale, is_cross)
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
        return output.transpose(1, 2).flatten(2).to(query.dtype), query

    @staticmethod
    def _projected_back(attn: Attention, output: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        output = attn.to_out[1](attn.to_out[0](output))
        if attn.residual_connection:
            output = output + hidden_states
        return output if attn.rescale_output_factor == 1 else output / attn.rescale_output_factor


class RegionIPAttnProcessor(RegionAttnProcessor, SharedWeights):
    """The same for a layer with IP-Adapters. Stateless but for their weights and scales, which are diffusers' own.

    Args:
        original: diffusers' processor of the layer. Without `regions` it is that one, bit for bit.
    """

    def __init__(self, original: Any):
        SharedWeights.__init__(self, original)

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: Any = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
        *args: Any,
        ip_adapter_masks: Any = None,
        regions: RegionCall | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """As `RegionAttnProcessor`; `encoder_hidden_states` has the adapters' pictures behind the prompt."""
        if regions is None or not isinstance(encoder_hidden_states, tuple):
            return self.as_in_diffusers(
                attn, hidden_states, encoder_hidden_states, attention_mask, temb, ip_adapter_masks=ip_adapter_masks
            )
        prompt_embeds, pictures = encoder_hidden_states
        output, query = self._attended(attn, hidden_states, prompt_embeds, attention_mask, regions)
        output = add_pictures(self, attn, query, output, pictures, ip_adapter_masks, regions.pictures)
        return self._projected_back(attn, output, hidden_states)


def region_processor(processor: Any) -> RegionAttnProcessor:
    """What takes the place of a layer's processor while its UNet is guided."""
    return RegionIPAttnProcessor(processor) if keeps_pictures(processor) else RegionAttnProcessor()


def _prompt_context(attn: Attention, prompt_embeds: torch.Tensor, regions: RegionCall) -> torch.Tensor:
    """What a cross-attention layer makes keys and values of: the prompt `(batch, T, dim)`, the regions' own prompts.

    Biased attention is fastest where the number of keys is a multiple of 8 (on a CPU with AVX-512 it is also faster
    than unbiased attention to the usual 77), so that a guided call gets fillers behind its tokens.
    """
    own, negatives = regions.region_prompts, regions.region_negatives
    if own is not None or negatives is not None:  # each half of the batch has its own, or zeros that it does not see
        rest = len(prompt_embeds) - regions.batch
        length = max(0 if part is None else part.shape[1] for part in (own, negatives))
        more = prompt_embeds.new_zeros(len(prompt_embeds), length, prompt_embeds.shape[2])
        if own is not None:
            more[rest:, : own.shape[1]] = own
        if negatives is not None:
            more[:rest, : negatives.shape[1]] = negatives
        prompt_embeds = torch.cat([prompt_embeds, more], dim=1)
    if attn.norm_cross is not None:
        prompt_embeds = attn.norm_encoder_hidden_states(prompt_embeds)
    return prompt_embeds if regions.method is None else F.pad(prompt_embeds, (0, 0, 0, -prompt_embeds.shape[1] % 8))


def _prompt_keys(attn: Attention, context: torch.Tensor, num_tokens: int, regions: RegionCall) -> _KeysAndMoments:
    key = _key(attn, context)
    if regions.method is None:
        return key, None
    absent = next(iter(regions.maps.values())).absent if regions.maps else None
    return key, KeyMoments(key[-regions.batch :, :, :num_tokens], absent)


def _key(attn: Attention, context: torch.Tensor) -> torch.Tensor:
    key = _projected(attn, attn.to_k, context)
    return key if attn.norm_k is None else attn.norm_k(key)


def _projected(attn: Attention, projection: nn.Module, states: torch.Tensor) -> torch.Tensor:
    """`(batch, tokens, dim)` -> `(batch, heads, tokens, head_dim)`.

    As one matrix: a linear layer would make it one and undo it, which are two operations.
    """
    projected = projection(states.flatten(0, 1))
    return projected.view(*states.shape[:2], attn.heads, -1).transpose(1, 2)


def _look_at(regions: RegionCall, query: torch.Tensor, keys: LayerKeys, scale: float, is_cross: bool) -> None:
    """Show a layer's conditional samples, before any bias, to what looks for objects."""
    assert regions.look is not None and regions.maps is not None
    if query.shape[2] in regions.maps:  # else the guidance has its say about that
        maps = regions.maps[query.shape[2]]
        tokens, absent = (maps.tokens, maps.absent) if is_cross else (None, None)
        key = keys.key[-regions.batch :, :, : keys.num_tokens]
        regions.look.add(query[-regions.batch :], key, scale, tokens, absent)


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
        if layer.maps.unseen is not None:  # whatever the method says of them
            bias = bias.masked_fill(layer.maps.unseen, -torch.inf)
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
    """-inf at fillers and at what is another half's; in the unconditional half else zero, or as the regions' negative
    prompts have it."""
    own_tokens = 0 if regions.region_prompts is None else regions.region_prompts.shape[1]
    frame = query.new_full(shape, -torch.inf)
    unconditional = frame[: -regions.batch]
    if regions.region_negatives is None or regions.maps is None:
        unconditional[..., : keys.num_tokens - own_tokens] = 0
    else:
        unseen = regions.maps[query.shape[2]].unseen_negatives
        assert unseen is not None
        unconditional[..., : unseen.shape[-1]].masked_fill_(~unseen, 0)
    return frame
