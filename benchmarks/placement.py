"""Ways to steer regions, head to head on the embedded base: who stands where it was asked to, and what it costs.

    python benchmarks/placement.py --quick                      # a few pictures per cell, minutes
    python benchmarks/placement.py --num_pictures 200           # the full table, hours on two cores; resumes
    python benchmarks/placement.py --table --plot docs/images/placement.png   # only show what the results file holds
    python benchmarks/placement.py --base tiny_world/base_xl    # another base, with the subjects of embeddings/xl

Every method draws the same tasks from the same seeds. A cell is a kind of task with a number of regions:
`described` (different categories, colour and pattern in words), `twins` (one category, different looks in words),
`subjects` (personal subjects from `embeddings/`), `subject twins` (two personal subjects of one category), `loras`
(those of `subjects` that `embeddings/loras/` has as LoRAs too, with rows for both). The suffixes
`small`, `overlap`, `masks` and `halves` change the regions of two described objects. What cannot be seen in a setting
(black at night) is not asked for. A region succeeds when its object looks right and its box and the one asked for have
at least half of what they cover together in common (IoU); a picture, when all its regions do. `rendered` are the same
scenes as the renderer draws them: what the judge makes of perfect pictures.

`--base` takes any base of the drawn world, of Stable Diffusion 1.x, 2.x or XL; a file of results is of one base, and
`--table` shows several beside each other.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from multisubject.base_models import SD
from multisubject.benchmarks.bases import ROOT, DrawnBase
from multisubject.benchmarks.layout_guidance import LayoutGuidance
from multisubject.benchmarks.placement_scores import RENDERED, SCORES, rendered, score_picture, whole
from multisubject.benchmarks.placement_tasks import (
    CELLS,
    LORAS,
    Task,
    draw_tasks,
    has_subjects,
    with_loras,
    with_own_words,
)
from multisubject.benchmarks.results import digest_of_weights, load_results, read_results, side_by_side, write_results
from multisubject.benchmarks.speed import measure
from multisubject.evaluation.intervals import bootstrap_interval
from multisubject.guidance_methods import (
    AttentionLayer,
    bounded_attention,
    cones2,
    cones2_padding_hidden,
    moves_objects,
    multisubject,
    same_in_every_layer,
    serves,
    uses_own_summaries,
    uses_own_words,
)
from multisubject.tiny_world import EMBEDDED_BASE
from multisubject.tiny_world.judge import CHECKPOINT, Judge
from multisubject.tiny_world.subjects import SUBJECTS
from multisubject.training.devices import quick_dtype
from multisubject.visualization import contact_sheet


@uses_own_words
def with_open_borders(layer: AttentionLayer) -> torch.Tensor | None:
    """`multisubject`, with Cones 2's measured spread of the logits in place of a pull of 3."""
    if not layer.is_cross:
        return None
    maps, step = layer.maps, layer.step
    weights = torch.where(step.progress < 0.5, maps.signed_weights, maps.inside_weights)
    return torch.addcmul(maps.summaries, weights, step.strength * layer.logit_std())


@serves("strength", "background")
@same_in_every_layer
@uses_own_words
@moves_objects(*multisubject.moves_objects)  # type: ignore[attr-defined]
def without_own_ends(layer: AttentionLayer) -> torch.Tensor | None:
    """`multisubject`, but what stands for a region's own prompt as a whole is not shown to it."""
    return multisubject(layer)


@uses_own_words
@uses_own_summaries
def isolated(layer: AttentionLayer) -> torch.Tensor | None:
    """`multisubject`; besides, places of different regions do not see each other in self-attention."""
    return multisubject(layer) if layer.is_cross else bounded_attention(layer)


