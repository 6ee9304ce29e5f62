"""Models in company: what pipelines share, and how threads that use it at once do not spoil each other.

`from_pipe` gives every thread of a server a pipeline of its own around the same models. Calls on one UNet take turns,
since they share its scheduler, and so do all that use one tokenizer, which changes inside whenever it is called.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

__multisubject_version__ = "0.1.0"


class ModelState:
    """What is known of one shared model.

    Attributes:
        owner: the thread whose turn it is, or None.
        depth: how often that thread has taken it.
        contexts: on a UNet, the guided contexts that are open, each with its scheduler.
        processors: its attention layers with their own processors, while contexts are open.
        loras: tells its layers where LoRAs act.
        lora_users: number of open contexts in which its layers ask there.
        forwards: layers that ask -> the `forward` of their own that they had, mostly None.
    """

    def __init__(self) -> None:
        self.owner: int | None = None
        self.depth = 0
        self.contexts: list[tuple[object, Any]] = []
        self.processors: list[tuple[Any, Any]] = []
        self.loras = LoraSwitch()
        self.lora_users = 0
        self.forwards: dict[Any, Any] = {}


class LoraSwitch:
    """Tells the layers of one model where LoRAs act in its next calls, thread by thread and task by task; None: as they
    are set in peft.

    A compiled model cannot ask who calls it: there, what was set last holds for everybody.
    """

    def __init__(self) -> None:
        self._last: Any = None

    def set(self, call: Any) -> None:
        """From now on, a `LoraCall` or None."""
        self._last = call
        calls = {switch: other for switch, other in (_TABLE.lora_calls.get() or {}).items() if switch is not self}
        _TABLE.lora_calls.set(calls if call is None else calls | {self: call})

    def get(self) -> Any:
        """What holds for the code that asks."""
        if torch.compiler.is_compiling():
            return self._last
        return (_TABLE.lora_calls.get() or {}).get(self)


class _Table:
    """All shared models, and which thread waits for which of them; `changed` guards both, and their states.

    `opened` holds the guided contexts in which some code runs. Like every context variable it is a thread's or an
    asyncio task's own, and `asyncio.to_thread` takes it along. So is `lora_calls`, what each model's layers are told.
    """

    def __init__(self) -> None:
        self.opened: ContextVar[tuple[object, ...]] = ContextVar("multisubject_opened", default=())
        self.lora_calls: ContextVar[dict[LoraSwitch, Any] | None] = ContextVar("multisubject_lora_calls", default=None)
        self.states: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
        self.waiting: dict[int, Any] = {}
        self.changed = threading.Condition()


# A pipeline that `custom_pipeline` loads has its own copy of this module and may yet share its models with a pipeline
# of the installed package: the table lies where every copy finds it.
_TABLE = vars(threading).setdefault("_multisubject_models", _Table())


def runs_in(context: object) -> bool:
    """Whether the code that asks runs inside a guided context, see `inside`."""
    return any(context is opened for opened in _TABLE.opened.get())


@contextmanager
def inside(context: object) -> Iterator[None]:
    """Within it, `runs_in(context)` is true: for this code, and what it starts with a copy of its context variables."""
    _TABLE.opened.set((*_TABLE.opened.get(), context))
    try:
        yield
    finally:  # not `reset`, which fails where another thread closes what this one has opened
        _TABLE.opened.set(tuple(opened for opened in _TABLE.opened.get() if opened is not context))


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
