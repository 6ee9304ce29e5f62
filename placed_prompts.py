"""Prompt and layout brought together: which tokens stand for what, and where that is to be."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .attention_processors import AttentionRecorder
from .guidance_methods import GuidanceMethod, TokenKind
from .layout import Region, parse_layout, region_names
from .region_attention import RegionConditioning, RegionPrompts
from .region_loras import Scales
from .residual_embeddings import Mention, ParsedPrompt, Place, ResidualEmbedding

__multisubject_version__ = "0.1.0"

# What a region's own prompt says before its subject: the opening that image captions and training templates share.
REGION_PROMPT = "a photo of"


@dataclass(frozen=True)
class PlacedPrompt:
    """A prompt and where its layout puts what.

    Args:
        texts: the prompt with its subjects found, as each text encoder reads it.
        regions: of the layout, all masks of one size.
        places: for each region the words and tokens of the prompt that it places, as each text encoder reads them;
            those of a `prompt_2` that does not say them are left out. None for a region that holds words of its own
            and names no others.
    """

    texts: Sequence[ParsedPrompt]
    regions: Sequence[Region] = ()
    places: Sequence[Sequence[Place]] = ()

    @property
    def is_alike(self) -> bool:
        """Whether all text encoders have the regions' words, and the subjects, at the same tokens."""
        return all(text.mentions == self.texts[0].mentions for text in self.texts) and all(
            of_region == [of_region[0]] * len(self.texts) for of_region in self.places if of_region
        )

    def spans(self) -> list[list[range]]:
        """For each region its tokens in every text encoder's prompt, each span once."""
        return [list(dict.fromkeys(place.span for place in of_region)) for of_region in self.places]


def place_prompt(
    texts: Sequence[ParsedPrompt],
    layout: Any,
    color_context: Any,
    *,
    height: int,
    width: int,
    subjects: Mapping[str, ResidualEmbedding],
) -> PlacedPrompt:
    """Find in a prompt what its layout places.

    Args:
        texts: the prompt as each text encoder reads it.
        layout, color_context: as for `parse_layout`; no layout: no regions.
        height, width: of the picture, in pixels.
        subjects: the loaded ones.

    Raises:
        ValueError: the layout is wrong; what it places is missing in the prompt, ambiguous or cut off; it places a
            loaded subject that the prompt has as a plain word.
    """
    regions = parse_layout(layout, height=height, width=width, color_context=color_context)
    places = [_find_places(texts, region) for region in regions]
    # A layout that says `petrucci` where the prompt says so without brackets means the subject, not the word.
    mentioned = {mention.subject for mention in texts[0].mentions}
    for region in (region for region in regions if region.is_named):
        for name in subjects.keys() - mentioned:
            word = region.subject.strip().casefold()
            if word == name.casefold() != subjects[name].class_phrase.casefold():
                raise ValueError(
                    f"`layout` places the subject {region.subject!r}, but the prompt {texts[0].text!r} has it as a"
                    f" plain word, which draws no subject. Write `<{name}>` there, or load it under another name."
                )
    return PlacedPrompt(texts, regions, places)


def _find_places(texts: Sequence[ParsedPrompt], region: Region) -> list[Place]:
    """Where the prompt says what a region places; a `prompt_2` of other words may say it, too."""
    first, *others = texts
    if not region.is_named:
        return []
    places = [first.find(region.subject, region.occurrence)]
    for text in others:
        if text.text == first.text:
            places.append(text.find(region.subject, region.occurrence))
        else:
            found = text.find_all(region.subject)
            places += found if region.occurrence is None else found[region.occurrence - 1 : region.occurrence]
    return places


