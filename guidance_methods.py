"""Guidance methods: ways to bias a UNet's attention so that every subject appears in its region and nowhere else.

A *guidance method* is a function of one attention layer (`AttentionLayer`) that returns a bias for its logits, or None
to leave the layer alone. `GUIDANCE_METHODS` has the ones that are known by name, with their sources; a function of
yours works wherever a name does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch

__multisubject_version__ = "0.1.0"

HIDDEN = -1e8
"""Logit of what must not be attended to; made finite in the layer's own dtype by the processor."""


class TokenKind(IntEnum):
    """What stands at a position of the prompt's tokens."""

    START = 0
    WORD = 1
    END = 2
    PADDING = 3


LARGE = 0.25
"""Share of the picture from which on a region is as large as what stands in a picture by itself."""


def own_summary_weight(num_tokens: torch.Tensor, area: torch.Tensor) -> torch.Tensor:
    """Logits by which the end of a region's own prompt is attended to more than by itself.

    It says how many there are and what of, which the prompt's own end and padding said before they were hidden, and
    counts as much as all of these. But it speaks of a picture of one object, which is a large one there: in smaller
    regions it counts less, by the eighth power of their area. (In regions of a sixth of the picture objects get lost
    otherwise; docs/placement.md has what was measured.)

    Args:
        num_tokens: of the prompt, that are hidden in the region.
        area: of the region, in shares of the picture.
    """
    return num_tokens.clamp(min=1).log() + 8 * (area / LARGE).clamp(1e-6, 1).log()


def places_words(tokens: torch.Tensor) -> torch.Tensor:
    """`(B, R)` bool: which regions have words to place, by their tokens `(B, R, K)`."""
    return tokens.any(dim=2)


@dataclass(frozen=True, eq=False)
class RegionMaps:
    """Regions and tokens at one attention layer with Q = h * w queries, row by row, for B images with up to R regions.

    The K keys of cross-attention are the T tokens of the prompt and after them the regions' own: of what they hold as
    `prompt` or, for a method that `uses_region_prompts`, of each region's own prompt.

    Args:
        masks: `(B, R, Q)` float32 in [0, 1]; rows of absent regions are zero.
        inside: `(B, R, Q)` bool, where a mask reaches half of its peak at this resolution.
        tokens: `(B, R, K)` bool, the tokens that name each region's subject, in the prompt and in its own prompt.
        token_kinds: `(B, K)` int64 of `TokenKind`.
        owners: `(B, K)` int64, the region whose own prompt a token is of; -1 for the prompt that all share, -2 where no
            token stands. Of a method that `uses_own_summaries` some of the first T keys are regions' own.
        signed_weights: `(B, 1, Q, K)` float32. At a region's tokens: `weight * mask` inside the region and
            `weight_negative` outside; 0 at every other token. For tokens of several regions the strongest one counts.
        inside_weights: `signed_weights` with 0 at places that lie in no region.
        hidden_summary: `(B, 1, Q, K)` float32, `HIDDEN` where the query lies in a region and the key is the prompt's
            end of text or padding, else 0.
        summaries: `(B, 1, Q, K)` float32, `hidden_summary` with -2 in place of `HIDDEN` in pictures with less than a
            third outside all regions. The setting is painted there, and by what regions hear of the prompt as a whole:
            with little room outside them and the summary hidden, it gets lost. At a key that is the end of a region's
            own prompt (`uses_own_summaries`) `HIDDEN` outside the region and `own_summary_weight` inside.
        unseen: `(B, 1, Q, K)` bool, words of a region's own that other places do not see whatever the method says;
            None: there are none.
        unseen_negatives: `(B, 1, Q, T + M)` bool, of the unconditional samples' keys, the last M of which are of the
            regions' negative prompts, those that a place does not see; None: no region has one.
        absent: `(B, K)` bool, keys at which no token stands, since another region's words are longer or another image
            has more of them; None: there are none.

    The background (`layout.BACKGROUND`) counts as a region in `masks`, `inside` and `signed_weights`, and as outside
    all regions in the others.
    """

    masks: torch.Tensor
    inside: torch.Tensor
    tokens: torch.Tensor
    token_kinds: torch.Tensor
    owners: torch.Tensor
    signed_weights: torch.Tensor
    inside_weights: torch.Tensor
    hidden_summary: torch.Tensor
    summaries: torch.Tensor
    unseen: torch.Tensor | None = None
    unseen_negatives: torch.Tensor | None = None
    absent: torch.Tensor | None = None

    def inside_owner(self) -> torch.Tensor:
        """`(B, Q, K)` bool: the query lies in the region whose own prompt the key is of; False for shared keys."""
        numbers = torch.arange(self.inside.shape[1], device=self.owners.device)
        owned = numbers[:, None] == self.owners[:, None]  # [B, R, K]
        return self.inside.transpose(1, 2).float() @ owned.float() > 0

    def inside_placing(self) -> torch.Tensor:
        """`(B, R, Q)` bool: `inside` of the regions that place words. What a region holds beside words (a LoRA, a
        picture, a negative) leaves the prompt alone."""
        return self.inside & places_words(self.tokens)[..., None]

    def apart(self) -> torch.Tensor:
        """`(B, Q, Q)` bool: two places that lie in regions that place words, but in none together."""
        placing = self.inside_placing()
        inside, anywhere = placing.float(), placing.any(dim=1)
        together = inside.transpose(1, 2) @ inside > 0
        return anywhere[:, :, None] & anywhere[:, None, :] & ~together


