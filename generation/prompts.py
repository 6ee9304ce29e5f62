"""What a prompt names: which of its words are personal subjects, and does what is known of each fit them?"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from multisubject.generation.base_model import BaseModel
from multisubject.generation.config_file import GenerationConfig, Report
from multisubject.hub_utils import load_subject
from multisubject.residual_embeddings import ResidualEmbedding
from multisubject.unknown_names import did_you_mean

_WORD = re.compile(r"\w+(?:['’-]\w+)*")


def mark_subjects(
    config: GenerationConfig, index: int, report: Report, base: BaseModel, region_texts: Sequence[str] = ()
) -> tuple[str, dict[str, tuple[str, str | None]]]:
    """Write the entry's personal subjects as `<name>`: the prompt, and name -> (key, class phrase if plain).

    A word that is already marked keeps its file's own class phrase; a plain one *is* the class phrase. In what regions
    say of their own, `region_texts`, only marked ones are subjects.
    """
    places: dict[tuple[int, int], str] = {}  # characters of the prompt -> key
    if config.subject_list is not None:
        for position, (key, number) in enumerate(config.subject_list):
            with report.collect(index, "subject_list"):
                place = _find_place(config, base.tokenizers["text_encoder"], key, number)
                if any(_overlap(place, other) for other in places):
                    raise ValueError(
                        f"pair {position + 1} names the same word as another pair; expected each word once."
                    )
                places[place] = key
    found = {key: list(_find_phrase(config.prompt, key)) for key in config.residual_dict}
    in_regions = [
        key
        for key in config.residual_dict
        if any(text[start] == "<" for text in region_texts for start, _ in _find_phrase(text, key))
    ]
    names_of: dict[str, str] = {}
    for key in (key for key, hits in found.items() if hits or key in in_regions):
        other = names_of.setdefault(subject_name(key).casefold(), key)
        if other != key:
            report.problem(
                f"{other!r} and {key!r} mean the same name in a prompt, where case and spaces do not count; expected "
                "different ones. Rename one, here and in the prompt.",
                index,
                "residual_dict",
                key,
            )
    marked = {place: key for key, hits in found.items() for place in hits if config.prompt[place[0]] == "<"}
    for place in [place for place in places if place not in marked and any(_overlap(place, mark) for mark in marked)]:
        word, (start, end) = places.pop(place), next(mark for mark in marked if _overlap(place, mark))
        report.problem(
            f"{word!r} is a part of {config.prompt[start:end]!r}, which the prompt marks as a subject of its own; "
            "expected one of both.",
            index,
            "subject_list",
        )
    places |= marked
    if config.subject_list is None and not marked:
        for key in sorted(found, key=len, reverse=True):  # `red dog` before `dog`
            free = [place for place in found[key] if not any(_overlap(place, other) for other in places)]
            if len(free) > 1:
                message = f"{key!r} stands {len(free)} times in the prompt: say which one is the subject, as `<{key}>`."
                report.problem(message, index, "prompt")
            places |= dict.fromkeys(free[:1], key)

    prompt = config.prompt
    names: dict[str, tuple[str, str | None]] = {}
    for (start, end), key in sorted(places.items(), reverse=True):
        name = subject_name(key)
        prompt = f"{prompt[:start]}<{name}>{prompt[end:]}"
        if name not in names or (start, end) not in marked:
            names[name] = (key, None if (start, end) in marked else key)
    for key in in_regions:
        names.setdefault(subject_name(key), (key, None))
    return prompt, dict(sorted(names.items()))


def subject_name(key: str) -> str:
    """What the prompt calls the subject of a key of `residual_dict`."""
    return re.sub(r"[^\w-]+", "-", key)  # names have no spaces, phrases may


def _find_place(config: GenerationConfig, tokenizer: Any, key: str, number: int) -> tuple[int, int]:
    """The place in the prompt that a pair of `subject_list` means; its number may count words or tokens."""
    pair = f"[{json.dumps(key)}, {number}]"
    if key not in config.residual_dict:
        raise ValueError(
            f"{pair}: {key!r} has no file in residual_dict, which has {list(config.residual_dict)}; add it there, or "
            "leave the pair out to draw the plain word."
        )
    places = list(_find_phrase(config.prompt, key))
    if not places:
        words = ", ".join(f"{number} {word!r}" for number, word in enumerate(_WORD.findall(config.prompt), 1))
        raise ValueError(f"{pair}: {key!r} is not in the prompt, whose words are {words}.")
    by_word = [1 + len(_WORD.findall(config.prompt[:start])) for start, _ in places]
    # Tokens can be counted only where the prompt is what the text encoder will read.
    by_token = [1 + len(tokenizer.tokenize(config.prompt[:start])) for start, _ in places]
    by_token = by_word if "<" in config.prompt else by_token
    hits = {place for numbers in (by_word, by_token) for n, place in zip(numbers, places, strict=True) if n == number}
    if len(hits) != 1:
        expected = " or ".join(
            f"{word}" if word == token else f"{word} ({token} in tokens)"
            for word, token in zip(by_word, by_token, strict=True)
        )
        problem = "means two places, one in words and one in tokens" if hits else "is not its place in the prompt"
        raise ValueError(f"{pair}: {number} {problem}; expected {expected} for {key!r}, counted from 1.")
    return hits.pop()


def _find_phrase(prompt: str, phrase: str) -> Iterator[tuple[int, int]]:
    """Whole-word occurrences in characters, with the brackets where it is marked as `<phrase>`."""
    words = r"\s+".join(map(re.escape, phrase.split()))
    for match in re.finditer(rf"<\s*{words}\s*>|(?<!\w){words}(?!\w)", prompt, re.IGNORECASE):
        yield match.span()


def _overlap(first: tuple[int, int], second: tuple[int, int]) -> bool:
    return first[0] < second[1] and second[0] < first[1]


def read_subject(source: str, name: str, key: str, class_phrase: str | None, base: BaseModel) -> ResidualEmbedding:
    """Read a subject's file. Raises `ValueError` where its residual is not one for its phrase in that base."""
    subject = load_subject(source, name=name, class_phrase=class_phrase)[name]
    if not subject.class_phrase:  # of a `.pt`, whose key in `residual_dict` is its words
        subject = replace(subject, class_phrase=key)
    expected = {
        encoder: (len(base.tokenizers[encoder].tokenize(subject.class_phrase)), width)
        for encoder, width in base.embed_dims.items()
    }
    found = {encoder: tuple(delta.shape) for encoder, delta in subject.deltas.items()}
    if found != expected:
        remedy = "Use the base model and the phrase that the subject was trained with."
        if {encoder: width for encoder, (_, width) in found.items()} == base.embed_dims:
            own = load_subject(source, name=name)[name].class_phrase
            if class_phrase is not None and own not in ("", class_phrase):
                remedy = f"It was trained as {own!r}: write `<{name}>` in the prompt, which stands for that."
            elif not own:
                remedy = (
                    "The file does not say which words it was trained with: write these in the prompt, and as its key "
                    "in residual_dict, or put them into the file with `multisubject convert --class-phrase`."
                )
        raise ValueError(
            f"{source} has {_sizes(found)}, but the phrase {subject.class_phrase!r} takes {_sizes(expected)} in "
            f"{base.name}. {remedy}"
        )
    return subject


def _sizes(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Shapes `(num_tokens, width)` of each text encoder's residual, in words."""
    return " and ".join(f"{rows} token(s) of width {width} for {encoder}" for encoder, (rows, width) in shapes.items())


def check_names(config: GenerationConfig, prompt: str, subjects: Mapping[str, Any], base: BaseModel) -> None:
    """Every `<name>` of the marked prompt is a subject, or a learned token of the base's tokenizers."""
    known = {f"<{name}>".casefold() for name in subjects} | {*map(str.casefold, base.learned)}
    for word in re.findall(r"<\s*([^<>]+?)\s*>", prompt):
        if f"<{word}>".casefold() not in known:
            otherwise = "add its file there, or leave the brackets out."
            remedy = did_you_mean(word, config.residual_dict, otherwise, form="<{}>")
            raise ValueError(
                f"{f'<{word}>'!r} has no file in residual_dict, which has {list(config.residual_dict)}; {remedy}"
            )