def per_prompt(value: Any, prompt: str | list[str] | None, argument: str) -> list[Any]:
    """One value for each prompt: a list beside a list of prompts holds one each, anything else counts for all."""
    if prompt is None:
        return []
    if isinstance(prompt, str):
        return [value]
    if isinstance(value, (list, tuple)):
        if any(
            isinstance(part, Mapping) and {"box", "mask"} & {*part} and {"subject", "phrase"} & {*part}
            for part in value
        ):
            raise ValueError(
                f"`{argument}` is a list of regions, expected a layout for each of the {len(prompt)} prompts. Write a "
                "list of lists, one per prompt; the same one may stand there several times."
            )
        if len(value) != len(prompt):
            raise ValueError(
                f"`{argument}` is a list of {len(value)}, expected one entry (or None) for each of the {len(prompt)}"
                " prompts."
            )
        return list(value)
    return [value] * len(prompt)


def check_prompt_embeds(prompt_embeds: torch.Tensor, placed: Sequence[PlacedPrompt]) -> None:
    """Raise `ValueError` unless given embeddings may be those of these prompts."""
    if prompt_embeds.ndim != 3:
        raise ValueError(f"`prompt_embeds` has shape {tuple(prompt_embeds.shape)}, expected (prompts, tokens, dim).")
    rows, num_tokens = prompt_embeds.shape[:2]
    if placed and rows != len(placed):
        raise ValueError(f"`prompt_embeds` has {rows} rows, expected one for each of {len(placed)} prompts.")
    spans = [span for of_prompt in placed for of_region in of_prompt.spans() for span in of_region]
    spans += [mention.span for of_prompt in placed for text in of_prompt.texts for mention in text.mentions]
    if (longest := max((span.stop for span in spans), default=0)) > num_tokens:
        raise ValueError(
            f"`prompt_embeds` has {num_tokens} tokens, but what `prompt` names goes on to token {longest}: it"
            " embeds another prompt."
        )


# --- what the UNet needs of them -------------------------------------------------------------------------------------


def make_conditioning(
    placed: Sequence[PlacedPrompt], lengths: Sequence[Sequence[int]], num_tokens: int
) -> RegionConditioning | None:
    """Masks, tokens and weights of the prompts' regions; None if no prompt has any.

    Args:
        placed: one per prompt.
        lengths: for each prompt its number of tokens, start and end included, in every text encoder.
        num_tokens: length of the prompt embeddings.
    """
    batch, most = len(placed), max((len(of_prompt.regions) for of_prompt in placed), default=0)
    if most == 0:
        return None
    size = next(region.mask.shape for of_prompt in placed for region in of_prompt.regions)
    masks = torch.zeros(batch, most, *size)
    tokens = torch.zeros(batch, most, num_tokens, dtype=torch.bool)
    weights = torch.zeros(batch, most)
    kinds = torch.full((batch, num_tokens), int(TokenKind.PADDING))
    for row, of_prompt in enumerate(placed):
        for column, (region, spans) in enumerate(zip(of_prompt.regions, of_prompt.spans(), strict=True)):
            masks[row, column] = torch.from_numpy(region.mask)
            weights[row, column] = region.weight * region.strength
            for span in spans:
                tokens[row, column, span.start : span.stop] = True
        of_encoders = [_token_kinds(length, num_tokens) for length in lengths[row]]
        kinds[row] = torch.stack(of_encoders).amin(dim=0)  # where one encoder has a word, it counts
    return RegionConditioning(masks, tokens, weights, kinds, **_held(placed, most))


def _held(placed: Sequence[PlacedPrompt], most: int) -> dict[str, Any]:
    """What else regions hold, as fields of `RegionConditioning`; those that no region has are left out."""

    def rows(value: Callable[[Region], Any], otherwise: Any) -> tuple[tuple[Any, ...], ...]:
        return tuple(
            (*map(value, of_prompt.regions), *[otherwise] * (most - len(of_prompt.regions))) for of_prompt in placed
        )

    regions = [region for of_prompt in placed for region in of_prompt.regions]
    held: dict[str, Any] = {}
    if any((region.begin, region.end) != (0, 1) for region in regions):
        held["times"] = rows(lambda region: (region.begin, region.end), (0.0, 1.0))
    if any(region.is_background for region in regions):
        held["background"] = torch.tensor(rows(lambda region: region.is_background, False))
    if any(region.lora for region in regions):
        held["loras"] = rows(lambda region: region.lora, None)
    if any(region.ip_adapter_image is not None for region in regions):
        held["ip_adapter_images"] = rows(lambda region: region.ip_adapter_image, None)
    return held