@dataclass(frozen=True, eq=False)
class GuidanceStep:
    """One denoising step, as scalar float32 tensors (numbers would make a compiled UNet recompile at every step).

    Args:
        sigma: noise level `sqrt((1 - alpha_bar) / alpha_bar)` of the UNet call's timestep.
        strength: `guidance_weight * ln(1 + sigma ** 2)`.
        progress: share of the steps from the first one taken that lie behind, in [0, 1).
        time: the timestep over the number of training timesteps, 1 at pure noise.
    """

    sigma: torch.Tensor
    strength: torch.Tensor
    progress: torch.Tensor
    time: torch.Tensor


class KeyMoments:
    """Second moments and mean of keys, what `AttentionLayer.logit_std` needs of them; computed when first asked for.

    Args:
        key: `(B, heads, K, head_dim)`.
        absent: `(B, K)` bool, keys that do not count, or None.
    """

    def __init__(self, key: torch.Tensor, absent: torch.Tensor | None = None):
        self._key, self._absent = key, absent
        self._value: torch.Tensor | None = None

    def num_keys(self) -> int | torch.Tensor:
        """How many count: a number, or `(B, 1, 1, 1)`."""
        return self._key.shape[2] if self._absent is None else (~self._absent).sum(dim=1)[:, None, None, None]

    def value(self) -> torch.Tensor:
        """`[K'^T K' | mean(k)]` with `k' = k - mean(k)`, float32: `(B, heads, head_dim, head_dim + 1)`."""
        if self._value is None:  # not a cached_property, whose lock cannot be compiled
            key = self._key.float()
            if self._absent is None:
                mean = key.mean(dim=2, keepdim=True)
                centred = key - mean
            else:
                here = (~self._absent)[:, None, :, None]
                mean = (key * here).sum(dim=2, keepdim=True) / self.num_keys()
                centred = (key - mean) * here
            self._value = torch.cat([centred.transpose(-1, -2) @ centred, mean.transpose(-1, -2)], dim=-1)
        return self._value


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
        key_moments: of `key`, where they are kept from step to step.
    """

    query: torch.Tensor
    key: torch.Tensor
    scale: float
    is_cross: bool
    maps: RegionMaps
    step: GuidanceStep
    key_moments: KeyMoments | None = None

    def logit_std(self) -> torch.Tensor:
        """Unbiased standard deviation of the logits over heads, queries and keys: `(B, 1, 1, 1)` float32.

        The logits are not built. With centred keys `k' = k - mean(k)`, every row `q K^T` splits into its mean
        `q . mean(k)` and a rest whose squares sum to `q (K'^T K') q^T`. Both are sums of squares, so nothing cancels in
        float32.
        """
        moments = self.key_moments or KeyMoments(self.key, self.maps.absent if self.is_cross else None)
        query = self.query.float()
        count = query.shape[1] * query.shape[2] * moments.num_keys()
        rows = query @ moments.value()  # [B, heads, Q, head_dim + 1]
        within = (rows[..., :-1] * query).sum(dim=(1, 2, 3), keepdim=True)
        between = rows[..., -1:].var(dim=(1, 2, 3), keepdim=True, correction=0)
        variance = (within + between * count) * (self.scale**2 / (count - 1))
        return variance.sqrt()


GuidanceMethod = Callable[[AttentionLayer], torch.Tensor | None]
"""Returns the bias `(B, 1 or heads, Q, K)` added to the layer's logits, or None to leave the layer alone."""