METHODS_OF_OTHERS: dict[str, dict[str, Any]] = {
    "none": {"guidance_steps": 0},
    "masked": {"guidance_method": "masked"},
    "bounded_attention": {"guidance_method": "bounded_attention"},
    "dense_diffusion": {"guidance_method": "dense_diffusion"},
    "regional_prompts": {"guidance_method": "regional_prompts"},
    "attention_couple": {"guidance_method": "attention_couple"},
    "layout guidance": {"guidance_method": LayoutGuidance(scale=1.0, coarsest=2)},  # found on seed 0; see docs
    "cones2": {"guidance_method": "cones2"},
    "cones2, recurrence 2": {"guidance_method": "cones2", "recurrence": 2},
}
METHODS: dict[str, dict[str, Any]] = {
    **METHODS_OF_OTHERS,
    # A fifth of the UNet calls goes into second visits of the first steps; no more calls than without.
    "cones2, first steps twice": {"guidance_method": "cones2", "second_visits": 0.2},
    "multisubject": {"guidance_method": "multisubject"},
    "multisubject, first steps twice": {"guidance_method": "multisubject", "second_visits": 0.2},
    "multisubject, nothing moved": {"guidance_method": "multisubject", "moves": ()},
    "multisubject, first steps twice, nothing moved": {
        "guidance_method": "multisubject",
        "moves": (),
        "second_visits": 0.2,
    },
    # Objects that only their regions' own words describe, in a prompt of the setting alone or that counts them
    "multisubject, own words": {"own_words": ""},
    "multisubject, own words counted": {"own_words": " and a"},
    # Subjects as LoRAs: all of them everywhere, as is usual, without a layout and with one; each in its region
    "LoRAs everywhere, no layout": {"loras": "everywhere", "guidance_steps": 0},
    "LoRAs everywhere": {"loras": "everywhere"},
    "a LoRA per region": {"loras": "in regions"},
    # What each ingredient brings
    "multisubject, no ends of own prompts": {"guidance_method": without_own_ends},
    "cones2_padding_hidden": {"guidance_method": "cones2_padding_hidden"},
    "cones2 + own words": {"guidance_method": uses_own_words(lambda layer: cones2(layer))},
    "cones2_padding_hidden + own words": {
        "guidance_method": uses_own_words(lambda layer: cones2_padding_hidden(layer))
    },
    "cones2_padding_hidden + own words + open borders": {"guidance_method": with_open_borders},
    "multisubject + isolation": {"guidance_method": isolated},
}


SD_ALONE = tuple(
    name for name, settings in METHODS.items() if isinstance(settings.get("guidance_method"), LayoutGuidance)
)
"""Methods that know the samplers and the UNets of Stable Diffusion 1.x and 2.x alone."""

LORA_FOLDER = ROOT / "embeddings" / "loras"
OURS = ("multisubject", "multisubject, first steps twice")


# --- pictures --------------------------------------------------------------------------------------------------------


def draw_pictures(
    pipe: Any, tasks: Sequence[Task], settings: dict[str, Any], options: argparse.Namespace
) -> tuple[list[Image.Image], float, int, float]:
    """One picture per task in one batch; also its seconds, its UNet calls and its peak memory in MiB."""
    settings = dict(settings)
    if held := settings.pop("loras", None):
        return draw_with_loras(pipe, tasks, held == "in regions", settings, options)
    if (count_word := settings.pop("own_words", None)) is not None:
        prompts = [f"a photo {task.setting}{count_word * len(task.targets)}" for task in tasks]
        return draw_batch(pipe, tasks, prompts, [with_own_words(task) for task in tasks], settings, options)
    return draw_batch(pipe, tasks, [task.prompt for task in tasks], [task.layout for task in tasks], settings, options)


