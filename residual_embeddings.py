"""The adapter as data: a subject is a delta on the text encoder's output at the tokens of its class phrase.

Token positions count the start token as 0, so the first word of a prompt is at 1.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

__multisubject_version__ = "0.1.0"

# A subject's name in a prompt: `<petrucci>`. A lone `<`, as in `i <3 dogs`, is ordinary text.
_BRACKETED = re.compile(r"<([^<>]+)>")


@dataclass(frozen=True)
class ResidualEmbedding:
    """One subject.

    Args:
        class_phrase: the words that stand for the subject in a prompt, e.g. `person`; empty if its file does not say.
        deltas: text encoder's name -> float32 tensor `(num_tokens, embed_dim)`, one row per token of the class phrase.
            Stable Diffusion 1.x and 2.x have `text_encoder` alone.
        metadata: plain JSON data that travels with the subject: base model, fingerprint, method, steps, licence …
    """

    class_phrase: str
    deltas: Mapping[str, torch.Tensor]
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def delta(self) -> torch.Tensor:
        """The first text encoder's delta, `(num_tokens, embed_dim)`."""
        return self.deltas["text_encoder"]


@dataclass(frozen=True)
class Mention:
    """One place of a prompt where a loaded subject stands.

    Args:
        subject: the name that the subject was loaded under.
        phrase: the words that stand there, as the text encoder reads them.
        span: their token indices.
    """

    subject: str
    phrase: str
    span: range


class Place(NamedTuple):
    """Where a phrase stands in a prompt: the words as they are written there, and their token indices."""

    words: str
    span: range


@dataclass(frozen=True)
class ParsedPrompt:
    """A prompt whose subjects have been found.

    Args:
        text: what the text encoder reads: every `<name>` replaced by its subject's class phrase.
        mentions: the loaded subjects of this prompt, in reading order; one that is named twice is there twice.
        tokenizer: the tokenizer that the spans are true for.
    """

    text: str
    mentions: tuple[Mention, ...]
    tokenizer: Any = field(repr=False, compare=False)

    @property
    def num_tokens(self) -> int:
        """How many tokens it has, start and end included and none cut off, learned ones as they are written out."""
        return len(_tokenize(self.tokenizer, self.text)) + 2

    def find(self, phrase: str, occurrence: int | None = None) -> Place:
        """Where that stands which a layout addresses: a subject's name, with or without `<>`, or words of the prompt.

        In `<rex> and a dog`, read as `dog and a dog`, `rex` is the first dog and `dog` is the other one: without
        `occurrence`, words that a subject stands for count only if there are no others.

        Args:
            phrase: a subject's name means the places where that subject stands; anything else means words, with
                subjects among them as in the prompt (`red <rex>`).
            occurrence: 1-based, which of several places; needed only when there are several.

        Raises:
            ValueError: the phrase is missing, ambiguous without `occurrence`, or cut off by the tokenizer's limit.
        """
        named, words = self._find_all(phrase)
        if not named and not words:
            raise ValueError(_missing(phrase, self.text, [mention.subject for mention in self.mentions]))
        if occurrence is None:
            places = self._meant(named, words)
            if len(places) > 1:
                raise ValueError(
                    f"phrase {phrase!r} is ambiguous: it stands {len(places)} times in the prompt {self.text!r}. Say "
                    f"which one with `occurrence` (1 to {len(named or words)}) in a list layout, or give each its own "
                    "subject `<name>`."
                )
        else:
            places = words if set(named) <= set(words) else named
        if occurrence is not None and not 1 <= occurrence <= len(places):
            raise ValueError(
                f"occurrence {occurrence} of phrase {phrase!r} does not exist: it stands {len(places)} time(s) in the "
                f"prompt {self.text!r}, counted from 1."
            )
        place = places[(occurrence or 1) - 1]
        _check_not_cut(self.tokenizer, self.text, phrase, place.span)
        return place

    def find_all(self, phrase: str) -> list[Place]:
        """Every place that `find` would choose from, in reading order, but for those that are cut off; perhaps none."""
        places = self._meant(*self._find_all(phrase))
        return [place for place in places if place.span.stop < self.tokenizer.model_max_length]

    def _find_all(self, phrase: str) -> tuple[list[Place], list[Place]]:
        """Where the subject of this name stands, and where the words do."""
        bracketed = _BRACKETED.fullmatch(phrase.strip())
        name = (bracketed[1] if bracketed else phrase).strip()
        named = [
            Place(mention.phrase, mention.span)
            for mention in self.mentions
            if mention.subject.casefold() == name.casefold()
        ]
        if not named and f"<{name}>".casefold() in map(str.casefold, self.tokenizer.get_added_vocab()):
            # of a textual inversion
            named = list(_iterate_places(self.tokenizer, self.text, f"<{name}>"))
        return named, self._find_words(name)

    def _meant(self, named: list[Place], words: list[Place]) -> list[Place]:
        """Without `occurrence`: where the subject stands, or else words that no subject stands for, or else any."""
        mentioned = [Place(mention.phrase, mention.span) for mention in self.mentions]
        return named or [place for place in words if place not in mentioned] or words

    def _find_words(self, phrase: str) -> list[Place]:
        """Where the words of a phrase stand: of `red <rex>`, where the text has `red dog` and that dog is rex."""
        words = {mention.subject.casefold(): mention.phrase for mention in self.mentions}
        named = [name for match in _BRACKETED.finditer(phrase) if (name := match[1].strip().casefold()) in words]
        text = _BRACKETED.sub(lambda match: words.get(match[1].strip().casefold(), match[0]), phrase)
        places = list(_iterate_places(self.tokenizer, self.text, text))
        if not named:
            return places
        return [
            place
            for place in places
            if named == [mention.subject.casefold() for mention in self.mentions if mention.span.start in place.span]
        ]


