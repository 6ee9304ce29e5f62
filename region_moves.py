"""Look, move, go on: objects that begin to show beside their regions are moved into them.

A bias on cross-attention does not say where an object ends, and the starting noise has much to do with it. After some
of the first steps the prediction of the finished picture shows who stands where. `RegionMover` then looks where each
region's words are attended to and which places attend to one another, lifts every object off its background, sets it
down in its region, smaller or larger if it was far from its size, adds the noise back, and sampling goes on: no further
call of the UNet.

Boxes are `(xmin, ymin, xmax, ymax)` in fractions of the image; B images have up to R regions each.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers.utils.torch_utils import randn_tensor

from .guidance_methods import RegionMaps
from .move_times import check_moves, steps_of_moves

__multisubject_version__ = "0.1.0"

FINEST = 32 * 32
"""Queries of the finest layers that are looked at: they say where things are, finer ones what they are made of."""

AT_ONCE = FINEST**2
"""Numbers in the maps of a batch's attention that a look holds at once: as many heads as that is, at least one. SDXL
has twenty."""

# Fractions of the picture, chosen by measurement (docs/placement.md)
MARGIN = 0.06  # around all regions; what lies farther out is background
REACH = 0.24  # how far an edge may be from where it was asked for
SPREAD_ACROSS, SPREAD_DOWN = 0.05, 0.08  # standard deviation of edges that nothing was seen of …
SMALL, SPREAD_OF_SMALL = 0.4, 0.5  # … and how much more it is for each share of a picture that a region is smaller
SEAM = 0.03  # half the width of the seams, and how far beside an object its edges are looked for
LEAST = 0.03  # an object whose edges are all nearer than this stays where it is
TOO_LARGE = 1.25  # an object that is larger than its box by more than this factor is made smaller
BLUR_ACROSS, BLUR_DOWN = 0.2, 0.06  # how far away background is taken from …
FAR = 1e-3  # … and the weight of all of it, for places that have none near

CORE = 0.6  # share of a region's sides within which its object surely stands
TRUST = 128.0  # weight of what is seen against what is expected
CANDIDATES = 25  # places tried for each edge


class RegionLook:
    """What the attention layers of one UNet call say of where the regions' objects are; conditional samples only.

    Args:
        boxes: `(B, R, 4)`, where objects are to stand; absent ones are empty.
        size: `(h, w)` of the layers that are looked at.
        regions: `(B, R, 4)`, the same with those that do not guide now, which are no background; default: `boxes`.
    """

    def __init__(self, boxes: torch.Tensor, size: tuple[int, int], regions: torch.Tensor | None = None):
        self.boxes, self.size = boxes, size
        self.regions = boxes if regions is None else regions
        self.outside = 1 - covered(grown(self.regions, MARGIN), size).amax(dim=1)  # [B, h, w]
        self.words = torch.zeros(*boxes.shape[:2], *size, device=boxes.device)
        places = size[0] * size[1]
        self.alike = torch.zeros(len(boxes), places, places, device=boxes.device)

    def add(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        scale: float,
        tokens: torch.Tensor | None,
        absent: torch.Tensor | None = None,
    ) -> None:
        """Look at one layer.

        Args:
            query: `(B, heads, Q, head_dim)`; other layers than those looked at are left out.
            key: `(B, heads, K, head_dim)`.
            scale: factor between `query @ key.T` and the logits, which are looked at without any bias.
            tokens: `(B, R, K)` bool, those of each region's words; None: self-attention.
            absent: `(B, K)` bool, keys at which no token stands; None: there are none.
        """
        if query.shape[2] != self.alike.shape[1]:
            return
        heads, size_of_one = query.shape[1], query.shape[0] * query.shape[2] * key.shape[2]
        at_once = max(1, AT_ONCE // size_of_one)
        with torch.autocast(query.device.type, enabled=False):
            for first in range(0, heads, at_once):
                few = slice(first, first + at_once)
                attention = scale * query[:, few].float() @ key[:, few].float().transpose(-1, -2)
                if absent is not None:
                    attention = attention.masked_fill(absent[:, None, None], -torch.inf)
                attention = attention.softmax(dim=-1).sum(dim=1)  # [B, Q, K]
                if tokens is None:
                    self.alike.add_(attention, alpha=1 / heads)
                else:
                    seen = tokens.float() @ attention.transpose(1, 2)
                    self.words.add_(seen.unflatten(2, self.size), alpha=1 / heads)

    def evidence(self, boxes: torch.Tensor) -> torch.Tensor:
        """`(B, R, h, w)`: about 1 on objects that fill the cores of boxes, about 0 on the background and in other
        regions."""
        core, outside = covered(scaled(boxes, CORE), self.size), self.outside[:, None]

        def mean(seen: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
            return (seen * where).sum(dim=(2, 3), keepdim=True) / where.sum(dim=(2, 3), keepdim=True).clamp(min=1e-6)

        def normalized(seen: torch.Tensor) -> torch.Tensor:
            low = mean(seen, outside)
            contrast = mean(seen, core) - low
            shown = ((seen - low) / contrast.clamp(min=1e-9)).clamp(-0.3, 1.3)
            return torch.where(contrast > 1e-3 * low.abs(), shown, 0.5)  # a half: neither object nor background

        def attention_to(where: torch.Tensor) -> torch.Tensor:
            weights = where.flatten(2) / where.sum(dim=(2, 3))[..., None].clamp(min=1e-6)
            return (weights @ self.alike.transpose(1, 2)).unflatten(2, self.size)

        # Attention to words has peaks, which say nothing of where an object ends.
        words = self.words.minimum(mean(self.words, core))
        object_like, background_like = attention_to(core), attention_to(outside)
        likeness = object_like / (object_like + background_like).clamp(min=1e-9)
        anywhere = covered(self.regions, self.size).amax(dim=1, keepdim=True)
        others = (anywhere - covered(self.boxes, self.size)).clamp(min=0)  # none where a region lies itself
        return (normalized(words) + normalized(likeness)) / 2 * (1 - others)

    def found(self) -> torch.Tensor:
        """`(B, R, 4)`: the boxes in which objects are seen, near where they are to stand; those, where nothing is."""
        boxes = self.boxes
        rows, columns = (positions(side, boxes.device) for side in self.size)
        for _ in range(2):  # the second time from what was found
            evidence = self.evidence(boxes)
            xmin, ymin, xmax, ymax = (edge[..., None] for edge in boxes.unbind(-1))
            beside_x = (columns < xmin - SEAM) | (columns > xmax + SEAM)
            beside_y = (rows < ymin - SEAM) | (rows > ymax + SEAM)
            down = _best(evidence.masked_fill(beside_x[:, :, None, :], -0.3))
            across = _best(evidence.masked_fill(beside_y[..., None], -0.3).transpose(2, 3))
            left, right = _edges(across, self.boxes[..., 0], self.boxes[..., 2], SPREAD_ACROSS)
            top, bottom = _edges(down, self.boxes[..., 1], self.boxes[..., 3], SPREAD_DOWN)
            boxes = torch.stack([left, top, right, bottom], dim=-1)
        return boxes


class RegionMover:
    """Moves the objects of one run into their regions.

    Args:
        masks: `(B, R, H, W)`, as in `RegionConditioning`.
        background: `(B, R)` bool, regions that are no object's, or None.
        at: what is seen during the steps at these shares of the run (`move_times.py`) is moved after them.
        is_asked: whether somebody asks for these shares: ones that would move nothing are then refused.
    """

    def __init__(
        self, masks: torch.Tensor, background: torch.Tensor | None, at: Sequence[float], is_asked: bool = False
    ):
        masks = masks if background is None else masks * ~background[..., None, None]
        self.boxes, self.at, self.is_asked = boxes_around(masks), at, is_asked
        self.steps: set[int] = set()
        self.step = 0
        self.seen: RegionLook | None = None

    def start(self, num_steps: int) -> None:
        """A run of so many steps begins. Raises `ValueError` as `check_moves`."""
        if self.is_asked:
            check_moves(self.at, num_steps)
        self.steps, self.step, self.seen = steps_of_moves(self.at, num_steps), 0, None

    def looks_at(self) -> bool:
        """Whether what is seen in the step that the run is at is moved."""
        return self.step in self.steps

    def go_on(self) -> None:
        """The step that the run is at has been taken for the last time."""
        self.step += 1

    def look(self, maps: Sequence[RegionMaps], sizes: Sequence[tuple[int, int]]) -> RegionLook:
        """Before a call of the UNet that is looked at: what collects it.

        Args:
            maps: of the call, at any resolution: which regions guide.
            sizes: `(h, w)` of the layers.
        """
        size = max((one for one in sizes if one[0] * one[1] <= FINEST), default=min(sizes))
        guiding = maps[0].tokens.any(dim=2) & (maps[0].masks.amax(dim=2) > 0)
        boxes = self.boxes.to(guiding.device)
        self.seen = RegionLook(boxes * guiding[..., None], size, boxes)
        return self.seen

    def move(
        self,
        sample: torch.Tensor,
        predicted: torch.Tensor,
        signal: torch.Tensor,
        noise_level: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None,
    ) -> torch.Tensor:
        """The sample after a step, `signal * predicted + noise_level * noise`, with the objects that were seen moved.

        Where nothing moves it stays as it is, noise included.

        Args:
            sample, predicted: `(B, channels, h, w)`: the sample, and the finished picture as the step has predicted it.
            signal, noise_level: of the sample.
            generator: makes new noise where something moves; a list: one per image.
        """
        look, self.seen = self.seen, None
        if look is None:
            return sample
        goals = look.boxes
        found = _of_its_goals_shape(look.found(), goals)
        moving = (found - goals).abs().amax(dim=-1) >= LEAST
        moving = moving & (goals[..., 2] > goals[..., 0])  # absent ones are empty
        moving = moving & (look.outside.mean(dim=(1, 2)) > 0)[:, None]  # else there is no background to tell it from
        images = moving.any(dim=1).tolist()
        if not any(images):
            return sample
        x0 = predicted.float()
        moved, changed = _set_down(x0, goals, found, moving, look.regions)
        noise = (sample.float() - signal * x0) / noise_level
        kept = 1 - changed
        fresh = _noise_of(images, noise, generator)
        noise = (kept * noise + changed * fresh) / (kept**2 + changed**2).sqrt()
        return torch.where(changed > 0, signal * moved + noise_level * noise, sample.float()).to(sample.dtype)


def _of_its_goals_shape(found: torch.Tensor, goals: torch.Tensor) -> torch.Tensor:
    """Boxes about the found ones' centres, in the shape of their goals: as large as these, or larger by as much as what
    was found is far too large in one direction."""
    middle = (found[..., :2] + found[..., 2:]) / 2
    sides, wanted = (boxes[..., 2:] - boxes[..., :2] for boxes in (found, goals))
    factor = (sides / wanted.clamp(min=1e-6)).amax(dim=-1, keepdim=True)
    half = torch.where(factor > TOO_LARGE, factor, 1) * wanted / 2
    return torch.cat([middle - half, middle + half], dim=-1)


def _set_down(
    x0: torch.Tensor, goals: torch.Tensor, found: torch.Tensor, moving: torch.Tensor, regions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The picture with its moving objects lifted off their background where they were found, and set down in their
    goals, but for the regions beside and in front of them that stay; and `(B, 1, h, w)` in [0, 1], where that changed
    it."""
    size = (x0.shape[2], x0.shape[3])
    behind = _area(_shared(goals[:, :, None], regions[:, None])) > 0.5 * _area(goals)[..., None]  # [B, moving, staying]
    stay = (~moving[:, None] & ~behind).float() @ covered(regions, size).flatten(2)
    free = (1 - stay.clamp(max=1)).unflatten(2, size)
    lifted, set_down = (free * covered(boxes, size, SEAM) * moving[..., None, None] for boxes in (found, goals))
    objects = covered(grown(torch.cat([regions, found], dim=1), MARGIN), size)
    background = _background(x0, 1 - objects.amax(dim=1, keepdim=True))
    moved = torch.lerp(x0, background, lifted.amax(dim=1, keepdim=True))
    rows, columns = (positions(side, x0.device) for side in size)
    stretch = (found[..., 2:] - found[..., :2]) / (goals[..., 2:] - goals[..., :2]).clamp(min=1e-6)
    start = found[..., :2] - stretch * goals[..., :2]  # [B, R, (x, y)]
    for region in range(goals.shape[1]):
        x = start[:, region, :1] + stretch[:, region, :1] * columns
        y = start[:, region, 1:] + stretch[:, region, 1:] * rows
        places = torch.stack(torch.broadcast_tensors(x[:, None, :], y[:, :, None]), dim=-1)  # [B, h, w, 2]
        patch = F.grid_sample(x0, 2 * places - 1, mode="bicubic", padding_mode="border", align_corners=False)
        moved = torch.lerp(moved, patch, set_down[:, region, None])
    return moved, torch.maximum(lifted, set_down).amax(dim=1, keepdim=True)