def uses_region_prompts(method: GuidanceMethod) -> GuidanceMethod:
    """Decorator: the method also wants the tokens of each region's own prompt among the keys of cross-attention."""
    method.uses_region_prompts = True  # type: ignore[attr-defined]
    return method


def uses_own_words(method: GuidanceMethod) -> GuidanceMethod:
    """Decorator: in guided calls a region's words are to have the embeddings that they have in its own prompt, where
    the regions have prompts of their own."""
    method.uses_own_words = True  # type: ignore[attr-defined]
    return method


def uses_own_summaries(method: GuidanceMethod) -> GuidanceMethod:
    """Decorator, beside `uses_own_words`: in guided calls the last places of the prompt's padding are given to the ends
    of the regions' own prompts, a place each, as far as there are any. `RegionMaps.summaries` says who sees them."""
    method.uses_own_summaries = True  # type: ignore[attr-defined]
    return method


def guides_all_self_attention(method: GuidanceMethod) -> GuidanceMethod:
    """Decorator: the method's bias on self-attention also holds for the unconditional samples."""
    method.guides_all_self_attention = True  # type: ignore[attr-defined]
    return method


def moves_objects(*at: float) -> Callable[[GuidanceMethod], GuidanceMethod]:
    """Decorator: a pipeline moves objects into their regions after the steps during which these shares of the steps lie
    behind; see `move_times.py` and `region_moves.py`."""

    def declare(method: GuidanceMethod) -> GuidanceMethod:
        method.moves_objects = at  # type: ignore[attr-defined]
        return method

    return declare


def same_in_every_layer(method: GuidanceMethod) -> GuidanceMethod:
    """Decorator: the bias follows from maps and step alone, so that layers of one resolution can share it."""
    method.same_in_every_layer = True  # type: ignore[attr-defined]
    return method


ALWAYS_SERVED = frozenset({"prompt", "negative_prompt", "lora", "ip_adapter_image", "begin", "end"})
"""Keys of a region that work with any method: its own words are keys like others and hidden elsewhere by themselves,
negatives are of the unconditional samples, and a region that does not guide yet or any more is absent."""


def serves(*keys: str) -> Callable[[GuidanceMethod], GuidanceMethod]:
    """Decorator: which more keys of a region the method makes use of.

    Args:
        keys: `strength`, whose factor it must let act as `signed_weights` have it; `background`, a region that is all
            of what lies outside the others.
    """

    def declare(method: GuidanceMethod) -> GuidanceMethod:
        method.serves = ALWAYS_SERVED | {*keys}  # type: ignore[attr-defined]
        return method

    return declare


def unserved(method: GuidanceMethod, keys: Sequence[str]) -> str | None:
    """What speaks against a region with these keys under a guidance method, as the end of a sentence, or None."""
    served = getattr(method, "serves", ALWAYS_SERVED)
    for key in keys:
        if key not in served:
            names = [name for name, known in GUIDANCE_METHODS.items() if key in getattr(known, "serves", ())]
            said = "is the background" if key == "background" else f"has `{key}`"
            return (
                f"{said}, which guidance_method {getattr(method, '__name__', method)!r} cannot serve. Leave it out, or"
                f" use one of {sorted(names)}."
            )
    return None