def parse_prompt(
    tokenizer: Any,
    prompt: str,
    subjects: Mapping[str, ResidualEmbedding],
    *,
    by_phrase: bool = True,
    learned: Iterable[str] = (),
) -> ParsedPrompt:
    """Replace every `<name>` by its subject's class phrase and find the tokens of all loaded subjects.

    A prompt with a `<name>` in it means its subjects by name, and its other words are plain words. A prompt without
    any means a subject wherever its class phrase stands (the longest phrase where several fit). Loaded subjects that
    the prompt does not mention are left out. Textual-inversion tokens stay for `encode_prompt` to expand; the spans
    count that expansion.

    Args:
        tokenizer: a CLIP tokenizer, slow or fast.
        prompt: the prompt as the user wrote it.
        subjects: name -> subject, the ones that are in use.
        by_phrase: False: only `<name>` means a subject, as in a negative prompt.
        learned: tokens of textual inversions that another text encoder knows and this one reads as text.

    Raises:
        ValueError: a `<name>` that is not loaded; a plain class phrase that several loaded subjects share or that
            stands there twice; a mention that is cut off by the tokenizer's limit.
    """
    if unsaid := [name for name, subject in subjects.items() if not subject.class_phrase]:
        raise ValueError(f"subjects {unsaid} have no class phrase; load them with the one that they were trained with.")
    names = {name.casefold(): name for name in subjects}
    tokenizer_words = {word.casefold() for word in (*tokenizer.get_added_vocab(), *learned)}
    prompt = _normalize(prompt)
    text, position = "", 0
    places: list[tuple[str, int, int]] = []
    for match in _BRACKETED.finditer(prompt):
        name = names.get(match[1].strip().casefold())
        if name is None:
            if match[0].casefold() in tokenizer_words:
                continue
            raise ValueError(
                f"prompt names the subject {match[0]!r}, which is not loaded: expected one of "
                f"{_quoted(f'<{known}>' for known in subjects) or 'none, as no subject is loaded'}. "
                f"Load it with `load_subject(…, name={match[1].strip()!r})` or correct the name in {prompt!r}."
            )
        text += prompt[position : match.start()]
        start = len(text)
        text += _normalize(subjects[name].class_phrase)
        places.append((name, start, len(text)))
        position = match.end()
    text += prompt[position:]
    if by_phrase and not places:
        places = _find_plain_subjects(text, subjects)

    mentions = []
    for name, start, end in places:
        span = _token_span(tokenizer, text, start, end)
        if span is None:
            raise ValueError(
                f"subject {name!r} runs into the characters beside it in {text!r}: its class phrase must be whole "
                "words there. Put a space or a comma on both sides of it."
            )
        _check_not_cut(tokenizer, text, text[start:end], span)
        mentions.append(Mention(name, text[start:end], span))
    return ParsedPrompt(text, tuple(mentions), tokenizer)