def _background(x0: torch.Tensor, outside: torch.Tensor) -> torch.Tensor:
    """What would stand everywhere if there were no objects: the mean of what lies outside, `(B, 1, h, w)`, near places
    counting most."""
    down, across = (
        torch.exp(-(((at[:, None] - at) / blur) ** 2) / 2)
        for at, blur in zip((positions(s, x0.device) for s in x0.shape[2:]), (BLUR_DOWN, BLUR_ACROSS), strict=True)
    )
    outside = outside + 1e-6  # of a picture without any background: the mean of all of it
    mean = (outside * x0).mean(dim=(2, 3), keepdim=True) / outside.mean(dim=(2, 3), keepdim=True)
    return (down @ (outside * x0) @ across + FAR * mean) / (down @ outside @ across + FAR)


def _noise_of(
    images: Sequence[bool], like: torch.Tensor, generator: torch.Generator | list[torch.Generator] | None
) -> torch.Tensor:
    """New noise; from a generator per image for those images alone, so that none depends on its batch."""
    if not isinstance(generator, list):
        return randn_tensor(like.shape, generator=generator, device=like.device, dtype=like.dtype)
    rows = [
        randn_tensor(row[None].shape, generator=one, device=like.device, dtype=like.dtype) if moves else row[None]
        for moves, one, row in zip(images, generator, like, strict=True)
    ]
    return torch.cat(rows)