def wants_region_prompts(method: GuidanceMethod, placed: Sequence[PlacedPrompt], encodes_words: bool = True) -> bool:
    """Whether a guidance method needs each region's own prompt.

    Args:
        method: the guidance method.
        placed: the prompts.
        encodes_words: False: what a method can take from the prompt embeddings, it shall.
    """
    if getattr(method, "uses_region_prompts", False):
        return True
    # With a `prompt_2` of its own, a word has no one place that its own embedding could take.
    encodes_words = encodes_words and all(of_prompt.is_alike for of_prompt in placed)
    return encodes_words and getattr(method, "uses_own_words", False)


def region_texts(placed: Sequence[PlacedPrompt]) -> list[ParsedPrompt]:
    """Each region's own prompt, `a photo of` what stands there, with the subjects that the region places.

    In the whole prompt a causal text encoder lets every word hear of the words before it: of two dogs, the second one's
    embedding knows the first one's colour. Here each is by itself.

    Raises:
        ValueError: a phrase is too long to be encoded this way.
    """
    texts = []
    for of_prompt in placed:
        text = of_prompt.texts[0]
        limit = text.tokenizer.model_max_length - 1 - _region_start(text)  # the last token is the end of the text
        for words, span in (of_region[0] for of_region in of_prompt.places if of_region):
            if len(span) > limit:
                raise ValueError(
                    f"a phrase of the layout has {len(span)} tokens, expected at most {limit}: it is also encoded by"
                    f" itself, as {REGION_PROMPT!r} and the phrase. Shorten it, or use guidance_method='cones2', which"
                    " encodes the prompt alone."
                )
            shift = _region_start(text) - span.start
            mentions = [
                Mention(mention.subject, mention.phrase, _shifted(mention.span, shift))
                for mention in text.mentions
                if mention.span.start in span and mention.span.stop <= span.stop
            ]
            texts.append(ParsedPrompt(f"{REGION_PROMPT} {words}", tuple(mentions), text.tokenizer))
    return texts


def make_region_prompts(placed: Sequence[PlacedPrompt], encoded: torch.Tensor) -> RegionPrompts:
    """The embeddings `(regions, tokens, dim)` of `region_texts`, laid out by prompt and region."""
    shape = (len(placed), max(len(of_prompt.places) for of_prompt in placed), encoded.shape[1])
    embeds = encoded.new_zeros(*shape, encoded.shape[2])
    tokens = torch.zeros(shape, dtype=torch.bool)
    kinds = torch.full(shape, int(TokenKind.PADDING))
    rows = iter(encoded)
    for row, of_prompt in enumerate(placed):
        start = _region_start(of_prompt.texts[0])
        for column, of_region in enumerate(of_prompt.places):
            if not of_region:
                continue
            stop = start + len(of_region[0].span)
            embeds[row, column] = next(rows)
            tokens[row, column, start:stop] = True
            kinds[row, column] = _token_kinds(stop + 1, shape[2])
    return RegionPrompts(embeds, tokens, kinds)


