"""The texts of single regions, beside the prompts: which there are to encode, and where their embeddings go."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from .guidance_methods import GuidanceMethod, TokenKind
from .placed_prompts import PlacedPrompt, shown, token_kinds
from .region_conditioning import NOBODYS, RegionPrompts
from .region_loras import Scales
from .residual_embeddings import Mention, ParsedPrompt

__multisubject_version__ = "0.1.0"

# What a region's own prompt says before its subject: the opening that image captions and training templates share.
REGION_PROMPT = "a photo of"

MOST_OWN_TOKENS = 4096
"""Tokens that the regions of one picture may add to the prompt's: each is a column of every map and bias."""


@dataclass(frozen=True)
class RegionText:
    """A text of one region, to be encoded beside the prompts.

    Args:
        row: which prompt's region.
        region: which of its regions.
        texts: the text as each text encoder reads it.
        named: the tokens that name what stands there.
    """

    row: int
    region: int
    texts: Sequence[ParsedPrompt]
    named: range


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


def region_texts(placed: Sequence[PlacedPrompt], method: GuidanceMethod | None = None) -> list[RegionText]:
    """Each region's own prompt, `a photo of` what stands there, with the subjects that the region places.

    In the whole prompt a causal text encoder lets every word hear of the words before it: of two dogs, the second one's
    embedding knows the first one's colour. Here each is by itself. For a method that `uses_region_prompts` it is what
    the region holds as `prompt`, and a region without any words has the whole prompt; for others, that has none.

    Raises:
        ValueError: a phrase is too long to be encoded this way.
    """
    found = []
    takes_all = getattr(method, "uses_region_prompts", False)
    for row, of_prompt in enumerate(placed):
        text, count = of_prompt.texts[0], len(of_prompt.texts)
        start = _region_start(text) if any(of_prompt.places) else 0
        words = of_prompt.words or [None] * len(of_prompt.places)
        for region, (places, own) in enumerate(zip(of_prompt.places, words, strict=True)):
            if takes_all and own is not None:
                found.append(RegionText(row, region, own, range(1, _num_tokens(own) - 1)))
            elif places:
                parsed = _photo_of(text, *places[0], start)
                found.append(RegionText(row, region, [parsed] * count, range(start, start + len(places[0].span))))
            elif takes_all:
                found.append(RegionText(row, region, of_prompt.texts, range(0)))
    return found


def _photo_of(text: ParsedPrompt, words: str, span: range, start: int) -> ParsedPrompt:
    limit = text.tokenizer.model_max_length - 1 - start  # the last token is the end of the text
    if len(span) > limit:
        raise ValueError(
            f"a phrase of the layout has {len(span)} tokens, expected at most {limit}: it is also encoded by"
            f" itself, as {REGION_PROMPT!r} and the phrase. Shorten it, or use guidance_method='cones2', which"
            " encodes the prompt alone."
        )
    shift = start - span.start
    mentions = [
        Mention(mention.subject, mention.phrase, _shifted(mention.span, shift))
        for mention in text.mentions
        if mention.span.start in span and mention.span.stop <= span.stop
    ]
    return ParsedPrompt(f"{REGION_PROMPT} {words}", tuple(mentions), text.tokenizer)


def words_texts(placed: Sequence[PlacedPrompt]) -> list[RegionText]:
    """What regions hold as `prompt`.

    Raises:
        ValueError: one is longer than a text encoder reads, or all of a picture together are too long.
    """
    found = [
        RegionText(row, region, own, range(1, _num_tokens(own) - 1))
        for row, of_prompt in enumerate(placed)
        for region, own in enumerate(of_prompt.words)
        if own is not None
    ]
    for text in found:
        _check_length(text.texts, f"the `prompt` of {shown(placed[text.row].regions[text.region])}")
    _check_sum(found, lambda text: len(text.named) + 1, "prompt")
    return found


def text_loras(
    placed: Sequence[PlacedPrompt], encoder: int, num_tokens: int, prompts: bool, more: Sequence[RegionText]
) -> tuple[Scales, torch.Tensor]:
    """Which tokens of the encoded texts are of the regions that hold LoRAs.

    Args:
        placed: one per prompt.
        encoder: number of the text encoder, whose own prompt counts.
        num_tokens: of each text.
        prompts: whether the prompts are among the texts.
        more: the regions' own texts behind them, which are a region's as a whole.

    Returns:
        For each text the LoRAs of its regions, and `(texts, R, num_tokens)` float32: 1 at the tokens of each region.
    """
    rows: list[tuple[list[Mapping[str, float] | None], list[list[range]]]] = []
    for of_prompt in placed if prompts else ():
        same = of_prompt.texts[encoder].text == of_prompt.texts[0].text
        here = slice(0, 1) if same else slice(1, None)  # where the encoder reads them
        read = [[place.span for place in of_region[here]] for of_region in of_prompt.places]
        rows.append(([region.lora for region in of_prompt.regions], read))
    rows += [([placed[text.row].regions[text.region].lora], [[range(num_tokens)]]) for text in more]
    most = max((len(held) for held, _ in rows), default=0)
    shares = torch.zeros(len(rows), most, num_tokens)
    for row, (_, of_regions) in enumerate(rows):
        for column, tokens in enumerate(of_regions):
            for span in tokens:
                shares[row, column, span.start : span.stop] = 1
    return [[*held, *[None] * (most - len(held))] for held, _ in rows], shares


