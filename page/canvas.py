"""The canvas: regions drawn over the picture, their list, the prompt. One component, whose value is the document."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

_HERE = Path(__file__).resolve().parent
# One function in the browser, in this order.
_SCRIPTS = ("shapes.js", "region_list.js", "state.js", "words.js", "stage.js", "canvas.js")


def canvas(document: Mapping[str, Any], offers: Mapping[str, Any]) -> gr.HTML:
    """The component. Its value is the user's: the server answers with `noting`, `offering` and `underlaying`, which
    leave it alone, and sets a value only where a document is loaded.

    Args:
        document: what it shows first, as plain JSON: `size` (width, height in pixels), `prompt`, `negative_prompt`,
            `regions` (bottom to top) and `underlay`. Where it comes back, `revision` counts the user's changes.
        offers: what there is to choose from: `sizes`, `subjects`, `loras` and `adapters`, the names of these.

    Returns:
        The component. Its `change` event comes when a gesture ends, and a moment after text was typed.
    """

    def read(name: str) -> str:
        return (_HERE / name).read_text(encoding="utf-8")

    return gr.HTML(
        value=dict(document),
        html_template=read("canvas.html"),
        css_template=read("canvas.css"),
        js_on_load="\n".join(map(read, _SCRIPTS)),
        elem_id="canvas",
        apply_default_css=False,
        offers=dict(offers),
        problems=[],
        underlay=None,
    )


def noting(problems: Sequence[Mapping[str, Any]]) -> gr.HTML:
    """An answer to the canvas: what is wrong, each with `text`, `severity` and, where it is about one, `region`."""
    return gr.HTML(problems=[dict(problem) for problem in problems])


def offering(offers: Mapping[str, Any]) -> gr.HTML:
    """An answer to the canvas: what there is to choose from now."""
    return gr.HTML(offers=dict(offers))


def underlaying(url: str) -> gr.HTML:
    """An answer to the canvas: this picture, a data URL, lies under the regions."""
    return gr.HTML(underlay={"url": url, "answer": secrets.token_hex(8)})  # the same one may be asked for again