def draw_with_loras(
    pipe: Any, tasks: Sequence[Task], in_regions: bool, settings: dict[str, Any], options: argparse.Namespace
) -> tuple[list[Image.Image], float, int, float]:
    """As `draw_pictures`, in one batch for each cast: LoRAs that act everywhere act on a whole batch."""
    pictures: dict[int, Image.Image] = {}
    calls, seconds, peak = 0, 0.0, 0.0
    casts = [tuple(sorted(target.subject for target in task.targets if target.subject)) for task in tasks]
    pipe.enable_lora()
    try:
        for cast in dict.fromkeys(casts):
            rows = [row for row, of_task in enumerate(casts) if cast == of_task]
            pipe.set_adapters(list(cast))
            part = [tasks[row] for row in rows]
            prompts, layouts = zip(*(with_loras(task, in_regions=in_regions) for task in part), strict=True)
            drawn, more, calls, most = draw_batch(pipe, part, list(prompts), list(layouts), settings, options)
            pictures.update(zip(rows, drawn, strict=True))
            seconds, peak = seconds + more, max(peak, most)
    finally:
        pipe.disable_lora()
    return [pictures[row] for row in range(len(tasks))], seconds, calls, peak


def draw_batch(
    pipe: Any,
    tasks: Sequence[Task],
    prompts: list[str],
    layouts: list[Any],
    settings: dict[str, Any],
    options: argparse.Namespace,
) -> tuple[list[Image.Image], float, int, float]:
    """As `draw_pictures`, of these prompts and layouts."""
    calls, steps = 0, options.num_inference_steps
    if revisits := round(settings.pop("second_visits", 0) * steps):
        steps -= revisits
        settings.update(recurrence=2, recurrence_steps=revisits)
    output: Any = None

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    def draw() -> None:
        nonlocal output
        output = pipe(
            prompts,
            layout=layouts,
            num_inference_steps=steps,
            guidance_scale=options.guidance_scale,
            generator=[torch.Generator().manual_seed(task.seed) for task in tasks],
            **settings,
        )

    method = settings.get("guidance_method")
    hook = pipe.unet.register_forward_hook(count)
    try:
        with method.attached(pipe) if isinstance(method, LayoutGuidance) else nullcontext():
            seconds, peak = measure(draw, options.device, time.perf_counter)
    finally:
        hook.remove()
    return output.images, seconds, calls, peak


# --- table -----------------------------------------------------------------------------------------------------------


def table(results: dict[str, Any]) -> str:
    """Markdown, one row per cell and method."""
    lines = [
        "| cell | method | pictures | success | 95 % interval | regions: success | mIoU | IoU ≥ 0.5 | IoU ≥ 0.7 "
        "| every region right | 95 % interval | regions: category | look | identity "
        "| leaked | missing | doubled "
        "| extras per picture | setting | sharpness | UNet calls | seconds | peak memory |",
        "|" + "---|" * 23,
    ]
    for cell, methods in results["cells"].items():
        plain = [row["sharpness"] for row in methods.get("none", {}).get("pictures", [])]
        for method, found in methods.items():
            rows = found["pictures"]
            regions = sum(row["regions"] for row in rows)
            share = {key: sum(r[key] for r in rows) / regions for key in ("category", "look", "identity", "leaked")}
            missing = sum(row["missing"] for row in rows) / regions
            # Files of before it was counted have no `doubled`
            doubled = f"{sum(row['doubled'] for row in rows) / regions:.0%}" if "doubled" in rows[0] else "–"
            sharp = f"× {np.mean([row['sharpness'] for row in rows]) / np.mean(plain):.2f}" if plain else "–"
            identity = f"{share['identity']:.0%}" if has_subjects(cell) else "–"
            ious = np.array([one for row in rows for one in row["ious"]])
            exact = (
                f"{share_with_interval(whole(rows, 'success'))} | {sum(row['success'] for row in rows) / regions:.0%} "
                f"| {ious.mean():.2f} | {(ious >= 0.5).mean():.0%} | {(ious >= 0.7).mean():.0%}"
            )
            lines.append(
                f"| {cell} | {method} | {len(rows)} | {exact} | {share_with_interval(whole(rows, 'look'))} "
                f"| {share['category']:.0%} | {share['look']:.0%} | {identity} | {share['leaked']:.0%} | {missing:.0%} "
                f"| {doubled} | {sum(row['extras'] for row in rows) / len(rows):.2f} "
                f"| {sum(row['setting'] for row in rows) / len(rows):.0%} | {sharp} "
                f"| {found['unet_calls']} | {found['seconds'] / len(rows):.2f} | {found['peak_mib']:,.0f} MiB |"
            )
    return "\n".join(lines)