# --- Cones 2 and masks -----------------------------------------------------------------------------------------------


@serves("background")
@same_in_every_layer
def masked(layer: AttentionLayer) -> torch.Tensor | None:
    """Tokens of a subject cannot be attended to outside their region; inside, nothing pulls."""
    if not layer.is_cross:
        return None
    return layer.maps.signed_weights.clamp(max=0)


@serves("strength", "background")
def cones2(layer: AttentionLayer) -> torch.Tensor | None:
    """Cones 2 (Liu et al. 2023, arXiv:2305.19327): `strength * signed_weights * std(logits)`.

    The standard deviation is per sample, so a picture does not depend on the batch it is made in.
    """
    if not layer.is_cross:
        return None
    return layer.step.strength * layer.logit_std() * layer.maps.signed_weights


@serves("strength", "background")
def cones2_padding_hidden(layer: AttentionLayer) -> torch.Tensor | None:
    """`cones2`; besides, the tokens after the last word (end of text, padding) cannot be attended to inside a region.

    A causal text encoder puts a summary of the whole prompt there, by which each region hears of the others' subjects.
    """
    if not layer.is_cross:
        return None
    pull = layer.step.strength * layer.logit_std()
    return torch.addcmul(layer.maps.hidden_summary, layer.maps.signed_weights, pull)


# --- the field's methods ---------------------------------------------------------------------------------------------


@serves("background")
@uses_own_words
def dense_diffusion(layer: AttentionLayer) -> torch.Tensor | None:
    """DenseDiffusion (Kim et al. 2023, arXiv:2308.12964, equations 3 to 6) with its published settings.

    In a region, logits of what belongs to it move towards the largest of their row and all others towards the smallest,
    the more the smaller the region and the noisier the step (`time ** 5`), during the first 30 % of the steps; in
    self-attention by 0.3 of that. A phrase's embeddings are those of its own prompt, as in the published code. Places
    outside all regions, which the paper gives a segment of their own, are left alone.
    """
    maps, step = layer.maps, layer.step
    placing = maps.inside_placing()
    inside = placing.float()
    strength = layer.scale * step.time**5 * (step.progress < 0.3) * (1.0 if layer.is_cross else 0.3)
    belongs = inside.transpose(1, 2) @ (maps.tokens.float() if layer.is_cross else inside) > 0  # [B, Q, K]
    area = (inside.mean(dim=2)[:, :, None] * inside).amax(dim=1)  # [B, Q], of the place's region
    strength = strength * (1 - area) * placing.any(dim=1)
    products = layer.query.float() @ layer.key.float().transpose(-1, -2)  # [B, heads, Q, K]
    highest = lowest = products
    if layer.is_cross and maps.absent is not None:
        absent = maps.absent[:, None, None]
        highest, lowest = products.masked_fill(absent, -torch.inf), products.masked_fill(absent, torch.inf)
    largest, smallest = highest.amax(dim=-1, keepdim=True), lowest.amin(dim=-1, keepdim=True)
    return strength[:, None, :, None] * (torch.where(belongs[:, None], largest, smallest) - products)


@serves("background")
@same_in_every_layer
@uses_region_prompts
def regional_prompts(layer: AttentionLayer) -> torch.Tensor | None:
    """Regional prompts (Mix-of-Show, Gu et al. 2023, arXiv:2305.18292): a region attends to its own prompt alone.

    Everything outside the regions attends to the whole prompt. Where regions overlap, their prompts share the
    attention.
    """
    if not layer.is_cross:
        return None
    maps = layer.maps
    in_regions = maps.inside.any(dim=1)[:, :, None]
    visible = torch.where((maps.owners == -1)[:, None], ~in_regions, maps.inside_owner())
    return HIDDEN * (~visible)[:, None]