def find_token_spans(tokenizer: Any, prompt: str, phrase: str) -> list[range]:
    """Token indices of every occurrence of a phrase in a prompt, in reading order.

    Whole words are matched, in any case: `dog` is in `Dog, cat` and in `a dog's bone`, not in `dogma`.

    Args:
        tokenizer: a CLIP tokenizer, slow or fast.
        prompt: plain text, as the text encoder reads it.
        phrase: one word or several.

    Returns:
        One range per occurrence, at least one.

    Raises:
        ValueError: the phrase is not in the prompt, or an occurrence is cut off by the tokenizer's limit.
    """
    text = _normalize(prompt)
    spans = [place.span for place in _iterate_places(tokenizer, text, phrase)]
    if not spans:
        raise ValueError(_missing(phrase, prompt))
    for span in spans:
        _check_not_cut(tokenizer, text, phrase, span)
    return spans


def add_residuals(
    prompt_embeds: torch.Tensor,
    residuals: Sequence[tuple[ResidualEmbedding, range, float]],
    *,
    text_encoder: str = "text_encoder",
) -> torch.Tensor:
    """Add `weight * delta` to a prompt's embeddings at each subject's tokens.

    Args:
        prompt_embeds: `(..., num_tokens, embed_dim)`, all of the same prompt; left as it is.
        residuals: `(subject, span, weight)` each.
        text_encoder: whose deltas to take.

    Returns:
        A new tensor of the same shape, dtype and device, summed in float32. Gradients reach the deltas.

    Raises:
        ValueError: a subject has no delta for this text encoder, a delta's rows differ from its span's length or its
            width from the embeddings', a span lies outside the sequence, or two spans overlap.
    """
    num_tokens, embed_dim = prompt_embeds.shape[-2:]
    total = prompt_embeds.to(torch.promote_types(prompt_embeds.dtype, torch.float32), copy=True)
    taken: dict[int, str] = {}
    for subject, span, weight in residuals:
        phrase, delta = subject.class_phrase, subject.deltas.get(text_encoder)
        if delta is None:
            raise ValueError(
                f"residual of {phrase!r} has no delta for {text_encoder!r}, only for {_quoted(subject.deltas)}. "
                "Use a base model with the text encoders that the subject was trained with."
            )
        if delta.shape != (len(span), embed_dim):
            raise ValueError(
                f"residual of {phrase!r} has shape {tuple(delta.shape)}, expected {(len(span), embed_dim)}: one row "
                f"for each of the {len(span)} token(s) at {_positions(span)} and the text encoder's width {embed_dim}. "
                "Use the class phrase and the base model that the subject was trained with."
            )
        if not 0 <= span.start < span.stop <= num_tokens:
            raise ValueError(
                f"residual of {phrase!r} goes to {_positions(span)}, expected indices within the {num_tokens} tokens "
                "of prompt_embeds. Take the span from `find_token_spans` with this text encoder's tokenizer."
            )
        if clash := [index for index in span if index in taken]:
            raise ValueError(
                f"residuals of {taken[clash[0]]!r} and {phrase!r} overlap at {_positions(clash)}; expected one subject "
                "per token. Give each subject words of its own in the prompt."
            )
        taken.update(dict.fromkeys(span, phrase))
        total[..., span.start : span.stop, :] += weight * delta.to(total)
    return total.to(prompt_embeds.dtype)


def _find_plain_subjects(text: str, subjects: Mapping[str, ResidualEmbedding]) -> list[tuple[str, int, int]]:
    """Where loaded subjects stand in a prompt without `<name>`: `(name, start, end)` in characters, reading order."""
    owners: dict[str, list[str]] = {}
    for name, subject in subjects.items():
        owners.setdefault(" ".join(_normalize(subject.class_phrase).casefold().split()), []).append(name)
    places: list[tuple[str, int, int]] = []
    for phrase in sorted(owners, key=len, reverse=True):
        free = [
            (start, end)
            for start, end in _iterate_words(text, phrase)
            if all(end <= other_start or other_end <= start for _, other_start, other_end in places)
        ]
        if free and len(owners[phrase]) > 1:
            raise ValueError(
                f"phrase {phrase!r} in the prompt {text!r} is ambiguous: the subjects {_quoted(owners[phrase])} all "
                f"stand for it. Name the one that is meant: {_quoted(f'<{name}>' for name in owners[phrase])}."
            )
        name = owners[phrase][0]
        if len(free) > 1:
            raise ValueError(
                f"phrase {phrase!r} is ambiguous: it stands {len(free)} times in the prompt {text!r} and the subject "
                f"{name!r} stands for it. Write '<{name}>' where the subject is meant."
            )
        places.extend((name, start, end) for start, end in free)
    return sorted(places, key=lambda place: place[1])