def overview(results: dict[str, Any]) -> str:
    """Markdown: the share of whole pictures that succeed, a row per method and a column per cell."""
    cells = results["cells"]
    lines = ["| success | " + " | ".join(cells) + " |", "|---" * (1 + len(cells)) + "|"]
    for method in (RENDERED, *METHODS):
        found = [cells[cell].get(method, {"pictures": []})["pictures"] for cell in cells]
        if any(found):
            shares = (f"{whole(rows, 'success').mean():.0%}" if rows else "–" for rows in found)
            lines.append(f"| {method} | " + " | ".join(shares) + " |")
    return "\n".join(lines)


def share_with_interval(every: np.ndarray) -> str:
    """Two columns: `60% | 52% to 68%`."""
    low, high = bootstrap_interval(every)
    return f"{every.mean():.0%} | {low:.0%} to {high:.0%}"


def claims(results: dict[str, Any]) -> str:
    """Markdown: our method, without and with second visits, beside Cones 2 and beside the best of the others, by the
    share of whole pictures that succeed.

    "Best" is chosen with hindsight, cell by cell, among the methods of others as published: ours, its ingredients and
    Cones 2 with second visits of its first steps are left out. What changes against `none` is paired by picture.
    """

    def every(cell: str, method: str) -> np.ndarray:
        return whole(results["cells"][cell][method]["pictures"], "success")

    def paired(cell: str, ours: str, key: str) -> str:
        pairs = zip(results["cells"][cell][ours]["pictures"], results["cells"][cell]["none"]["pictures"], strict=False)
        difference = np.array([float(mine[key]) - float(plain[key]) for mine, plain in pairs])
        low, high = bootstrap_interval(difference)
        return f"{difference.mean():+.2f} ({low:+.2f} to {high:+.2f})"

    lines = [
        "| cell | ours | success | cones2 | ratio | cones2, recurrence 2 | ratio "
        "| best of the others | ratio | setting obeyed, against none | sharpness, against none |",
        "|" + "---|" * 11,
    ]
    for cell, ours in itertools.product(results["cells"], OURS):
        methods = results["cells"][cell]
        others = [name for name in methods if name in METHODS_OF_OTHERS]
        if ours not in methods or not others:
            continue
        mine = every(cell, ours).mean()
        best = max(others, key=lambda name, cell=cell: every(cell, name).mean())  # type: ignore[misc]
        columns = [f"| {cell} | {ours} | {mine:.0%}"]
        for name in ("cones2", "cones2, recurrence 2", best):
            share = every(cell, name).mean() if name in methods else 0.0
            found = f"{share:.0%}" if name in methods else "–"
            ratio = f"× {mine / share:.2f}" if share else "–"
            columns.append(f"{found}{f' ({name})' if len(columns) == 3 else ''} | {ratio}")
        changes = [paired(cell, ours, key) if "none" in methods else "–" for key in ("setting", "sharpness")]
        lines.append(" | ".join([*columns, *changes]) + " |")
    return "\n".join(lines)


