"""Models in company: what pipelines share, and what a thread does to it, is done under that model's lock.

`from_pipe` gives every thread of a server a pipeline of its own around the same models. A guided call swaps the UNet's
attention processors, and a tokenizer changes inside whenever it is called: who does so takes the model's lock first.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

__multisubject_version__ = "0.1.0"


class ModelState:
    """What is known of one shared model.

    Attributes:
        lock: held by the thread that uses the model; re-entrant.
        contexts: how many guided contexts are open on it, all of that thread.
        processors: a UNet's own attention processors by layer, while contexts are open.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.contexts = 0
        self.processors: dict[str, Any] = {}


# A pipeline that `custom_pipeline` loads has its own copy of this module and may yet share its models with a pipeline
# of the installed package: the table lies where every copy finds it.
_TABLE: Any
_TABLE_LOCK: Any
_TABLE, _TABLE_LOCK = vars(threading).setdefault(
    "_multisubject_models", (weakref.WeakKeyDictionary(), threading.Lock())
)


@contextmanager
def in_turn(*models: Any) -> Iterator[list[ModelState]]:
    """Within the context, this thread alone uses these models; waits until no other thread does.

    Args:
        models: UNets, compiled or not, and tokenizers; None is left out. Whoever needs a UNet and a tokenizer takes the
            UNet first.

    Yields:
        The models' states, in the same order.
    """
    states = []
    for model in models:
        if model is not None:
            model = getattr(model, "_orig_mod", model)  # what `torch.compile` wraps
            with _TABLE_LOCK:
                states.append(_TABLE.setdefault(model, ModelState()))
    with ExitStack() as stack:
        for state in states:
            stack.enter_context(state.lock)
        yield states