@serves("background")
@same_in_every_layer
@uses_region_prompts
def attention_couple(layer: AttentionLayer) -> torch.Tensor | None:
    """Regional prompts blended with the whole prompt, as the attention-couple extensions of Stable Diffusion UIs do.

    A region attends to its own prompt and, with 3/10 of its weight, to the whole one.
    """
    if not layer.is_cross:
        return None
    maps = layer.maps
    shared = (maps.owners == -1)[:, None]
    in_regions = maps.inside.any(dim=1)[:, :, None]
    hidden = HIDDEN * (~shared & ~maps.inside_owner())
    return (hidden + torch.where(shared & in_regions, _LOG_BASE_WEIGHT, 0.0))[:, None]


_LOG_BASE_WEIGHT = -0.8473  # ln(0.3 / 0.7)


@serves()
@same_in_every_layer
@guides_all_self_attention
def bounded_attention(layer: AttentionLayer) -> torch.Tensor | None:
    """The masks of Bounded Attention (Dahary et al. 2024, arXiv:2403.16990), without its gradient guidance.

    As in the published code, a subject's tokens are seen in its region only, the end of the text in regions only, and
    in self-attention no subject's region sees another's, with or without the prompt. That code also hides function
    words everywhere, and replaces the regions by clusters of its own as it goes.
    """
    maps = layer.maps
    if not layer.is_cross:
        return HIDDEN * maps.apart()[:, None]
    end = (maps.token_kinds == int(TokenKind.END))[:, None, :]
    inside = maps.inside_placing().any(dim=1)
    background = (~inside & inside.any(dim=1, keepdim=True))[:, :, None]  # none in a picture without regions
    return maps.signed_weights.clamp(max=0).masked_fill((end & background)[:, None], HIDDEN)


# --- ours ------------------------------------------------------------------------------------------------------------


@serves("strength", "background")
@same_in_every_layer
@uses_own_words
@uses_own_summaries
@moves_objects(0.15, 0.3, 0.45)
def multisubject(layer: AttentionLayer) -> torch.Tensor | None:
    """The default, `cones2_padding_hidden` with five changes, and with objects that are moved.

    In the whole prompt a causal text encoder lets every word hear of the words before it, so that the second of two
    dogs knows the first one's colour: here a region's words are embedded by themselves (`uses_own_words`). In the
    second half of the steps, when it is settled who stands where, places outside all regions may attend to everything:
    what reaches over a region's edge, such as a hat, can then be painted with its subject's words. The pull is the
    same in every layer, `strength * 3` logits for each unit of weight, where Cones 2 measures the spread of each
    layer's logits: that costs more, and where logits spread wide it pulls too hard. And where regions cover most of the
    picture, the prompt's summary is held back but not hidden (`RegionMaps.summaries`). In its place a region sees the
    end of its own prompt (`uses_own_summaries`), without which one word may draw two objects where there is room. In
    calls of a pipeline objects are also moved into their regions in the first steps (`moves_objects`).
    """
    if not layer.is_cross:
        return None
    maps = layer.maps
    weights = torch.where(layer.step.progress < 0.5, maps.signed_weights, maps.inside_weights)
    return torch.addcmul(maps.summaries, weights, layer.step.strength, value=3)


GUIDANCE_METHODS: dict[str, GuidanceMethod] = {
    "attention_couple": attention_couple,
    "bounded_attention": bounded_attention,
    "cones2": cones2,
    "cones2_padding_hidden": cones2_padding_hidden,
    "dense_diffusion": dense_diffusion,
    "masked": masked,
    "multisubject": multisubject,
    "regional_prompts": regional_prompts,
}
"""Guidance methods by name. Any callable of the same signature is accepted where a name is."""


def resolve_guidance_method(guidance_method: str | GuidanceMethod) -> GuidanceMethod:
    """The function behind a name of `GUIDANCE_METHODS`; a callable is returned as it is. ValueError otherwise."""
    if callable(guidance_method):
        return guidance_method
    if not isinstance(guidance_method, str) or guidance_method not in GUIDANCE_METHODS:
        raise ValueError(
            f"`guidance_method` is {guidance_method!r}, expected one of {sorted(GUIDANCE_METHODS)} or a function of an"
            " `AttentionLayer` that returns a bias."
        )
    return GUIDANCE_METHODS[guidance_method]
