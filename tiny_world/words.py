"""The words of the drawn world: its tokenizer, and what a caption says of each thing in it."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import CLIPTokenizer

from multisubject.tiny_world.scenes import (
    ADJECTIVES,
    CATEGORIES,
    COLOURS,
    PATTERNS,
    SCALES,
    SETTINGS,
    World,
    describe,
    random_scene,
)

MAX_TOKENS = 77
ATTRIBUTES = {  # what a noun's adjectives may say; class 0 is "not said"
    "category": CATEGORIES,
    "colour": tuple(COLOURS),
    "pattern": PATTERNS,
    "second_colour": tuple(COLOURS),
    "scale": tuple(SCALES),
    "accessory": tuple(COLOURS),
}


def make_tokenizer(folder: Path) -> CLIPTokenizer:
    """A CLIP tokenizer (byte-pair encoding, 77 tokens) whose vocabulary holds the words of the whole renderer."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    if not (folder / "tokenizer.json").exists():
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())  # all 256 bytes, so that no text is unknown
        bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
        bpe.normalizer, bpe.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
        rng = random.Random(0)
        world = World(categories=CATEGORIES, colours=tuple(COLOURS), patterns=PATTERNS, settings=SETTINGS)
        captions = [describe(random_scene(rng, world), rng) for _ in range(5000)]
        special = ["<|startoftext|>", "<|endoftext|>"]
        bpe.train_from_iterator(
            captions,
            trainers.BpeTrainer(
                vocab_size=1024,
                end_of_word_suffix="</w>",
                initial_alphabet=letters,
                special_tokens=special,
                show_progress=False,
            ),
        )
        model = json.loads(bpe.to_str())["model"]
        vocabulary = model["vocab"]
        for letter in letters:
            for token in (letter, letter + "</w>"):
                vocabulary.setdefault(token, len(vocabulary))
        merges = [tuple(merge) if isinstance(merge, list) else tuple(merge.split()) for merge in model["merges"]]
        tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MAX_TOKENS)
        tokenizer.save_pretrained(folder)
        # transformers 4 reads these two instead of tokenizer.json's model.
        (folder / "vocab.json").write_text(json.dumps(vocabulary))
        (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(merge) for merge in merges) + "\n")
    return CLIPTokenizer.from_pretrained(folder)


def tokenize(tokenizer: CLIPTokenizer, texts: Sequence[str]) -> torch.Tensor:
    """`(texts, 77)` int16."""
    tokens = tokenizer(list(texts), padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt")
    return tokens.input_ids.short()


def word_ids(tokenizer: CLIPTokenizer, words: Sequence[str]) -> list[int]:
    """Token ids of words that are one token each. ValueError for a word of several tokens."""
    ids = [tokenizer(word, add_special_tokens=False).input_ids for word in words]
    if longer := [word for word, tokens in zip(words, ids, strict=True) if len(tokens) != 1]:
        raise ValueError(f"the tokenizer splits {longer}, expected one token each.")
    return [tokens[0] for tokens in ids]


def said_looks(words: Sequence[str]) -> list[dict[str, str] | None]:
    """For each word of a caption what it says of its object if it is a noun: attribute -> word; None for other words.

    Reads the phrases that `scenes.describe` writes: `yellow trimmed blue fine orange striped person`.
    """
    found: list[dict[str, str] | None] = []
    phrase: list[str] = []
    for word in words:
        look: dict[str, str] | None = None
        if word in CATEGORIES:
            look = {"category": word}
            if "trimmed" in phrase:
                look["accessory"] = phrase[phrase.index("trimmed") - 1]
                phrase = phrase[phrase.index("trimmed") + 1 :]
            colours = [adjective for adjective in phrase if adjective in COLOURS]
            look.update(zip(("colour", "second_colour"), colours, strict=False))
            look.update(("scale", adjective) for adjective in phrase if adjective in SCALES)
            look.update(("pattern", adjective) for adjective in phrase if adjective in PATTERNS)
        phrase = [*phrase, word] if word in ADJECTIVES else []
        found.append(look)
    return found