def text_loras(
    placed: Sequence[PlacedPrompt], encoder: int, num_tokens: int, prompts: bool, own_prompts: bool
) -> tuple[Scales, torch.Tensor]:
    """Which tokens of the encoded texts are of the regions that hold LoRAs.

    Args:
        placed: one per prompt.
        encoder: number of the text encoder, whose own prompt counts.
        num_tokens: of each text.
        prompts, own_prompts: whether the prompts, and after them each region's own one, are among the texts.

    Returns:
        For each text the LoRAs of its regions, and `(texts, R, num_tokens)` float32: 1 at the tokens of each region.
    """
    rows: list[tuple[list[Mapping[str, float] | None], list[list[range]]]] = []
    if prompts:
        for of_prompt in placed:
            same = of_prompt.texts[encoder].text == of_prompt.texts[0].text
            here = slice(0, 1) if same else slice(1, None)  # where the encoder reads them
            read = [[place.span for place in of_region[here]] for of_region in of_prompt.places]
            rows.append(([region.lora for region in of_prompt.regions], read))
    if own_prompts:
        for of_prompt in placed:
            for region, of_region in zip(of_prompt.regions, of_prompt.places, strict=True):
                if of_region:
                    rows.append(([region.lora], [[range(num_tokens)]]))
    most = max((len(held) for held, _ in rows), default=0)
    shares = torch.zeros(len(rows), most, num_tokens)
    for row, (_, of_regions) in enumerate(rows):
        for column, tokens in enumerate(of_regions):
            for span in tokens:
                shares[row, column, span.start : span.stop] = 1
    return [[*held, *[None] * (most - len(held))] for held, _ in rows], shares


def _region_start(text: ParsedPrompt) -> int:
    """Index of the first token behind `REGION_PROMPT`."""
    return len(text.tokenizer(REGION_PROMPT).input_ids) - 1  # the end of the text is not part of it


def _token_kinds(length: int, num_tokens: int) -> torch.Tensor:
    """`(num_tokens,)` int64 of `TokenKind` for a prompt of `length` tokens, start and end of text included."""
    length = min(length, num_tokens)
    kinds = torch.full((num_tokens,), int(TokenKind.PADDING))
    kinds[:length] = TokenKind.WORD
    kinds[0], kinds[length - 1] = TokenKind.START, TokenKind.END
    return kinds


def _shifted(span: range, by: int) -> range:
    return range(span.start + by, span.stop + by)


# --- attention maps --------------------------------------------------------------------------------------------------


def recorded_tokens(placed: PlacedPrompt) -> dict[str, list[range]]:
    """Name -> tokens whose attention is recorded: what the layout places, then the subjects that it leaves alone."""
    spans = placed.spans()
    tokens = dict(zip(region_names(placed.regions), spans, strict=True))
    taken = [span for of_region in spans for span in of_region]
    for mention in dict.fromkeys(mention for text in placed.texts for mention in text.mentions):
        if not any(mention.span.start in span for span in taken):
            tokens.setdefault(mention.subject, []).append(mention.span)
    return tokens


def make_recorder(
    recorded: Sequence[dict[str, list[range]]],
    num_tokens: int,
    num_images: int,
    conditioning: RegionConditioning | None,
) -> AttentionRecorder:
    """A recorder of the tokens that `recorded_tokens` names, for `num_images` pictures of each prompt.

    Args:
        recorded: one per prompt.
        num_tokens: length of the prompt embeddings.
        num_images: pictures per prompt.
        conditioning: of all these pictures.

    Raises:
        ValueError: there is nothing to record.
    """
    if not any(recorded):
        raise ValueError(
            "`output_attention_maps` is True, but no prompt names a loaded subject or has a layout: there is nothing"
            " to map. Name a subject as `<name>`, or place a phrase with `layout`."
        )
    tokens = torch.zeros(len(recorded), max(map(len, recorded)), num_tokens, dtype=torch.bool)
    for row, groups in enumerate(recorded):
        for column, group in enumerate(groups.values()):
            for span in group:
                tokens[row, column, span.start : span.stop] = True
    tokens = tokens.repeat_interleave(num_images, dim=0)
    if conditioning is not None and conditioning.prompts is not None:
        # A group that names a region is also what its own prompt names.
        same = (tokens[:, :, None] == conditioning.tokens[:, None]).all(dim=-1)  # [B, groups, R]
        own = same[..., None] & conditioning.prompts.tokens[:, None]  # [B, groups, R, L]
        tokens = torch.cat([tokens, own.flatten(2)], dim=2)
    return AttentionRecorder(tokens, num_tokens)
