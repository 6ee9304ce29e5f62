"""What messages say of a name that is none of the known ones. Without torch: commands begin with such checks."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

__multisubject_version__ = "0.1.0"


def did_you_mean(name: Any, known: Iterable[str], otherwise: str | None = None, form: str = "{}") -> str:
    """The end of a message about an unknown name: the known one that it is near to.

    Args:
        name: the unknown one, of whatever type it came as.
        known: those that were expected.
        otherwise: what to say where it is near to none; default: all of them.
        form: how one of them is written, such as `<{}>`.
    """
    known = [*known]
    near = difflib.get_close_matches(name, known, 1) if isinstance(name, str) else []
    if near:
        return f"did you mean {form.format(near[0])!r}?"
    return f"expected one of {', '.join(known)}." if otherwise is None else otherwise
