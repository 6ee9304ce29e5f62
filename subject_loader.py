"""The pipelines' adapter verbs, named as diffusers names those of LoRA: load, unload, list and set subjects."""

from __future__ import annotations

import math
import numbers
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Unpack, cast

import numpy as np
import torch

from .base_models import check_class_phrase_fits, check_subject_fits
from .hub_client import HubOptions
from .hub_utils import load_subject
from .residual_embeddings import ParsedPrompt, ResidualEmbedding, add_residuals, parse_prompt
from .shared_models import in_turn
from .subject_file import some_of

__multisubject_version__ = "0.1.0"


@dataclass(frozen=True)
class EncoderSlot:
    """Where a text encoder's output lies in the prompt embeddings `(prompts, tokens, dim)` that the UNet reads.

    Args:
        name: of the pipeline's component, and of a subject's delta: `text_encoder`, `text_encoder_2`.
        tokenizer: its tokenizer, or None.
        width: columns that it fills; slots follow one another. None if the encoder is not loaded.
        prompt: the argument of a call that holds what it reads, `prompt` or `prompt_2`; without one it reads the first.
    """

    name: str
    tokenizer: Any
    width: int | None
    prompt: str

    @property
    def negative_prompt(self) -> str:
        """The argument with what not to show."""
        return f"negative_{self.prompt}"

    @property
    def prompts(self) -> tuple[str, str]:
        """Both."""
        return self.prompt, self.negative_prompt


def hidden_size(text_encoder: Any) -> int | None:
    """Columns of a text encoder's output; None where it is not loaded."""
    return getattr(getattr(text_encoder, "config", None), "hidden_size", None)


