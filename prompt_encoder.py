"""From words to what the UNet reads: prompts with their subjects, encoded, and where their layouts place what."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from .call_arguments import bind_arguments, check_prompts
from .guidance_methods import GuidanceMethod
from .placed_prompts import PlacedPrompt, make_conditioning, per_prompt, place_prompt
from .region_conditioning import RegionConditioning
from .region_loras import LoraCall, joined_scales, lora_names, placed_loras
from .region_texts import (
    RegionText,
    make_negatives,
    make_region_prompts,
    make_words,
    negative_texts,
    region_texts,
    text_loras,
    wants_region_prompts,
    words_texts,
)
from .residual_embeddings import ParsedPrompt
from .subject_loader import EncoderSlot, SubjectLoaderMixin

__multisubject_version__ = "0.1.0"

ENCODING_DEFAULTS = {"device": None, "num_images_per_prompt": 1, "do_classifier_free_guidance": True}
"""Of arguments of `encode_prompt` for which diffusers' has none."""

EMBEDS = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
"""What `encode_prompt` returns, by the names under which a call takes it."""


class PromptEncoderMixin(SubjectLoaderMixin):
    """Text encoders behind `encoder_slots`: prompts, subjects and regions go through each of them once."""

    def encode_prompt(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor | None, ...]:
        """As the base's, with the residuals of the subjects that the prompts name. What comes out holds the subjects
        and works wherever diffusers takes `prompt_embeds`, in image-to-image or inpainting for example.

        Args:
            prompt: may name loaded subjects, as in a call of the pipeline.
            device: where to encode; None: where the pipeline runs.
            num_images_per_prompt: rows per prompt.
            do_classifier_free_guidance: also encode the negative prompt.
            negative_prompt: may name loaded subjects as `<name>`.
            prompt_2, negative_prompt_2: the same for XL's second text encoder.
            prompt_embeds: taken as they are, instead of encoding.
            negative_prompt_embeds: the same for the negative prompt.
            lora_scale: of LoRA weights on the text encoder.
            clip_skip: layers of the text encoder to skip.

        Returns:
            Embeddings `(prompts * num_images_per_prompt, tokens, dim)` of the prompts and of the negative prompts; with
            XL also the pooled ones of both, `(prompts * num_images_per_prompt, dim)`.
        """
        return self._encode_prompts(self._encoding(args, kwargs))[0]

    def encode_with_regions(
        self, placed: Sequence[PlacedPrompt], method: GuidanceMethod | None, **encoding: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The prompts, and the regions' own texts, through every text encoder at once, with the regions' LoRAs on their
        words.

        Args:
            placed: the prompts with their regions, at least one.
            method: the guidance method; None: no step is guided, which leaves the prompts.
            encoding: the arguments of `encode_prompt`. With `prompt_embeds`, only the regions are encoded.

        Returns:
            What `encode_prompt` gives, by the names under which a call takes it, and what `RegionConditioning` has of
            the regions' own texts, by its names. Both are empty if the regions need none.
        """
        with self._reading():
            asked = self._encoding((), encoding)
            # 1. See what there is to encode
            prompts, words, negatives = list[RegionText](), list[RegionText](), list[RegionText]()
            if method is not None:
                if wants_region_prompts(method, placed, asked["prompt_embeds"] is None):
                    prompts = region_texts(placed, method)
                words = words_texts(placed)  # checks their lengths for every method
                if getattr(method, "uses_region_prompts", False):
                    words = []  # they are in `prompts`
                negatives = self._negative_texts(placed, asked) if asked["do_classifier_free_guidance"] else []
            has_loras = asked["prompt_embeds"] is None and bool(_names_of_loras(placed))
            if not (prompts or words or negatives or has_loras):
                return {}, {}

            # 2. Encode it with the prompts, and lay it out by region
            batch, held = len(placed), dict[str, Any]()
            if negatives:
                held["negatives"] = make_negatives(negatives, self._encode_negatives(asked, negatives, placed), batch)
            values, encoded = self._encode_prompts(asked, [*prompts, *words], placed)
            if prompts:
                most = max(len(of_prompt.places) for of_prompt in placed)
                held["prompts"] = make_region_prompts(prompts, encoded[: len(prompts)], (batch, most))
            if words:
                held["words"] = make_words(words, encoded[len(prompts) :], batch)
        return dict(zip(EMBEDS, values, strict=False)), held

    def _negative_texts(self, placed: Sequence[PlacedPrompt], asked: Mapping[str, Any]) -> list[RegionText]:
        if all(region.negative_prompt is None for of_prompt in placed for region in of_prompt.regions):
            return []
        if asked["negative_prompt_embeds"] is not None:
            raise ValueError(
                "`layout` has a region with a `negative_prompt`, which continues the picture's own; expected that as"
                " words, but `negative_prompt_embeds` came. Pass `negative_prompt`, or none."
            )
        slots = self.encoder_slots
        columns = []
        for slot in slots:
            text = asked[slot.negative_prompt] or asked["negative_prompt"] or ""
            if asked["negative_prompt"] is None and self.config.get("force_zeros_for_empty_prompt"):  # type: ignore[attr-defined]
                text = ""  # the picture's own is zeros then
            columns.append([text] * len(placed) if isinstance(text, str) else text)

        def read(texts: Sequence[str]) -> list[ParsedPrompt]:
            return [self.parse_prompts(text, slot, None)[0] for text, slot in zip(texts, slots, strict=True)]

        return negative_texts(placed, list(zip(*columns, strict=True)), read)

    def _encode_negatives(
        self, asked: Mapping[str, Any], texts: Sequence[RegionText], placed: Sequence[PlacedPrompt]
    ) -> torch.Tensor:
        """`(texts, tokens, dim)`, as diffusers encodes negative prompts, whatever `clip_skip` is."""
        alone = _positive_alone(asked) | {"clip_skip": None}
        for number, slot in enumerate(self.encoder_slots):
            alone[slot.prompt] = [text.texts[number].text for text in texts]
        with self._loras_of_words(placed, False, (), None):
            return self._with_subjects(self._encode(**alone)[0], texts)

    def _with_subjects(self, embeds: torch.Tensor, texts: Sequence[RegionText]) -> torch.Tensor:
        numbers = range(len(self.encoder_slots))
        return self.add_subjects(embeds, [[text.texts[number] for text in texts] for number in numbers])

    def _encode_prompts(
        self, asked: dict[str, Any], more: Sequence[RegionText] = (), placed: Sequence[PlacedPrompt] = ()
    ) -> tuple[tuple[torch.Tensor | None, ...], Any]:
        """What `encode_prompt` returns, and the embeddings of `more` texts that are encoded on the way: those of the
        regions of the `placed` prompts, whose LoRAs act on what they are of."""
        slots, prompt_embeds = self.encoder_slots, asked["prompt_embeds"]
        check_prompts(asked, slots)
        num_images = asked["num_images_per_prompt"]
        reads_negative = asked["do_classifier_free_guidance"] and asked["negative_prompt_embeds"] is None
        if asked["negative_prompt"] is None and self.config.get("force_zeros_for_empty_prompt"):  # type: ignore[attr-defined]
            reads_negative = False  # diffusers takes zeros then, whatever `negative_prompt_2` says
        with self._reading():
            # 1. Find the subjects
            if prompt_embeds is not None and asked["prompt"] is None and reads_negative:
                for slot in slots:  # one negative prompt for all embeddings
                    if isinstance(asked[slot.negative_prompt], str):
                        asked[slot.negative_prompt] = [asked[slot.negative_prompt]] * len(prompt_embeds)
            given = dict(asked)
            by_name = self._by_name([given[slot.prompt] for slot in slots])
            positive = [self._read(given, asked, slot, by_name) if prompt_embeds is None else [] for slot in slots]
            negative = [self._read(given, asked, slot, None) if reads_negative else [] for slot in slots]

            # 2. Encode what else is wanted, and the prompts with it
            encoded = None
            if more or (_names_of_loras(placed) and prompt_embeds is None):
                together = _positive_alone(asked)
                for number, slot in enumerate(slots):
                    own = asked[slot.prompt] if prompt_embeds is None else []
                    if own == "" and slot is not slots[0]:
                        own = None  # as diffusers takes it: the first encoder's prompt
                    own = [own] if isinstance(own, str) else own
                    together[slot.prompt] = None if own is None else [*own, *(text.texts[number].text for text in more)]
                count = len(positive[0])
                with self._loras_of_words(placed, bool(count), more, asked["lora_scale"]):
                    embeds, _, *pooled = self._encode(**together)
                encoded = self._with_subjects(embeds[count:], more)
                if count:
                    of_prompts = zip(("prompt_embeds", "pooled_prompt_embeds"), (embeds, *pooled), strict=False)
                    asked |= {name: rows[:count] for name, rows in of_prompts if asked[name] is None}

            # 3. Encode the rest, and add the subjects
            with self._loras_of_words(placed, False, (), None):  # none acts on the negative prompt
                embeds, negative_embeds, *pooled = self._encode(**asked)
            if negative_embeds is not None:
                negative_embeds = self.add_subjects(negative_embeds, negative, num_images)
            return (self.add_subjects(embeds, positive, num_images), negative_embeds, *pooled), encoded

    @contextmanager
    def _loras_of_words(
        self, placed: Sequence[PlacedPrompt], prompts: bool, more: Sequence[RegionText], scale: float | None
    ) -> Iterator[None]:
        """Within the context, the LoRAs of regions act on the regions' words alone.

        Args:
            placed: the prompts with all regions; their LoRAs act nowhere else.
            prompts: whether the prompts are encoded.
            more: the regions' own texts that are encoded, behind them.
            scale: the call's, for LoRAs that are not active.
        """
        names = _names_of_loras(placed)
        with ExitStack() as contexts:
            for number, slot in enumerate(self.encoder_slots if names else ()):
                encoder = getattr(self, slot.name)
                if encoder is None:  # given embeddings need none
                    continue
                switch = contexts.enter_context(placed_loras(encoder, names))
                held, shares = text_loras(placed, number, slot.tokenizer.model_max_length, prompts, more)
                factors = joined_scales(held, shares.to(encoder.device)) if held else {}
                switch.set(LoraCall(names, len(held), factors, scale=1.0 if scale is None else scale))
            yield

    def _read(
        self, given: Mapping[str, Any], asked: dict[str, Any], slot: EncoderSlot, by_name: Sequence[bool] | None
    ) -> list[ParsedPrompt]:
        """A text encoder's prompts with their subjects found; in `asked`, plain words take the place of names.

        Args:
            given: the arguments as they came.
            asked: the arguments as diffusers will get them.
            slot: the text encoder.
            by_name: as for `parse_prompts`; None: its negative prompts.
        """
        name, first = (slot.negative_prompt, "negative_prompt") if by_name is None else (slot.prompt, "prompt")
        parsed = self.parse_prompts(given[name] or given[first], slot, by_name)
        if parsed and given[name]:
            asked[name] = parsed[0].text if isinstance(given[name], str) else [text.text for text in parsed]
        return parsed

    def _encoding(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of `encode_prompt` by name."""
        base, own = super().encode_prompt, PromptEncoderMixin.encode_prompt  # type: ignore[misc]
        asked = bind_arguments(base, args, kwargs, own=own, **ENCODING_DEFAULTS)
        asked["device"] = asked["device"] or self._execution_device  # type: ignore[attr-defined]
        return asked

    def _encoding_of_call(self, asked: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
        """The arguments of `encode_prompt` for a call's, with one row per prompt."""
        names = inspect.signature(super().encode_prompt).parameters  # type: ignore[misc]
        return {name: asked[name] for name in names if name in asked} | {
            "device": device,
            "num_images_per_prompt": 1,
            "do_classifier_free_guidance": asked["guidance_scale"] > 1 and self.unet.config.time_cond_proj_dim is None,  # type: ignore[attr-defined]
            "lora_scale": (asked["cross_attention_kwargs"] or {}).get("scale"),
        }

    def _encode(self, **asked: Any) -> tuple[Any, ...]:
        """diffusers' own `encode_prompt`."""
        return super().encode_prompt(**asked)  # type: ignore[misc]

    def place(
        self,
        prompts: Mapping[str, str | list[str] | None],
        layout: Any,
        color_context: Any,
        height: int,
        width: int,
    ) -> list[PlacedPrompt]:
        """Text and layout brought together, one per prompt.

        Args:
            prompts: what the text encoders read, by `EncoderSlot.prompt`; at least `prompt`.
            layout, color_context, height, width: as in a call.
        """
        prompt, slots = prompts["prompt"], self.encoder_slots
        if prompt is not None and any(slot.tokenizer is None for slot in slots):
            raise ValueError("`prompt` needs a tokenizer, which the pipeline does not have; load one.")
        layouts, contexts = per_prompt(layout, prompt, "layout"), per_prompt(color_context, prompt, "color_context")
        with self._reading():
            read = [prompts.get(slot.prompt) or prompt for slot in slots]
            by_name = self._by_name(read)
            texts = zip(*map(self.parse_prompts, read, slots, [by_name] * len(slots)), strict=True)
            return [
                PlacedPrompt(of_prompt)
                if of_layout is None and layout is not None  # one of several prompts may have none
                else place_prompt(
                    of_prompt,
                    of_layout,
                    context,
                    height=height,
                    width=width,
                    subjects=self.subjects,
                    read=self._read_words,
                )
                for of_prompt, of_layout, context in zip(texts, layouts, contexts, strict=True)
            ]

    def _read_words(self, text: str) -> list[ParsedPrompt]:
        """A region's own words as each text encoder reads them."""
        return [parsed for slot in self.encoder_slots for parsed in self.parse_prompts(text, slot, None)]

    def prepare_regions(self, placed: Sequence[PlacedPrompt], num_tokens: int) -> RegionConditioning | None:
        """What `region_attention` needs of prompts and their layouts, but for the regions' own prompts; None if no
        prompt has regions.

        Args:
            placed: one per prompt.
            num_tokens: length of the prompt embeddings.
        """
        with self._reading():
            return make_conditioning(placed, num_tokens)


def _names_of_loras(placed: Sequence[PlacedPrompt]) -> tuple[str, ...]:
    return lora_names([[region.lora for region in of_prompt.regions] for of_prompt in placed])


def _positive_alone(asked: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `encode_prompt` for prompts alone, one row each."""
    alone = {**asked, "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    return alone | dict.fromkeys(name for name in EMBEDS if name in asked)