def _iterate_words(text: str, phrase: str) -> Iterator[tuple[int, int]]:
    """Whole-word occurrences of a phrase, any case and spacing: `(start, end)` in characters of the normalized text."""
    words = [re.escape(word) for word in _normalize(phrase).split()]
    if not words:
        raise ValueError(f"phrase {phrase!r} is empty; expected one or more words of the prompt.")
    # An edge that is a letter or digit must end a word; an edge that is punctuation ends one by itself.
    pattern = r"(?:(?<!\w)|(?!\w))" + r"\s+".join(words) + r"(?:(?!\w)|(?<!\w))"
    for match in re.finditer(pattern, text, re.IGNORECASE):
        yield match.start(), match.end()


def _iterate_places(tokenizer: Any, text: str, phrase: str) -> Iterator[Place]:
    """Every occurrence of a phrase, cut off or not."""
    for start, end in _iterate_words(text, phrase):
        span = _token_span(tokenizer, text, start, end)
        if span is not None:
            yield Place(text[start:end], span)


def _token_span(tokenizer: Any, text: str, start: int, end: int) -> range | None:
    """Token indices of `text[start:end]`, or None if a token crosses one of the two edges.

    Slow tokenizers know no character offsets, so this counts the tokens of the text before each edge; they must be the
    first tokens of the whole text, else the edge is inside a token (`dog` in the learned token `<dog>`).
    """
    tokens = _tokenize(tokenizer, text)
    edges = []
    for edge in (start, end):
        before = _tokenize(tokenizer, text[:edge])
        if tokens[: len(before)] != before:
            return None
        edges.append(1 + len(before))  # 1: the start token
    return range(*edges) if edges[0] < edges[1] else None


def _tokenize(tokenizer: Any, text: str) -> list[str]:
    """Tokens of a text without start and end, untruncated, learned tokens of several vectors written out."""
    added = tokenizer.get_added_vocab()
    tokens: list[str] = []
    for token in tokenizer.tokenize(text, verbose=False):  # too long a text is for us to tell
        tokens.append(token)
        # diffusers' `maybe_convert_prompt` puts `<cat>_1`, `<cat>_2`, … after `<cat>` when the prompt is encoded.
        number = 1
        while token in added and f"{token}_{number}" in added:
            tokens.append(f"{token}_{number}")
            number += 1
    return tokens


def _check_not_cut(tokenizer: Any, text: str, phrase: str, span: range) -> None:
    limit = tokenizer.model_max_length
    if span.stop <= limit - 1:  # the last index belongs to the end token
        return
    num_tokens = len(_tokenize(tokenizer, text))
    words = list(re.finditer(r"\S+", text))
    kept = next(
        (i for i, word in enumerate(words) if len(_tokenize(tokenizer, text[: word.end()])) > limit - 2), len(words)
    )
    raise ValueError(
        f"phrase {phrase!r} is cut off: the prompt has {num_tokens} tokens and the text encoder reads {limit - 2}, so "
        f"{' '.join(word[0] for word in words[kept:])!r} is lost. Shorten the prompt or move the phrase forward."
    )


def _missing(phrase: str, text: str, subjects: Sequence[str] = ()) -> str:
    if next(_iterate_words(text, phrase), None):  # CLIP reads `'dog'` as `'d`, `og`, `'`
        return (
            f"phrase {phrase!r} is in the prompt {text!r}, but the tokenizer joins it to the characters beside it. "
            "Put a space on both sides of it."
        )
    found = _quoted(dict.fromkeys(re.findall(r"\w+(?:['’-]\w+)*", text.lower())), most=77) or "none"
    named = f" and the subjects {_quoted(f'<{name}>' for name in dict.fromkeys(subjects))}" if subjects else ""
    return (
        f"phrase {phrase!r} is not in the prompt {text!r}; the words found are {found}{named}. "
        "Write the phrase as it stands in the prompt, or add it there; a loaded subject is added as `<name>`."
    )


def _normalize(text: str) -> str:
    """CLIP's tokenizers read NFC text; in another form the search would miss words that look the same."""
    return unicodedata.normalize("NFC", text)


def _quoted(words: Iterable[str], most: int = 8) -> str:
    """Words of an error message; of many, the first ones and how many more there are."""
    listed = [repr(word) for word in words]
    return ", ".join(listed[:most]) + (f" and {len(listed) - most} more" if len(listed) > most else "")


def _positions(indices: Sequence[int]) -> str:
    return f"token indices {indices[0]} to {indices[-1]}" if len(indices) > 1 else f"token index {indices[0]}"
