"""What can be run but hardly gives the picture that is wanted: said before the picture is made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from multisubject.generation.base_model import BaseModel
from multisubject.layout import Region, region_names
from multisubject.residual_embeddings import parse_prompt

if TYPE_CHECKING:
    from multisubject.generation.tasks import GenerationTask

# Of regions of this share of a base's own picture, a third do not succeed (docs/placement.md, `described 2 small`).
SMALL_SHARE = 1 / 16


def advise(task: GenerationTask, regions: Sequence[Region], base: BaseModel, warn: Callable[[str, str], None]) -> None:
    """Look a task through that has been found sound.

    Args:
        task: of an entry.
        regions: its regions.
        base: the model that it will run on.
        warn: takes each warning, and the key of the entry that it is about.
    """
    smallest = round(base.size[0] * base.size[1] * SMALL_SHARE)
    for name, region in zip(region_names(regions), regions, strict=True):
        covered = round(float(region.mask.sum()))
        if covered < smallest and region.is_named and not region.is_background:
            warn(
                f"region {name!r} covers {covered} pixels, which is small for this base: with less than {smallest}, a "
                "third of the objects or more come out too large, wrong or not at all. Enlarge it, or make a larger "
                "picture.",
                "layout",
            )
    placed = {region.subject.casefold() for region in regions}
    texts = " ".join(region.prompt or "" for region in regions).casefold()
    for name, subject in task.subjects.items() if regions else ():
        words = subject.residual.class_phrase.casefold()
        if name.casefold() not in placed and words not in placed and f"<{name}>".casefold() not in texts:
            warn(f"subject '<{subject.key}>' has no region: it may stand anywhere.", "prompt")
    for tokenizer in base.tokenizers.values():
        parsed = parse_prompt(tokenizer, task.prompt, task.residuals, learned=base.learned)
        limit = tokenizer.model_max_length - 2
        if parsed.num_tokens - 2 > limit:
            warn(
                f"the prompt has {parsed.num_tokens - 2} tokens, of which the text encoder reads the first {limit}: "
                "its end is lost. Shorten it.",
                "prompt",
            )
            break