class SubjectLoaderMixin:
    """Loaded subjects and their weights. A pipeline says through `encoder_slots` which text encoders it has.

    Attributes:
        subjects: name -> `ResidualEmbedding`, the loaded subjects.
    """

    subjects: dict[str, ResidualEmbedding]
    _subject_weights: dict[str, float]

    @property
    def encoder_slots(self) -> list[EncoderSlot]:
        """The text encoders whose outputs make the prompt embeddings, in their order there."""
        raise NotImplementedError

    def load_subject(
        self,
        source: str | os.PathLike[str],
        name: str | None = None,
        class_phrase: str | None = None,
        **hub_options: Unpack[HubOptions],
    ) -> list[str]:
        """Load the subject, or all the subjects, of a file, a folder or a Hub repository; prompts then name `<name>`.

        Args:
            source: `.safetensors` file, Cones 2 `.pt` file, folder or Hub id.
            name: what to call the subject; which one to take if the source holds several.
            class_phrase: words that stand for the subject in a prompt; default: what the file says. A `.pt` does not.
            hub_options: `revision`, `token`, `cache_dir`, `force_download`, `local_files_only`.

        Returns:
            The names that were loaded.

        Raises:
            ValueError: a name is taken, or the subject was not made for this base model.
        """
        if any(slot.width is None or slot.tokenizer is None for slot in self.encoder_slots):
            raise ValueError("The pipeline has no tokenizer or no text encoder, which subjects need; load both.")
        loaded = load_subject(source, name=name, class_phrase=class_phrase, **hub_options)
        accepted = [*self.subjects]
        with self._reading():
            for new_name, subject in loaded.items():
                self._check_subject(new_name, subject, accepted)
                accepted.append(new_name)
        self.subjects.update(loaded)
        return list(loaded)

    def unload_subject(self, name: str) -> None:
        """Forget a subject."""
        self._check_loaded([name])
        del self.subjects[name]
        self._subject_weights.pop(name, None)

    def get_list_subjects(self) -> list[str]:
        """Names of the loaded subjects."""
        return list(self.subjects)

    def set_subjects(self, names: str | Sequence[str], weights: float | Sequence[float] | None = None) -> None:
        """Choose the active subjects and scale their residuals; the other loaded ones become their plain class.

        Args:
            names: loaded subjects; an empty list makes class phrases plain words everywhere.
            weights: factor of each residual, or one for all; default 1. Not saved by `save_pretrained`.

        Raises:
            ValueError, TypeError: a subject that is not loaded or stands twice; a weight that is no finite number.
        """
        if not isinstance(names, (str, Sequence)):
            raise TypeError(
                f"`names` is {names!r}, expected a subject's name or a list of names; factors go to `weights`."
            )
        names = [names] if isinstance(names, str) else list(names)
        if isinstance(weights, (np.ndarray, torch.Tensor)):
            weights = weights.tolist()
        factors = list(weights) if isinstance(weights, Sequence) else [1.0 if weights is None else weights] * len(names)
        self._check_loaded(names)
        if len(set(names)) < len(names):
            raise ValueError(f"`names` is {names}, expected every subject once.")
        for factor in factors:
            if not isinstance(factor, numbers.Real):
                raise TypeError(f"`weights` has {factor!r}, expected numbers such as 0.8.")
            if not abs(factor) < math.inf:
                raise ValueError(f"`weights` has {factor!r}, expected finite numbers such as 0.8.")
        if len(factors) != len(names):
            raise ValueError(
                f"`weights` has {len(factors)} entries, expected one for each of the {len(names)} `names`."
            )
        self._subject_weights = dict.fromkeys(self.subjects, 0.0) | dict(zip(names, factors, strict=True))

    def load_textual_inversion(
        self,
        pretrained_model_name_or_path: Any,
        token: str | list[str] | None = None,
        tokenizer: Any = None,
        text_encoder: Any = None,
        **kwargs: Any,
    ) -> None:
        """As the base's. Raises `ValueError` if a token would be called like a loaded subject; none is kept then."""
        read_by: Any = tokenizer or getattr(self, "tokenizer", None)
        known = {} if read_by is None else read_by.get_added_vocab()  # without one, the base says what is missing
        super().load_textual_inversion(  # type: ignore[misc]
            pretrained_model_name_or_path, token, tokenizer, text_encoder, **kwargs
        )
        learned = sorted(set(read_by.get_added_vocab()) - set(known))
        for name in self.subjects:
            if f"<{name}>".casefold() in map(str.casefold, learned):
                self.unload_textual_inversion(learned, tokenizer, text_encoder)  # type: ignore[attr-defined]
                raise ValueError(
                    f"The textual inversion's token '<{name}>' is the name of a loaded subject: a prompt could not"
                    f" tell them apart. Pass another `token`, or `unload_subject({name!r})` first."
                )

    # --- what a prompt names -----------------------------------------------------------------------------------------

    def _reading(self) -> AbstractContextManager[Any]:
        """Within the context, no other thread uses the tokenizers."""
        return in_turn(*(slot.tokenizer for slot in self.encoder_slots))

    def parse_prompts(
        self, prompt: str | list[str] | None, slot: EncoderSlot, by_name: Sequence[bool] | None
    ) -> list[ParsedPrompt]:
        """Prompts as a text encoder reads them, with their subjects found; none where there is no tokenizer.

        Args:
            prompt: a text or several.
            slot: the text encoder.
            by_name: for each prompt whether only `<name>` means a subject, since the prompt or what stands beside it as
                `prompt_2` has one; None: of negative prompts that is always so.
        """
        if prompt is None or slot.tokenizer is None:
            return []
        learned = {
            word for other in self.encoder_slots if other.tokenizer for word in other.tokenizer.get_added_vocab()
        }
        texts = [prompt] if isinstance(prompt, str) else prompt
        return [
            parse_prompt(
                slot.tokenizer,
                text,
                self.subjects if by_name is None else self._subjects_in_use(text),
                by_phrase=not named,
                learned=learned,
            )
            for text, named in zip(texts, by_name or [True] * len(texts), strict=True)
        ]

    def _by_name(self, prompts: Sequence[str | list[str] | None]) -> list[bool]:
        """For each prompt whether it, or what another text encoder reads beside it, names a loaded subject outright."""
        lists = [[prompt] if isinstance(prompt, str) else prompt for prompt in prompts if prompt]
        named = [f"<{name}>".casefold() for name in self.subjects]
        return [any(name in text.casefold() for text in texts for name in named) for texts in zip(*lists, strict=True)]

    def add_subjects(
        self, prompt_embeds: torch.Tensor, texts: Sequence[Sequence[ParsedPrompt]], num_images_per_prompt: int = 1
    ) -> torch.Tensor:
        """Prompt embeddings with the residuals of the subjects that the prompts name.

        Args:
            prompt_embeds: `(prompts * num_images_per_prompt, tokens, dim)`.
            texts: for each text encoder the prompts as it reads them; empty lists: nothing is known of them.
            num_images_per_prompt: rows per prompt.
        """
        if not any(text.mentions for of_slot in texts for text in of_slot):
            return prompt_embeds
        slots = self.encoder_slots
        if any(slot.width is None for slot in slots):
            raise ValueError("The prompt names subjects, which need all text encoders; load them.")
        widths = [cast(int, slot.width) for slot in slots]
        columns = []
        for slot, of_slot, part in zip(slots, texts, prompt_embeds.split(widths, dim=-1), strict=True):
            if len(of_slot) == 1:  # a negative prompt may be one for all prompts
                of_slot = [*of_slot] * (len(part) // num_images_per_prompt)
            rows = []
            for text, of_prompt in zip(of_slot, part.split(num_images_per_prompt), strict=bool(of_slot)):
                residuals = [
                    (self.subjects[mention.subject], mention.span, self._subject_weights.get(mention.subject, 1.0))
                    for mention in text.mentions
                ]
                rows.append(add_residuals(of_prompt, residuals, text_encoder=slot.name) if residuals else of_prompt)
            columns.append(torch.cat(rows) if rows else part)
        return torch.cat(columns, dim=-1)

    def _subjects_in_use(self, text: str) -> dict[str, ResidualEmbedding]:
        """The active subjects, and of the inactive ones those that the prompt names outright."""
        return {
            name: subject
            for name, subject in self.subjects.items()
            if self._subject_weights.get(name, 1.0) or f"<{name}>".casefold() in text.casefold()
        }

    # --- checks ------------------------------------------------------------------------------------------------------

    def _check_loaded(self, names: Sequence[str]) -> None:
        if missing := [name for name in names if name not in self.subjects]:
            raise ValueError(f"Subjects {missing} are not loaded; the loaded ones are {some_of(self.subjects)}.")

    def _check_subject(self, name: str, subject: ResidualEmbedding, names: Sequence[str]) -> None:
        for taken in names:  # prompts name subjects in any case
            if name.casefold() == taken.casefold():
                raise ValueError(
                    f"A subject {taken!r} is loaded already. Pass another `name`, or `unload_subject({taken!r})` first."
                )
        encoders: Mapping[str, Any] = {slot.name: getattr(self, slot.name) for slot in self.encoder_slots}
        for slot in self.encoder_slots:
            if f"<{name}>".casefold() in map(str.casefold, slot.tokenizer.get_added_vocab()):
                raise ValueError(
                    f"The tokenizer has a learned token '<{name}>' already, from a textual inversion. Pass another"
                    " `name`."
                )
        base_model = self.config.get("_name_or_path")  # type: ignore[attr-defined]
        check_subject_fits(subject, encoders, name=name, base_model=base_model)
        if not subject.class_phrase:
            raise ValueError(
                f"The file of subject {name!r} does not say which words it was trained with, as no `.pt` does. Pass"
                f" them as `class_phrase`, such as `load_subject(…, name={name!r}, class_phrase='person')`."
            )
        check_class_phrase_fits(subject, {slot.name: slot.tokenizer for slot in self.encoder_slots}, name=name)