def plot(results: dict[str, Any], path: Path) -> None:
    """One line per cell: each method's share of pictures that succeed, with its interval. Ours is blue."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cells = results["cells"]
    measured = {name for found in cells.values() for name in found}
    methods = [name for name in METHODS if name in measured and name in (*METHODS_OF_OTHERS, *OURS)]
    others = itertools.cycle(zip("osv^<>phX", (f"C{number}" for number in range(1, 10)), strict=True))
    styles = {name: ("D*"[OURS.index(name)], "tab:blue") if name in OURS else next(others) for name in methods}
    figure, axis = pyplot.subplots(figsize=(10, 1.5 + 0.55 * len(cells)))
    for number, (name, (marker, colour)) in enumerate(styles.items()):
        rows, shares, intervals = [], [], []
        for row, found in enumerate(cells.values()):
            if name in found:
                every = whole(found[name]["pictures"], "success")
                rows.append(row + 0.7 * (number / max(1, len(styles) - 1) - 0.5))
                shares.append(every.mean())
                intervals.append(np.abs(np.array(bootstrap_interval(every)) - every.mean()))
        axis.errorbar(
            shares, rows, xerr=np.array(intervals).T, fmt=marker, color=colour, label=name, markersize=5, linewidth=1,
            zorder=3 if name in OURS else 2,
        )  # fmt: skip
    for row in range(1, len(cells)):
        axis.axhline(row - 0.5, color="lightgrey", linewidth=0.5)
    axis.set_yticks(range(len(cells)), list(cells))
    axis.set_ylim(len(cells) - 0.5, -0.5)
    axis.set_xlim(-0.02, 1.02)
    axis.set_xlabel("share of pictures that succeed, with 95 % bootstrap interval")
    axis.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90, bbox_inches="tight")
    pyplot.close(figure)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Draw and score what the results file does not hold yet."""
    base = DrawnBase.read(options.base, options.embeddings)
    possible = [name for name in METHODS if base.architecture is SD or name not in SD_ALONE]
    methods = options.methods or [RENDERED, *possible]
    if base.architecture is not SD and (unfit := [name for name in methods if name in SD_ALONE]):
        raise ValueError(f"--methods: {unfit} are for {SD.family}; {base.name} is of {base.architecture.family}.")
    subjects = list(SUBJECTS) if any(map(has_subjects, options.cells)) else []
    loras = [LORA_FOLDER / f"{name}.safetensors" for name in LORAS if any("loras" in cell for cell in options.cells)]
    if loras and base.folder.resolve() != EMBEDDED_BASE.resolve():
        raise ValueError(f"--cells: the LoRAs of {LORA_FOLDER} are of {EMBEDDED_BASE}, not of {base.name}.")
    settings = {
        "models": digest_of_weights(base.folder, *sorted(base.embeddings.glob("*.safetensors")), CHECKPOINT, *loras),
        "seed": options.seed,
        "num_inference_steps": options.num_inference_steps,
        "guidance_scale": options.guidance_scale,
        "dtype": options.dtype,
        "scores": SCORES,
    }
    results = load_results(options.results, base.name, settings, "--results")
    judge = Judge.load()
    pipe = base.load(subjects, dtype=getattr(torch, options.dtype), device=options.device)
    for file in loras:
        pipe.load_lora_weights(str(file), adapter_name=file.stem)
    if loras:
        pipe.disable_lora()
    rows = {
        cell: [m for m in methods if "loras" in cell or "loras" not in METHODS.get(m, {})] for cell in options.cells
    }
    with tqdm(total=sum(map(len, rows.values())) * options.num_pictures, unit="picture") as progress:
        for cell in options.cells:
            tasks = draw_tasks(cell, options.num_pictures, options.seed, base.world)
            for method in rows[cell]:
                # A loaded subject also answers to its class phrase, which tasks in words use for somebody else.
                pipe.set_subjects(subjects if has_subjects(cell) and "loras" not in METHODS.get(method, {}) else [])
                found = (
                    results["cells"]
                    .setdefault(cell, {})
                    .setdefault(method, {"pictures": [], "seconds": 0.0, "unet_calls": 0, "peak_mib": 0.0})
                )
                progress.set_description(f"{cell}, {method}")
                progress.update(min(len(found["pictures"]), len(tasks)))
                while len(found["pictures"]) < len(tasks):
                    done = len(found["pictures"])
                    part = tasks[done : done + options.batch_size]
                    if method == RENDERED:
                        pictures, seconds, calls, peak = rendered(part, base.world.image_size), 0.0, 0, 0.0
                    else:
                        pictures, seconds, calls, peak = draw_pictures(pipe, part, METHODS[method], options)
                    found["pictures"] += [score_picture(judge, *pair) for pair in zip(part, pictures, strict=True)]
                    found["seconds"] += seconds
                    found["unet_calls"] = calls
                    found["peak_mib"] = max(found["peak_mib"], peak)
                    if done == 0:
                        options.sheets.mkdir(parents=True, exist_ok=True)
                        sheet = contact_sheet(pictures, captions=[task.prompt for task in part])
                        sheet.save(options.sheets / f"{cell}, {method}.png".replace(" ", "_").replace(",", ""))
                    write_results(options.results, results)
                    progress.update(len(part))
    return results


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="8 pictures per cell")
    parser.add_argument("--table", action="store_true", help="print the tables of --results and draw nothing")
    parser.add_argument("--plot", type=Path, help="also draw the results to this picture")
    parser.add_argument("--cells", nargs="+", choices=CELLS, default=list(CELLS), metavar="CELL", help=", ".join(CELLS))
    parser.add_argument(
        "--methods", nargs="+", choices=[RENDERED, *METHODS], metavar="METHOD", help="default: all that the base can do"
    )
    parser.add_argument("--base", type=Path, default=EMBEDDED_BASE, help="a folder in diffusers' format")
    parser.add_argument("--embeddings", type=Path, help="its subjects (default: embeddings, of XL embeddings/xl)")
    parser.add_argument("--num_pictures", type=int, default=200, help="per cell and method (default: %(default)s)")
    parser.add_argument("--num_inference_steps", type=int, default=25)
    parser.add_argument("--guidance_scale", type=float, default=5.0)
    parser.add_argument("--batch_size", type=int, default=20)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="auto: float16 on a GPU, bfloat16 on a processor that has it (half the time), else float32",
    )
    parser.add_argument("--seed", type=int, default=1, help="0 is for choosing methods, 1 for reporting them")
    parser.add_argument(
        "--results",
        type=Path,
        nargs="+",
        help="default: output/placement/BASE/results.json; with --table also several, of a base each",
    )
    parser.add_argument("--sheets", type=Path, help="default: output/placement/BASE/sheets")
    options = parser.parse_args(arguments)
    place = Path("output/placement", options.base.name)
    files, options.sheets = options.results or [place / "results.json"], options.sheets or place / "sheets"
    if options.dtype == "auto":
        options.dtype = str(quick_dtype(options.device)).removeprefix("torch.")
    if options.quick:
        options.num_pictures = min(options.num_pictures, 8)
    if options.num_pictures < 1 or options.batch_size < 1:
        parser.error("--num_pictures and --batch_size: expected at least 1.")
    if len(files) > 1 and (options.plot or not options.table):
        parser.error(f"--results: {len(files)} files; expected one, but for --table without --plot.")
    options.results = files[0]
    if options.table:
        if missing := [str(file) for file in files if not file.is_file()]:
            parser.error(f"--results: {', '.join(missing)} not there; run without --table first.")
        bases = [read_results(file) for file in files]
    else:
        try:
            bases = [run(options)]
        except (ValueError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    named = {results["base"]: results for results in bases}
    if len(named) < len(bases):
        parser.error(f"--results: {len(bases)} files of {', '.join(named)}; expected one of each base.")
    for make in (overview, table, claims) if len(bases) == 1 else (table, claims):
        print(side_by_side({name: make(results) for name, results in named.items()}), end="\n\n")
    if options.plot is not None:
        plot(bases[0], options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
