"""Train the judge on rendered scenes and measure it on held-out ones.

    python tiny_world/train_judge.py                 # goes on where it stopped; Ctrl-C saves
    python tiny_world/train_judge.py --measure_only  # the table again, for the judge that is there

Settings live in `judge.yaml`, the world in `recipe.yaml`, both beside this file.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn
from tqdm.auto import tqdm

from multisubject.tiny_world.judge import (
    CHECKPOINT,
    GRID_SIZE,
    PICTURE_SIZE,
    Judge,
    JudgeNetwork,
    Labels,
    crop_boxes,
    label_names,
    picture_tensors,
)
from multisubject.tiny_world.scenes import (
    SCALES,
    Box,
    Look,
    Scene,
    SceneObject,
    World,
    contrasts,
    iou,
    is_visible,
    random_boxes,
    random_look,
    render,
    second_colours,
)
from multisubject.tiny_world.subjects import SUBJECTS, Subject
from multisubject.tiny_world.training import Batch, Schedule, train

HERE = Path(__file__).parent
MAX_OBJECTS = 6
REGIONS_PER_PICTURE = 3
IGNORE = -100  # cross_entropy's own word for "no label"
# The questions that the other answers are built from count most.
HEAD_WEIGHTS = {"category": 1.0, "colour": 1.0, "pattern": 1.0, "second_colour": 0.5, "scale": 0.5, "accessory": 0.5}


@dataclass(frozen=True)
class SceneMix:
    """Which scenes the judge learns from; see `judge.yaml`."""

    scenes: int
    object_counts: tuple[float, ...]
    smaller_objects: float
    known: float
    near_misses: float
    seed: int


@dataclass(frozen=True)
class JudgeRecipe:
    """`judge.yaml`, checked."""

    world: World
    data: SceneMix
    training: Schedule
    held_out: dict[str, int]

    @classmethod
    def load(cls, path: Path, world_path: Path) -> JudgeRecipe:
        """Read the recipe, and the world from the base's recipe. Unknown settings are refused."""
        sections = yaml.safe_load(path.read_text())
        if set(sections) != {"data", "training", "held_out"}:
            raise ValueError(f"{path}: sections {sorted(sections)}; expected data, held_out, training.")
        if set(sections["held_out"]) != {"scenes", "seed"}:
            raise ValueError(f"{path}: held_out has {sorted(sections['held_out'])}; expected scenes and seed.")
        try:
            return cls(
                World(**yaml.safe_load(world_path.read_text())["world"]),
                SceneMix(**sections["data"]),
                Schedule(**sections["training"]),
                sections["held_out"],
            )
        except TypeError as error:
            raise ValueError(f"{path}: {error}; see `SceneMix` and `Schedule` for the settings.") from error


# --- scenes --------------------------------------------------------------------------------------------------------


def near_miss(rng: random.Random, subject: Subject, world: World, setting: str) -> Look:
    """The subject's look with one attribute changed: somebody else, and the hardest to tell apart."""
    look = subject.look
    others = second_colours(look.colour, world)
    change = rng.choice(("colour", "pattern", "second_colour", "scale", "accessory"))
    if change == "colour":
        used = (look.colour, look.second_colour, look.accessory)
        fitting = [
            colour
            for colour in world.colours
            if colour not in used and is_visible(colour, setting) and all(contrasts(colour, c) for c in used[1:] if c)
        ]
        return dataclasses.replace(look, colour=rng.choice(fitting))
    if change == "pattern":
        return dataclasses.replace(look, pattern="plain", second_colour=None, scale="coarse")
    if change == "scale":
        return dataclasses.replace(look, scale=rng.choice([scale for scale in SCALES if scale != look.scale]))
    current = getattr(look, change)
    choices: list[str | None] = [colour for colour in others if colour != current]
    changed: dict[str, Any] = {change: rng.choice(choices + [None] * (change == "accessory"))}
    return dataclasses.replace(look, **changed)


