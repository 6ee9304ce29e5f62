"""Prompt and layout brought together: which tokens stand for what, and where that is to be."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .attention_processors import AttentionRecorder
from .guidance_methods import GuidanceMethod, TokenKind, unserved
from .layout import Region, parse_layout, region_names
from .region_conditioning import RegionConditioning
from .region_contents import HELD_KEYS
from .residual_embeddings import ParsedPrompt, Place, ResidualEmbedding

__multisubject_version__ = "0.1.0"


@dataclass(frozen=True)
class PlacedPrompt:
    """A prompt and where its layout puts what.

    Args:
        texts: the prompt with its subjects found, as each text encoder reads it.
        regions: of the layout, all masks of one size.
        places: for each region the words and tokens of the prompt that it places, as each text encoder reads them;
            those of a `prompt_2` that does not say them are left out. None for a region that holds words of its own
            and names no others.
        words: for each region what it holds as `prompt`, as each text encoder reads it, or None.
    """

    texts: Sequence[ParsedPrompt]
    regions: Sequence[Region] = ()
    places: Sequence[Sequence[Place]] = ()
    words: Sequence[Sequence[ParsedPrompt] | None] = ()

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
    read: Callable[[str], Sequence[ParsedPrompt]],
) -> PlacedPrompt:
    """Find in a prompt what its layout places.

    Args:
        texts: the prompt as each text encoder reads it.
        layout, color_context: as for `parse_layout`; no layout: no regions.
        height, width: of the picture, in pixels.
        subjects: the loaded ones.
        read: a text in which `<name>` alone means a subject, as each text encoder reads it.

    Raises:
        ValueError: the layout is wrong; what it places is missing in the prompt, ambiguous or cut off; it places a
            loaded subject that the prompt has as a plain word.
    """
    regions = parse_layout(layout, height=height, width=width, color_context=color_context)
    words = [None if region.prompt is None else read_words(region, region.prompt, read) for region in regions]
    places = [find_places(texts, region, own) for region, own in zip(regions, words, strict=True)]
    # A layout that says `petrucci` where the prompt says so without brackets means the subject, not the word.
    for region, own in zip(regions, words, strict=True):
        mentioned = {mention.subject for text in (texts[0], *(own or ())[:1]) for mention in text.mentions}
        for name in subjects.keys() - mentioned if region.is_named else ():
            word = region.subject.strip().casefold()
            if word == name.casefold() != subjects[name].class_phrase.casefold():
                raise ValueError(
                    f"`layout` places the subject {region.subject!r}, but the prompt {texts[0].text!r} has it as a"
                    f" plain word, which draws no subject. Write `<{name}>` there, or load it under another name."
                )
    return PlacedPrompt(texts, regions, places, words)


def read_words(region: Region, prompt: str, read: Callable[[str], Sequence[ParsedPrompt]]) -> Sequence[ParsedPrompt]:
    """What a region holds as `prompt`, as each text encoder reads it; errors name the region."""
    try:
        return read(prompt)
    except ValueError as error:
        raise ValueError(f"the `prompt` of {shown(region)}: {error}") from None


def shown(region: Region) -> str:
    """What to call a region in a message."""
    return region.place or f"the region {region.subject!r}"


def find_places(texts: Sequence[ParsedPrompt], region: Region, words: Sequence[ParsedPrompt] | None) -> list[Place]:
    """Where the prompt says what a region places; a `prompt_2` of other words may say it, too. Nowhere, if the region
    has words of its own that say it."""
    first, *others = texts
    if not region.is_named or (words and not first.find_all(region.subject) and words[0].find_all(region.subject)):
        return []
    try:
        places = [first.find(region.subject, region.occurrence)]
    except ValueError as error:
        raise ValueError(f"{shown(region)}: {error}") from None
    for text in others:
        if text.text == first.text:
            places.append(text.find(region.subject, region.occurrence))
        else:
            found = text.find_all(region.subject)
            places += found if region.occurrence is None else found[region.occurrence - 1 : region.occurrence]
    return places


def check_served(placed: Sequence[PlacedPrompt], method: GuidanceMethod) -> None:
    """Raise `ValueError` for what a region holds and a guidance method cannot serve."""
    for region in (region for of_prompt in placed for region in of_prompt.regions):
        keys = {
            "prompt": region.prompt is not None,
            "negative_prompt": region.negative_prompt is not None,
            "lora": region.lora is not None,
            "ip_adapter_image": region.ip_adapter_image is not None,
            "begin": region.begin > 0,
            "end": region.end < 1,
            "strength": region.strength != 1,
            "background": region.is_background,
        }
        if problem := unserved(method, [key for key, is_used in keys.items() if is_used]):
            raise ValueError(f"{shown(region)} {problem}")


def per_prompt(value: Any, prompt: str | list[str] | None, argument: str) -> list[Any]:
    """One value for each prompt: a list beside a list of prompts holds one each, anything else counts for all."""
    if prompt is None:
        return []
    if isinstance(prompt, str):
        return [value]
    if isinstance(value, (list, tuple)):
        if any(
            isinstance(part, Mapping) and len({"box", "mask", "subject", "phrase", *HELD_KEYS} & {*part}) > 1
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


def make_conditioning(placed: Sequence[PlacedPrompt], num_tokens: int) -> RegionConditioning | None:
    """Masks, tokens and weights of the prompts' regions; None if no prompt has any.

    Args:
        placed: one per prompt.
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
        of_encoders = [token_kinds(text.num_tokens, num_tokens) for text in of_prompt.texts]
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


def token_kinds(length: int, num_tokens: int) -> torch.Tensor:
    """`(num_tokens,)` int64 of `TokenKind` for a prompt of `length` tokens, start and end of text included."""
    length = min(length, num_tokens)
    kinds = torch.full((num_tokens,), int(TokenKind.PADDING))
    kinds[:length] = TokenKind.WORD
    kinds[0], kinds[length - 1] = TokenKind.START, TokenKind.END
    return kinds


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
    method: GuidanceMethod | None = None,
) -> AttentionRecorder:
    """A recorder of the tokens that `recorded_tokens` names, for `num_images` pictures of each prompt.

    Args:
        recorded: one per prompt.
        num_tokens: length of the prompt embeddings.
        num_images: pictures per prompt.
        conditioning: of all these pictures.
        method: the guidance method, which says which words are among the keys.

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
    appended = None if conditioning is None else conditioning.appended(method)
    if appended is not None:
        # The first groups are the regions; what is recorded of one is also what its own words say.
        words = (appended.tokens & (appended.token_kinds == TokenKind.WORD)).flatten(1)  # [B, N * L]
        numbers = torch.arange(tokens.shape[1])[:, None]
        tokens = torch.cat([tokens, words[:, None] & (appended.owners_of_keys()[:, None] == numbers)], dim=2)
    return AttentionRecorder(tokens, num_tokens)
