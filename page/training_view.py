"""A training as people see it."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from multisubject.page.training import Job

_PHASES = {
    "loading": "loading the base and the pictures",
    "training": "learning",
    "saving": "drawing pictures to look at",
    "done": "adding it to the subjects",
}


def progress_html(job: Job, said: dict[str, Any], sheets: Sequence[Path]) -> str:
    """A training in words, as a bar and as a curve; and what the picture below it is.

    Args:
        job: the training.
        said: what its progress file says.
        sheets: its validation pictures, oldest first; the last one is shown below.
    """
    step, of, loss = said.get("step") or 0, said.get("of") or job.steps, said.get("loss")
    phase = _PHASES.get(str(said.get("phase")), "starting")
    words = {
        "waiting": "waits for the training before it",
        "running": f"{phase}, step {step} of {of}" if said.get("phase") == "training" else phase,
        "stopping": "stopping after this step",
        "done": f"done: <{job.name}> is among the subjects",
        "stopped": f"stopped at step {step} of {of}; it can go on from there",
        "failed": f"failed: {job.message}",
    }[job.state]
    rest = f" · loss {loss:.4f}" if isinstance(loss, float) and job.state != "failed" else ""
    name = html.escape(f"<{job.name}> · {job.class_phrase}")
    role = ' role="alert"' if job.state == "failed" else ""
    below = f"<p>What it draws after step {int(sheets[-1].stem.partition('-')[2])}:</p>" if sheets else ""
    return (
        f'<p><b>{name}</b></p><p class="news"{role}>{html.escape(words)}{rest}</p>'
        f'<progress value="{step}" max="{of}" aria-label="Steps"></progress>'
        f"{loss_curve(said.get('curve') or [])}{below}"
    )


def loss_curve(points: Sequence[Sequence[float]], width: int = 400, height: int = 130) -> str:
    """The loss over the steps as SVG, in the colour of the text.

    Args:
        points: `[step, loss]`, as the trainer's `--progress_file` has them.
        width, height: of the drawing's own units; it takes all the width that there is.
    """
    if len(points) < 2:
        return ""
    steps, losses = zip(*points, strict=True)
    low, high = min(losses), max(losses)
    left, top, right, bottom = 50, 12, width - 12, height - 24
    span = (high - low) or 1.0

    def at(step: float, loss: float) -> str:
        x = left + (step - steps[0]) / (steps[-1] - steps[0]) * (right - left)
        return f"{x:.1f},{bottom - (loss - low) / span * (bottom - top):.1f}"

    style = 'fill="currentColor" font-size="11"'
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="Loss, from {losses[0]:.4f} to {losses[-1]:.4f}">'
        f'<path d="M{left} {top}V{bottom}H{right}" fill="none" stroke="currentColor" opacity="0.4"/>'
        f'<polyline points="{" ".join(at(*point) for point in points)}" fill="none" stroke="currentColor" '
        f'stroke-width="1.5"/>'
        f'<text x="{left - 6}" y="{top + 8}" text-anchor="end" {style}>{high:.4f}</text>'
        f'<text x="{left - 6}" y="{bottom}" text-anchor="end" {style}>{low:.4f}</text>'
        f'<text x="{left}" y="{height - 6}" {style}>step {steps[0]}</text>'
        f'<text x="{right}" y="{height - 6}" text-anchor="end" {style}>step {steps[-1]}</text></svg>'
    )
