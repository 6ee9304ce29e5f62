"""The canvas: regions drawn over the picture, their list, and the prompt. One component, whose value is the document."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gradio as gr

_HERE = Path(__file__).resolve().parent
_SCRIPTS = ("shapes.js", "region_list.js", "state.js", "words.js", "stage.js", "canvas.js")  # one function in the browser, in this order


def canvas(document: Mapping[str, Any]) -> gr.HTML:
    """The component.

    Args:
        document: what it shows first, as plain JSON. Of the user: `size` (width, height in pixels), `prompt`,
            `negative_prompt`, `regions` (bottom to top) and `underlay`; of the server: `sizes`, `subjects`, `loras`,
            `adapters` and `problems`. The user's part of a new value is taken where its `revision` is higher than that
            of what the user has drawn meanwhile.

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
    )