def negative_texts(
    placed: Sequence[PlacedPrompt],
    of_pictures: Sequence[Sequence[str]],
    read: Callable[[Sequence[str]], Sequence[ParsedPrompt]],
) -> list[RegionText]:
    """What those places shall not show whose regions hold a `negative_prompt`: what the picture shall not, and that.

    Args:
        placed: the prompts.
        of_pictures: for each prompt the picture's own negative prompt, as it is written for each text encoder.
        read: a text for each text encoder, with subjects as `<name>`, as they read it.

    Raises:
        ValueError: one is longer than a text encoder reads, or all of a picture together are too long.
    """
    found = []
    for row, (of_prompt, of_picture) in enumerate(zip(placed, of_pictures, strict=True)):
        for number, region in enumerate(of_prompt.regions):
            if region.negative_prompt is None:
                continue
            place = f"the `negative_prompt` of {shown(region)}"
            try:
                own = read([", ".join(filter(None, (text, region.negative_prompt))) for text in of_picture])
            except ValueError as error:
                raise ValueError(f"{place}: {error}") from None
            _check_length(own, f"{place}, with the picture's own before it,")
            found.append(RegionText(row, number, own, range(0)))
    _check_sum(found, lambda text: text.texts[0].tokenizer.model_max_length, "negative_prompt")
    return found


def _check_length(texts: Sequence[ParsedPrompt], name: str) -> None:
    limit = min(text.tokenizer.model_max_length for text in texts) - 2
    if (length := _num_tokens(texts) - 2) > limit:
        raise ValueError(
            f"{name} has {length} tokens, expected at most {limit}, which is what a text encoder reads. Shorten it."
        )


def _check_sum(texts: Sequence[RegionText], length: Callable[[RegionText], int], key: str) -> None:
    """Raise where the regions of one picture add too many keys; every text takes as many as the longest of all."""
    longest = max(map(length, texts), default=0)
    counts = Counter(text.row for text in texts)
    if counts and (total := max(counts.values()) * longest) > MOST_OWN_TOKENS:
        raise ValueError(
            f"`layout`: {max(counts.values())} regions with a `{key}` of up to {longest} tokens (with the end of the"
            f" text) add {total} keys to every layer of cross-attention, expected at most {MOST_OWN_TOKENS}. Shorten"
            " the longest ones, or give fewer regions one."
        )


def make_region_prompts(texts: Sequence[RegionText], encoded: torch.Tensor, shape: tuple[int, int]) -> RegionPrompts:
    """The embeddings `(texts, tokens, dim)` of `region_texts`, laid out by prompt and region: `shape=(B, R)`."""
    length = encoded.shape[1]
    embeds = encoded.new_zeros(*shape, length, encoded.shape[2])
    tokens = torch.zeros(*shape, length, dtype=torch.bool)
    kinds = torch.full((*shape, length), int(TokenKind.PADDING))
    for text, row in zip(texts, encoded, strict=True):
        place = text.row, text.region
        embeds[place] = row
        tokens[place][text.named.start : text.named.stop] = True
        kinds[place] = token_kinds(_num_tokens(text.texts), length)
    return RegionPrompts(embeds, tokens, kinds)


def make_words(texts: Sequence[RegionText], encoded: torch.Tensor, batch: int) -> RegionPrompts:
    """The embeddings of `words_texts`, from the first word to the end of the text: all of them count as the region's,
    and what stands before and behind says nothing of it."""
    length = max(len(text.named) for text in texts) + 1
    packed = _packed(texts, encoded[:, 1 : 1 + length], batch)
    for text, column in _columns(texts):
        num_words = len(text.named)
        packed.tokens[text.row, column, : num_words + 1] = True
        packed.token_kinds[text.row, column, :num_words] = TokenKind.WORD
        packed.token_kinds[text.row, column, num_words] = TokenKind.END
    return packed


def make_negatives(texts: Sequence[RegionText], encoded: torch.Tensor, batch: int) -> RegionPrompts:
    """The embeddings of `negative_texts`, whole, as the picture's own are."""
    packed = _packed(texts, encoded, batch)
    for text, column in _columns(texts):
        packed.token_kinds[text.row, column] = token_kinds(_num_tokens(text.texts), encoded.shape[1])
    return packed


def _packed(texts: Sequence[RegionText], encoded: torch.Tensor, batch: int) -> RegionPrompts:
    """One place for each text that there is."""
    most = max(Counter(text.row for text in texts).values())
    shape = (batch, most, encoded.shape[1])
    embeds, owners = encoded.new_zeros(*shape, encoded.shape[2]), torch.full((batch, most), NOBODYS)
    for (text, column), row in zip(_columns(texts), encoded, strict=True):
        embeds[text.row, column], owners[text.row, column] = row, text.region
    tokens, kinds = torch.zeros(shape, dtype=torch.bool), torch.full(shape, int(TokenKind.PADDING))
    return RegionPrompts(embeds, tokens, kinds, owners)


def _columns(texts: Sequence[RegionText]) -> list[tuple[RegionText, int]]:
    """Each text with its number among those of its prompt."""
    seen: Counter[int] = Counter()
    columns = []
    for text in texts:
        columns.append((text, seen[text.row]))
        seen[text.row] += 1
    return columns


def _num_tokens(texts: Sequence[ParsedPrompt]) -> int:
    """Tokens of a text, start and end included, where most encoders' count; learned ones as they are written out."""
    return max(text.num_tokens for text in texts)


def _region_start(text: ParsedPrompt) -> int:
    """Index of the first token behind `REGION_PROMPT`."""
    return len(text.tokenizer(REGION_PROMPT).input_ids) - 1  # the end of the text is not part of it


def _shifted(span: range, by: int) -> range:
    return range(span.start + by, span.stop + by)