# --- boxes -----------------------------------------------------------------------------------------------------------


def positions(side: int, device: torch.device) -> torch.Tensor:
    """`(side,)`: the middles of cells."""
    return (torch.arange(side, device=device) + 0.5) / side


def boxes_around(masks: torch.Tensor) -> torch.Tensor:
    """`(B, R, 4)`: around where masks `(B, R, H, W)` reach half of their peak; zeros for empty masks."""
    inside = (masks >= masks.amax(dim=(2, 3), keepdim=True) / 2) & (masks > 0)
    edges = []
    for along in (inside.any(dim=2), inside.any(dim=3)):  # columns, rows
        side = along.shape[2]
        first = along.float().argmax(dim=2)
        last = side - along.flip(2).float().argmax(dim=2)
        edges.append(torch.stack([first, last], dim=-1) / side * along.any(dim=2, keepdim=True))
    (xmin, xmax), (ymin, ymax) = (edge.unbind(-1) for edge in edges)
    return torch.stack([xmin, ymin, xmax, ymax], dim=-1)


def scaled(boxes: torch.Tensor, factor: float) -> torch.Tensor:
    """The boxes about their centres."""
    middle, half = (boxes[..., :2] + boxes[..., 2:]) / 2, (boxes[..., 2:] - boxes[..., :2]) * (factor / 2)
    return torch.cat([middle - half, middle + half], dim=-1)