def draw_scene(rng: random.Random, world: World, mix: SceneMix) -> tuple[Scene, tuple[str, ...]]:
    """A scene, and what each object is meant to be: `known`, `near miss` or `random`."""
    count = rng.choices(range(len(mix.object_counts)), mix.object_counts)[0]
    setting = rng.choice(world.settings)
    residents = [subject for subject in SUBJECTS.values() if subject.category in world.categories]
    cast: list[tuple[str, Look, str]] = []
    for _ in range(count):
        kind = rng.choices(
            ("known", "near miss", "random"), (mix.known, mix.near_misses, 1 - mix.known - mix.near_misses)
        )[0]
        subject = rng.choice(residents)
        if kind == "known":
            cast.append((subject.category, subject.look, kind))
        elif kind == "near miss":
            cast.append((subject.category, near_miss(rng, subject, world, setting), kind))
        else:
            cast.append((rng.choice(world.categories), random_look(rng, world, setting), kind))
    smaller = rng.random() < mix.smaller_objects
    boxes = random_boxes(rng, [category for category, _, _ in cast], smaller) if cast else []
    objects = tuple(
        SceneObject(category, look, box, rng.random() < 0.5)
        for (category, look, _), box in zip(cast, boxes, strict=True)
    )
    return Scene(setting, objects, rng.getrandbits(32)), tuple(kind for _, _, kind in cast)


def subject_name(category: str, look: Look) -> str | None:
    """Who looks exactly like that, if anybody."""
    return next((s.name for s in SUBJECTS.values() if s.category == category and s.look == look), None)


@dataclass(frozen=True)
class SceneSet:
    """Rendered scenes as tensors: N pictures with up to six objects each.

    `pictures`: uint8 `(N, 3, 64, 64)`; `boxes`: `(N, 6, 4)`, zero where there is no object; `classes`: region attribute
    -> class index `(N, 6)`, IGNORE where there is none; `setting`: `(N,)`; `kinds`: `(N, 6)`, index into `KINDS` or -1.
    """

    pictures: Tensor
    boxes: Tensor
    classes: dict[str, Tensor]
    setting: Tensor
    kinds: Tensor


KINDS = ("known", "near miss", "random")


def draw_scenes(world: World, mix: SceneMix, labels: Labels, *, scenes: int, seed: int) -> SceneSet:
    """Render `scenes` scenes at the world's size, made the judge's size; the same seed gives the same set."""
    rng = random.Random(seed)
    heads = [name for name in labels if name != "setting"]
    pictures = torch.zeros(scenes, 3, PICTURE_SIZE, PICTURE_SIZE, dtype=torch.uint8)
    boxes = torch.zeros(scenes, MAX_OBJECTS, 4)
    classes = {name: torch.full((scenes, MAX_OBJECTS), IGNORE) for name in heads}
    kinds = torch.full((scenes, MAX_OBJECTS), -1)
    setting = torch.zeros(scenes, dtype=torch.long)
    for row in tqdm(range(scenes), desc="scenes", mininterval=1.0):
        scene, meant = draw_scene(rng, world, mix)
        rendered = render(scene, world.image_size)
        pictures[row] = as_bytes(picture_tensors([rendered.image]))[0]
        setting[row] = labels["setting"].index(scene.setting)
        for column, (item, box, kind) in enumerate(zip(scene.objects, rendered.boxes, meant, strict=True)):
            if box is None:
                continue
            boxes[row, column] = torch.tensor(box)
            kinds[row, column] = KINDS.index(kind)
            look = item.look
            answers: dict[str, str | None] = {"category": item.category, "subject": subject_name(item.category, look)}
            answers |= {
                name: getattr(look, name) for name in ("colour", "pattern", "second_colour", "scale", "accessory")
            }
            for name in heads:
                unasked = look.pattern == "plain" and name in ("second_colour", "scale")
                classes[name][row, column] = IGNORE if unasked else labels[name].index(answers[name])
    return SceneSet(pictures, boxes, classes, setting, kinds)


def as_bytes(pictures: Tensor) -> Tensor:
    """Pictures in [-1, 1] as uint8."""
    return ((pictures.clamp(-1, 1) + 1) * 127.5).round().byte()


# --- regions and their labels --------------------------------------------------------------------------------------


def uniform(generator: torch.Generator, low: float, high: float, *shape: int) -> Tensor:
    """Random numbers in [low, high)."""
    return low + (high - low) * torch.rand(*shape, generator=generator)


