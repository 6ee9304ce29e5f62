"""What commands print besides their results: bars in a terminal, plain lines in a log, nothing that helps nobody."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from tqdm.auto import tqdm

# As accelerate has them: how launchers tell a process its number and how many there are.
_RANKS = {
    "RANK": "WORLD_SIZE",
    "PMI_RANK": "PMI_SIZE",
    "OMPI_COMM_WORLD_RANK": "OMPI_COMM_WORLD_SIZE",
    "MV2_COMM_WORLD_RANK": "MV2_COMM_WORLD_SIZE",
}
_T = TypeVar("_T")


def is_main_process() -> bool:
    """Whether this is the one of several processes that speaks; known before torch is imported."""
    env = os.environ
    return all(env.get(rank, "0") == "0" or env.get(size, "1") == "1" for rank, size in _RANKS.items())


_NO_NEWS = {
    "transformers.utils.import_utils": "requires torchvision",  # without it they take Pillow instead
    "diffusers.loaders.lora_base": "No LoRA keys associated to",  # for a text encoder, as most LoRAs have none
    "diffusers.models.modeling_utils": "should be kept in float32: []",  # none is
}
"""What diffusers and transformers say while they are imported and load, and nobody needs: logger -> words."""


@contextmanager
def quiet_imports() -> Iterator[None]:
    """Around imports of diffusers and transformers, and what they load: without what is no news."""
    chatty = [logging.getLogger(name) for name in _NO_NEWS]
    for logger in chatty:
        logger.addFilter(_is_news)
    try:
        yield
    finally:
        for logger in chatty:
            logger.removeFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    return _NO_NEWS[record.name] not in record.getMessage()


@contextmanager
def quiet_loading(*libraries: Any) -> Iterator[None]:
    """Around `from_pretrained`: the bars of these (`transformers.utils.logging`, …) in a terminal alone.

    They are nested, and move the cursor: in a log that is noise.
    """
    barred = [one for one in libraries if one.is_progress_bar_enabled() and not sys.stderr.isatty()]
    for one in barred:
        one.disable_progress_bar()
    try:
        with quiet_imports():
            yield
    finally:
        for one in barred:
            one.enable_progress_bar()


def shown(items: Sequence[_T], unit: str, describe: Callable[[_T], object]) -> Iterator[_T]:
    """The items, with a bar in a terminal and else with a line for each one that is done."""
    bar = tqdm(items, unit=unit, disable=None if is_main_process() else True)
    for number, item in enumerate(bar, 1):
        yield item
        if bar.disable and is_main_process():
            print(f"{number}/{len(items)} {describe(item)}", file=sys.stderr, flush=True)