def grown(boxes: torch.Tensor, margin: float) -> torch.Tensor:
    """The boxes with a margin around them; empty ones stay empty."""
    there = (boxes[..., 2:] > boxes[..., :2]).all(dim=-1, keepdim=True)
    return torch.cat([boxes[..., :2] - margin, boxes[..., 2:] + margin], dim=-1) * there


def _shared(boxes: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Where two boxes overlap."""
    low, high = torch.maximum(boxes[..., :2], others[..., :2]), torch.minimum(boxes[..., 2:], others[..., 2:])
    return torch.cat([low, high], dim=-1)


def _area(boxes: torch.Tensor) -> torch.Tensor:
    """`(…)`: 0 of empty boxes."""
    return (boxes[..., 2:] - boxes[..., :2]).clamp(min=0).prod(dim=-1)


def covered(boxes: torch.Tensor, size: tuple[int, int], seam: float | None = None) -> torch.Tensor:
    """`(…, h, w)` in [0, 1]: how much of each cell boxes `(…, 4)` cover, or, with a seam, how far inside its middle
    lies: a half at the edge, and 0 and 1 half a seam's width outside and inside of it."""
    parts = []
    for side, low, high in ((size[0], boxes[..., 1], boxes[..., 3]), (size[1], boxes[..., 0], boxes[..., 2])):
        at, low, high = positions(side, boxes.device), low[..., None], high[..., None]
        if seam is None:
            half = 0.5 / side
            parts.append((torch.minimum(at + half, high) - torch.maximum(at - half, low)).clamp(min=0) * side)
        else:
            parts.append(((torch.minimum(at - low, high - at) + seam) / (2 * seam)).clamp(0, 1) * (high > low))
    return parts[0][..., :, None] * parts[1][..., None, :]


def _best(evidence: torch.Tensor) -> torch.Tensor:
    """`(B, R, n, m)` -> `(B, R, n)`: what the best eighth of each line says, from -1/2 for nothing to 1/2. Parts that
    reach far are often thin."""
    return evidence.topk(max(1, evidence.shape[-1] // 8), dim=-1).values.mean(dim=-1) - 0.5


def _edges(
    profile: torch.Tensor, low: torch.Tensor, high: torch.Tensor, usual_spread: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean of where an object begins and ends, over what can be expected and by what was seen.

    Args:
        profile: `(B, R, n)`, positive where it is seen.
        low, high: `(B, R)`, where it is to begin and to end.
        usual_spread: standard deviation of both if nothing is seen; small objects come out too large.
    """
    spread = usual_spread + SPREAD_OF_SMALL * (SMALL - (high - low)).clamp(min=0)[..., None, None]
    sides = profile.shape[-1]
    total = F.pad(profile.cumsum(dim=-1), (1, 0)) / sides  # up to each cell's beginning
    offsets = torch.linspace(-REACH, REACH, CANDIDATES, device=profile.device)

    def up_to(edge: torch.Tensor) -> torch.Tensor:
        anywhere = (edge[..., None] + offsets) * sides
        at = anywhere.clamp(0, sides)
        below = at.long().clamp(max=sides - 1)
        inside = torch.lerp(total.gather(-1, below), total.gather(-1, below + 1), at - below)
        return inside - 0.5 * (anywhere - at) / sides  # outside the picture nothing is seen

    seen = up_to(high)[..., None, :] - up_to(low)[..., :, None]  # [B, R, candidates, candidates]
    expected = (offsets[:, None] ** 2 + offsets**2) / (2 * spread**2)
    likely = (TRUST * seen - expected).flatten(2).softmax(dim=-1).unflatten(2, (CANDIDATES, CANDIDATES))
    return low + likely.sum(dim=3) @ offsets, high + likely.sum(dim=2) @ offsets
