"""The lines in which the page says what happened."""

from __future__ import annotations

import html

CSS = """
.news { margin: 0; overflow-wrap: anywhere; }
.news[role=alert] {
  border-left: 4px solid #dc2626; border-radius: 4px; padding: 4px 8px; margin-bottom: 4px;
  background: color-mix(in srgb, #dc2626 14%, transparent);
}
.news + progress { width: 100%; height: 0.6rem; }
"""


def said(news: str | Exception, done: float | None = None) -> str:
    """A line for people as HTML, in which names are text and never markup.

    Args:
        news: what to say; an error is shown as one.
        done: how much of something is done, from 0 to 1, as a bar below.
    """
    text = html.escape(str(news))
    if isinstance(news, Exception):
        return f'<p class="news" role="alert">{text[:1].upper()}{text[1:]}</p>'
    bar = "" if done is None else f'<progress value="{done:.3f}" max="1" aria-label="Progress"></progress>'
    return f'<p class="news" role="status">{text}</p>{bar}'