def shifted(generator: torch.Generator, boxes: Tensor, shift: float, stretch: tuple[float, float]) -> Tensor:
    """Boxes `(N, 4)` moved by up to `shift` of their size and scaled by a factor in `stretch`, inside the picture."""
    size, centre = boxes[:, 2:] - boxes[:, :2], (boxes[:, 2:] + boxes[:, :2]) / 2
    centre = centre + size * uniform(generator, -shift, shift, len(boxes), 2)
    half = size / 2 * torch.exp(uniform(generator, *np.log(stretch).tolist(), len(boxes), 2))
    moved = torch.cat([centre - half, centre + half], 1).clamp(0, 1)
    # A region that lost its area at the rim falls back to the box itself.
    return torch.where(((moved[:, 2:] - moved[:, :2]) > 0.05).all(1, keepdim=True), moved, boxes)


def anywhere(generator: torch.Generator, count: int) -> Tensor:
    """Boxes of any place and size, objects or not."""
    centre, half = uniform(generator, 0.05, 0.95, count, 2), uniform(generator, 0.1, 0.33, count, 2)
    return torch.cat([centre - half, centre + half], 1).clamp(0, 1)


def occupant(regions: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Which object a region is about.

    Args:
        regions: `(N, 4)`.
        boxes: `(N, objects, 4)`, zero where there is no object.

    Returns:
        The object's index `(N,)`, and the state `(N,)`: 1 it holds that object, 0 it holds nothing, -1 cannot be said
        (a small part of an object, or two objects alike in share).
    """
    low = torch.maximum(regions[:, None, :2], boxes[..., :2])
    high = torch.minimum(regions[:, None, 2:], boxes[..., 2:])
    shared = (high - low).clamp(min=0).prod(-1)  # [N, objects]
    region_area = (regions[:, 2:] - regions[:, :2]).prod(-1)
    most, index = shared.topk(2, dim=1)
    best = index[:, 0]
    box_area = (boxes[..., 2:] - boxes[..., :2]).prod(-1).gather(1, best[:, None])[:, 0]
    seen, covered = most[:, 0] / box_area.clamp(min=1e-6), most[:, 0] / region_area
    alone = most[:, 1] < 0.5 * most[:, 0]
    held = ((seen > 0.55) | ((covered > 0.75) & (seen > 0.35))) & alone
    empty = (seen < 0.12) & (covered < 0.12)
    return best, torch.where(empty, 0, torch.where(held, 1, -1))


def region_classes(scenes: SceneSet, rows: Tensor, regions: Tensor, nothing: int) -> dict[str, Tensor]:
    """Class indices `(N,)` by attribute of `regions` in the pictures `rows`; `nothing` is that category's index."""
    best, state = occupant(regions, scenes.boxes[rows])
    answers = {}
    for name, table in scenes.classes.items():
        answers[name] = torch.where(state == 1, table[rows, best], IGNORE)
    answers["category"] = torch.where(state == 0, nothing, answers["category"])
    return answers


def blurred(pictures: Tensor) -> Tensor:
    """A 3 × 3 mean."""
    return F.avg_pool2d(F.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, 1)


def as_if_decoded(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures in [-1, 1] with the faults of an autoencoder: a little blur, tint, wobble and noise."""
    count = len(pictures)

    def amount(chance: float, high: float) -> Tensor:
        chosen = torch.rand(count, 1, 1, 1, generator=generator) < chance
        return chosen * uniform(generator, 0, high, count, 1, 1, 1)

    pictures = pictures.lerp(blurred(pictures), amount(0.6, 1.0))
    coarse = F.interpolate(F.avg_pool2d(pictures, 2), scale_factor=2.0, mode="bilinear")
    pictures = pictures.lerp(coarse, amount(0.25, 1.0))
    gain = 1 + uniform(generator, -0.08, 0.08, count, 3, 1, 1)
    offset = uniform(generator, -0.06, 0.06, count, 3, 1, 1)
    wobble = F.interpolate(torch.randn(count, 3, 16, 16, generator=generator), scale_factor=4.0, mode="bilinear")
    noise = torch.randn(pictures.shape, generator=generator)
    return pictures * gain + offset + amount(0.5, 0.10) * wobble + amount(0.7, 0.10) * noise


# --- the loss ------------------------------------------------------------------------------------------------------


def centre_targets(boxes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What the scene network should say about `boxes` `(B, objects, 4)`.

    Returns:
        heat `(B, 16, 16)`: 1 at the cell of each centre, a Gaussian of a sixth of the box's size around it; distances
        `(B, 4, 16, 16)` to the edges of the nearest object's box; weight `(B, 16, 16)`, 1 where those are learnt.
    """
    present = (boxes[..., 2] > boxes[..., 0]).float()[..., None, None]  # [B, objects, 1, 1]
    middles = (torch.arange(GRID_SIZE, device=boxes.device) + 0.5) / GRID_SIZE
    centre = (((boxes[..., :2] + boxes[..., 2:]) / 2 * GRID_SIZE).floor() + 0.5) / GRID_SIZE  # of the cell
    sigma = ((boxes[..., 2:] - boxes[..., :2]) / 6).clamp(min=0.5 / GRID_SIZE)
    across = ((middles - centre[..., :1]) / sigma[..., :1]).square()[..., None, :]  # [B, objects, 1, 16]
    down = ((middles - centre[..., 1:]) / sigma[..., 1:]).square()[..., :, None]  # [B, objects, 16, 1]
    heats = present * torch.exp(-(across + down) / 2)
    heat, owner = heats.max(1)
    edges = boxes.gather(1, owner.flatten(1)[..., None].expand(-1, -1, 4)).view(*heat.shape, 4)  # [B, 16, 16, 4]
    x, y = middles.expand(GRID_SIZE, GRID_SIZE), middles[:, None].expand(GRID_SIZE, GRID_SIZE)
    distances = torch.stack([x - edges[..., 0], y - edges[..., 1], edges[..., 2] - x, edges[..., 3] - y], 1)
    return heat, distances, (heat > 0.5).float()


def centre_loss(logits: Tensor, heat: Tensor) -> Tensor:
    """Penalty-reduced focal loss (Zhou et al. 2019, eq. 1; α = 2, β = 4) per object."""
    probability = logits.sigmoid()
    at_centre = (heat == 1).float()
    hits = at_centre * (1 - probability).square() * F.logsigmoid(logits)
    misses = (1 - at_centre) * (1 - heat).pow(4) * probability.square() * F.logsigmoid(-logits)
    return -(hits + misses).sum() / at_centre.sum().clamp(min=1)


class JudgeLoss(nn.Module):
    """Both networks' losses on one batch of pictures."""

    def __init__(self, network: JudgeNetwork):
        super().__init__()
        self.network = network

    def forward(
        self, pictures: Tensor, boxes: Tensor, setting: Tensor, regions: Tensor, classes: Tensor
    ) -> dict[str, Tensor]:
        """Sum of the losses, and its parts.

        Args:
            pictures: `(B, 3, 64, 64)` in [-1, 1].
            boxes: `(B, objects, 4)`, zero where there is none.
            setting: `(B,)` class index.
            regions: `(B, R, 4)` boxes to name.
            classes: `(B, R, heads)` class indices in the order of the network's heads, or IGNORE.
        """
        crops = crop_boxes(pictures.repeat_interleave(regions.shape[1], 0), regions.flatten(0, 1))
        named = pictures.new_zeros(())
        for (name, logits), target in zip(self.network.object(crops).items(), classes.flatten(0, 1).T, strict=True):
            losses = F.cross_entropy(logits, target, ignore_index=IGNORE, reduction="sum")
            named = named + HEAD_WEIGHTS.get(name, 1.0) * losses / (target != IGNORE).sum().clamp(min=1)
        logits, distances, settings = self.network.scene(pictures)
        heat, true_distances, weight = centre_targets(boxes)
        centre = centre_loss(logits, heat)
        errors = (distances - true_distances).abs().mean(1)
        box = (weight * errors).sum() / weight.sum().clamp(min=1)
        loss = named + centre + 10 * box + 0.5 * F.cross_entropy(settings, setting)
        return {"loss": loss, "named": named.detach(), "centre": centre.detach(), "box": box.detach()}


def draw_regions(scenes: SceneSet, rows: Tensor, nothing: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """One region for each of the pictures `rows`, boxes `(N, 4)`, with its classes `(N, heads)`.

    Four in five are an object's box, as far off as the scene network may be; the others lie anywhere.
    """
    boxes = scenes.boxes[rows]
    counts = (boxes[..., 2] > 0).sum(1)
    column = (torch.rand(len(rows), generator=generator) * counts).long()
    chosen = boxes.gather(1, column[:, None, None].expand(-1, 1, 4))[:, 0]
    about_object = (torch.rand(len(rows), generator=generator) < 0.8) & (counts > 0)
    around = shifted(generator, chosen, 0.08, (0.9, 1.12))
    regions = torch.where(about_object[:, None], around, anywhere(generator, len(rows)))
    classes = region_classes(scenes, rows, regions, nothing)
    return regions, torch.stack(list(classes.values()), 1)


# --- the table -----------------------------------------------------------------------------------------------------


def region_accuracies(
    judge: Judge, pictures: list[np.ndarray], scenes: SceneSet, rows: Tensor, regions: Tensor
) -> dict[str, Any]:
    """Share of right answers by attribute, over the regions whose label can be said."""
    nothing = judge.labels["category"].index(None)
    truth = region_classes(scenes, rows, regions, nothing)
    verdicts = judge.classify([pictures[i] for i in rows.tolist()], [tuple(region) for region in regions.tolist()])
    table = {}
    for name, target in truth.items():
        asked = (target != IGNORE).nonzero()[:, 0].tolist()
        right = sum(getattr(verdicts[i], name) == judge.labels[name][int(target[i])] for i in asked)
        table[name] = {"accuracy": round(right / max(1, len(asked)), 4), "count": len(asked)}
    return table


def subject_accuracies(judge: Judge, pictures: list[np.ndarray], scenes: SceneSet) -> dict[str, Any]:
    """Share of objects whose subject (or none) is right, for known ones, near misses and random objects apart."""
    table = {}
    for index, kind in enumerate(KINDS):
        rows, columns = (scenes.kinds == index).nonzero(as_tuple=True)
        regions = [tuple(box) for box in scenes.boxes[rows, columns].tolist()]
        truth = [judge.labels["subject"][i] for i in scenes.classes["subject"][rows, columns].tolist()]
        verdicts = judge.classify([pictures[i] for i in rows.tolist()], regions)
        right = sum(verdict.subject == name for verdict, name in zip(verdicts, truth, strict=True))
        table[kind] = {"accuracy": round(right / max(1, len(truth)), 4), "count": len(truth)}
    return table


def detection_scores(judge: Judge, pictures: list[np.ndarray], scenes: SceneSet) -> dict[str, Any]:
    """Precision and recall at an intersection over union of 0.5, with the right category."""
    found = true = hits = 0
    for row, detections in enumerate(judge.detect(pictures)):
        truth: list[tuple[str | None, Box]] = [
            (judge.labels["category"][int(index)], tuple(box.tolist()))
            for index, box in zip(scenes.classes["category"][row], scenes.boxes[row], strict=True)
            if index != IGNORE
        ]
        found, true = found + len(detections), true + len(truth)
        for detection in detections:
            match = next((t for t in truth if t[0] == detection.category and iou(t[1], detection.box) >= 0.5), None)
            if match is not None:
                hits += 1
                truth.remove(match)
    return {"precision": round(hits / max(1, found), 4), "recall": round(hits / max(1, true), 4), "count": true}


def measure(judge: Judge, scenes: SceneSet, seed: int) -> dict[str, Any]:
    """The judge's accuracy on held-out scenes: crisp and as if decoded by an autoencoder, tight and loose regions.

    `tight`: objects' boxes, off by up to 5 % of their size, and one region anywhere per picture (where it holds
    nothing or most of an object). `loose`: up to 15 % off and up to 1.6 times as wide and high.
    """
    generator = torch.Generator().manual_seed(seed)
    decoded = as_bytes(as_if_decoded(scenes.pictures.float() / 127.5 - 1, generator))
    # Lists of arrays, so that the judge looks only once at a picture with several regions.
    crisp, degraded = (list(pictures.permute(0, 2, 3, 1).numpy()) for pictures in (scenes.pictures, decoded))
    rows, columns = (scenes.kinds >= 0).nonzero(as_tuple=True)
    objects = scenes.boxes[rows, columns]
    table: dict[str, Any] = {"scenes": len(crisp)}
    for image_name, pictures in (("rendered", crisp), ("as if decoded", degraded)):
        for region_name, shift, stretch in (("tight", 0.05, (0.95, 1.05)), ("loose", 0.15, (1.0, 1.6))):
            generator = torch.Generator().manual_seed(seed)
            regions = torch.cat([shifted(generator, objects, shift, stretch), anywhere(generator, len(crisp))])
            asked = torch.cat([rows, torch.arange(len(crisp))])
            table[f"{image_name}, {region_name}"] = region_accuracies(judge, pictures, scenes, asked, regions)
        answers = [name for name, _ in judge.settings(pictures)]
        truth = [judge.labels["setting"][i] for i in scenes.setting.tolist()]
        right = sum(a == b for a, b in zip(answers, truth, strict=True))
        table[f"{image_name}, setting"] = {"accuracy": round(right / len(truth), 4), "count": len(truth)}
        table[f"{image_name}, subject by kind"] = subject_accuracies(judge, pictures, scenes)
        table[f"{image_name}, detection"] = detection_scores(judge, pictures, scenes)
    return table


def format_table(table: Mapping[str, Any]) -> str:
    """The held-out table as lines of text."""
    lines = []
    for name, entry in table.items():
        if isinstance(entry, dict):
            cells = {"": entry} if "accuracy" in entry or "recall" in entry else entry
            for cell, values in cells.items():
                text = "  ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())
                lines.append(f"{name:32} {cell:14} {text}")
    return "\n".join(lines)


# --- command line --------------------------------------------------------------------------------------------------


def train_judge(recipe: JudgeRecipe, runs: Path) -> Judge | None:
    """The trained judge without its table, or None when interrupted."""
    labels = label_names(recipe.world)
    scenes = draw_scenes(recipe.world, recipe.data, labels, scenes=recipe.data.scenes, seed=recipe.data.seed)
    nothing = labels["category"].index(None)
    torch.manual_seed(recipe.training.seed)
    model = JudgeLoss(JudgeNetwork(labels))

    def draw_batch(generator: torch.Generator, count: int) -> Batch:
        rows = torch.randint(len(scenes.pictures), (count,), generator=generator)
        drawn = [draw_regions(scenes, rows, nothing, generator) for _ in range(REGIONS_PER_PICTURE)]
        regions, classes = (torch.stack(parts, 1) for parts in zip(*drawn, strict=True))
        return {
            "pictures": as_if_decoded(scenes.pictures[rows].float() / 127.5 - 1, generator),
            "boxes": scenes.boxes[rows],
            "setting": scenes.setting[rows],
            "regions": regions,
            "classes": classes,
        }

    average = train(model, draw_batch, recipe.training, runs / "judge.pt", description="judge")
    if average is None:
        return None
    model.load_state_dict(average)
    return Judge(model.network.cpu(), labels)


def main(arguments: list[str] | None = None) -> int:
    """Train, measure, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, default=HERE / "judge.yaml", help="settings (default: %(default)s)")
    parser.add_argument("--world", type=Path, default=HERE / "recipe.yaml", help="its `world` (default: %(default)s)")
    parser.add_argument("--runs", type=Path, default=Path("runs/judge"), help="checkpoint (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=CHECKPOINT, help="the judge's file (default: %(default)s)")
    parser.add_argument(
        "--measure_only", action="store_true", help="no training: measure the judge in `--output`, change nothing"
    )
    options = parser.parse_args(arguments)
    recipe = JudgeRecipe.load(options.recipe, options.world)
    if not options.measure_only:
        judge = train_judge(recipe, options.runs)
        if judge is None:
            return 130
        judge.metadata["recipe"] = dataclasses.asdict(recipe)
        judge.save(options.output)
    judge = Judge.load(options.output)  # what is measured is what ships: half precision
    held_out = draw_scenes(recipe.world, recipe.data, judge.labels, **recipe.held_out)
    table = measure(judge, held_out, recipe.held_out["seed"])
    if not options.measure_only:
        judge.metadata["held_out"] = table
        judge.save(options.output)
    print(format_table(table))
    print(f"{options.output}: {options.output.stat().st_size / 2**20:.2f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
