"""Models in company: what pipelines share, and how threads that use it at once do not spoil each other.

`from_pipe` gives every thread of a server a pipeline of its own around the same models. Calls on one UNet take turns,
since they share its scheduler, and so do all that use one tokenizer, which changes inside whenever it is called.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__multisubject_version__ = "0.1.0"


class ModelState:
    """What is known of one shared model.

    Attributes:
        owner: the thread whose turn it is, or None.
        depth: how often that thread has taken it.
        contexts: on a UNet, thread and scheduler of each guided context that is open.
        processors: its attention layers with their own processors, while contexts are open.
    """

    def __init__(self) -> None:
        self.owner: int | None = None
        self.depth = 0
        self.contexts: list[tuple[int, Any]] = []
        self.processors: list[tuple[Any, Any]] = []


class _Table:
    """All shared models, and which thread waits for which of them; `changed` guards both, and their states."""

    def __init__(self) -> None:
        self.states: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
        self.waiting: dict[int, Any] = {}
        self.changed = threading.Condition()


# A pipeline that `custom_pipeline` loads has its own copy of this module and may yet share its models with a pipeline
# of the installed package: the table lies where every copy finds it.
_TABLE = vars(threading).setdefault("_multisubject_models", _Table())


@contextmanager
def state_of(model: Any) -> Iterator[ModelState]:
    """A model's state, for a moment: nobody else may look at it or change it within the context.

    Args:
        model: a UNet, compiled or not, or a tokenizer.
    """
    with _TABLE.changed:
        yield _TABLE.states.setdefault(getattr(model, "_orig_mod", model), ModelState())


@contextmanager
def in_turn(*models: Any) -> Iterator[None]:
    """Within the context, of all that ask here this thread alone uses these models; waits until the others are done.

    A thread may take a model again that it has already.

    Args:
        models: UNets and tokenizers; None is left out.

    Raises:
        RuntimeError: the thread that has one of them waits for a model of this thread.
    """
    taken: list[ModelState] = []
    try:
        for model in models:
            if model is not None:
                _take(model, taken)
        yield
    finally:
        with _TABLE.changed:
            for state in taken:
                state.depth -= 1
                if state.depth == 0:
                    state.owner = None
            _TABLE.changed.notify_all()


def _take(model: Any, taken: list[ModelState]) -> None:
    thread = threading.get_ident()
    with state_of(model) as state:
        while state.owner not in (None, thread):
            holder = state.owner
            while (awaited := _TABLE.waiting.get(holder)) is not None:
                holder = awaited.owner
                if holder == thread:
                    raise RuntimeError(
                        f"Two threads wait for each other's models: this one has a model and waits for a"
                        f" {type(model).__name__}, whose user waits for that model. Do not call one pipeline from"
                        " another one's callback in one thread, and the other way round in another."
                    )
            _TABLE.waiting[thread] = state
            try:
                _TABLE.changed.wait()
            finally:
                del _TABLE.waiting[thread]
        state.owner, state.depth = thread, state.depth + 1
        taken.append(state)
