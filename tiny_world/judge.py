"""The yardstick: tells what stands where in a picture of the drawn world.

`Judge.detect` looks at the whole picture and lists every object, asked for or not. `Judge.classify` answers for a
picture and a region: which category, colour, pattern and known subject stands there, or nothing. `Judge.settings` names
the setting.

Two small convolutional networks, trained on rendered scenes by `train_judge.py` and on nothing that the embedded base
has made: `SceneNet` marks the objects' centres and the box around each (Zhou et al. 2019, "Objects as Points",
arXiv:1904.07850), `ObjectNet` names what is in a box. A region is answered by the object found in it, so it may be
looser than the object or some way off it.

Boxes are `(xmin, ymin, xmax, ymax)` in fractions of the image; masks are `(height, width)` in [0, 1].
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from multisubject.subject_file import write_atomically
from multisubject.tiny_world.scenes import SCALES, Box, World, iou
from multisubject.tiny_world.subjects import SUBJECTS

PICTURE_SIZE = 64  # pictures of any size are resized to this side
CROP_SIZE = 32
CROP_CONTEXT = 1.1  # side of a crop over the side of its box
GRID_SIZE = PICTURE_SIZE // 4  # cells of the centre map along a side
MAX_OVERLAP = 0.4  # intersection over union; of two proposals that overlap more, the weaker is dropped
BATCH_SIZE = 64  # pictures that pass through the networks together
CHECKPOINT = Path(__file__).with_name("judge.safetensors")

# Names of a head's classes; None stands for "nothing" (category, accessory) or "nobody known" (subject).
Labels: TypeAlias = Mapping[str, tuple[str | None, ...]]
Pictures: TypeAlias = Sequence[Image.Image | np.ndarray] | Tensor
Region: TypeAlias = Box | np.ndarray


def label_names(world: World) -> dict[str, tuple[str | None, ...]]:
    """What the judge tells apart in `world`: attribute of a region -> names; `setting` is the whole picture's."""
    return {
        "category": (*world.categories, None),
        "colour": world.colours,
        "pattern": world.patterns,
        "second_colour": world.colours,
        "scale": tuple(SCALES),
        "accessory": (*world.colours, None),
        "subject": (*(s.name for s in SUBJECTS.values() if s.category in world.categories), None),
        "setting": world.settings,
    }


# --- networks ------------------------------------------------------------------------------------------------------


def _block(inputs: int, outputs: int, stride: int = 1, kernel: int = 3) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    return nn.Sequential(convolution, nn.GroupNorm(8, outputs), nn.SiLU())


class ObjectNet(nn.Module):
    """Crops `(batch, 3, 32, 32)` of objects' boxes, RGB in [-1, 1], to one logit vector per attribute.

    A crop fills the square whatever the box's proportions, so that parts and stripes lie where they always lie.
    """

    def __init__(self, labels: Labels):
        super().__init__()
        self.features = nn.Sequential(
            # No normalisation here: it would take away how bright the crop is.
            nn.Conv2d(3, 32, 5, 2, padding=2),
            nn.SiLU(),
            _block(32, 64),
            _block(64, 96, stride=2),
            _block(96, 128, stride=2),
            _block(128, 128),
        )
        self.hidden = nn.Sequential(nn.Flatten(), nn.Linear(128 * (CROP_SIZE // 8) ** 2, 160), nn.SiLU())
        self.heads = nn.ModuleDict({name: nn.Linear(160, len(names)) for name, names in labels.items()})

    def forward(self, crops: Tensor) -> dict[str, Tensor]:
        """Attribute -> logits `(batch, classes)`."""
        hidden = self.hidden(self.features(crops))
        return {name: head(hidden) for name, head in self.heads.items()}


class SceneNet(nn.Module):
    """Pictures `(batch, 3, 64, 64)` in [-1, 1] to centres, boxes and setting; see `forward`."""

    def __init__(self, settings: int):
        super().__init__()
        self.fine = nn.Sequential(_block(3, 24, stride=2, kernel=5), _block(24, 48, stride=2), _block(48, 48))
        self.middle = nn.Sequential(_block(48, 80, stride=2), _block(80, 80))
        self.coarse = nn.Sequential(_block(80, 128, stride=2), _block(128, 128))
        self.lateral_coarse, self.lateral_middle = nn.Conv2d(128, 80, 1), nn.Conv2d(80, 48, 1)
        self.merge_middle, self.merge_fine = _block(80, 80), _block(48, 48)
        self.head = nn.Conv2d(48, 5, 1)
        self.setting = nn.Linear(128, settings)
        nn.init.constant_(self.head.bias[:1], -3.0)  # type: ignore[index]  # centres are rare

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Centre logits `(B, 16, 16)`; distances from a cell's middle to the left, top, right and bottom of its
        object, `(B, 4, 16, 16)` in fractions of the picture; setting logits `(B, settings)`."""
        fine = self.fine(pictures)  # [B, 48, 16, 16]
        middle = self.middle(fine)  # [B, 80, 8, 8]
        coarse = self.coarse(middle)  # [B, 128, 4, 4]
        middle = self.merge_middle(middle + F.interpolate(self.lateral_coarse(coarse), scale_factor=2.0))
        fine = self.merge_fine(fine + F.interpolate(self.lateral_middle(middle), scale_factor=2.0))
        out = self.head(fine)
        return out[:, 0], F.softplus(out[:, 1:]), self.setting(coarse.mean((2, 3)))


class JudgeNetwork(nn.Module):
    """Both networks, for the classes in `labels` (see `label_names`)."""

    def __init__(self, labels: Labels):
        super().__init__()
        self.object = ObjectNet({name: names for name, names in labels.items() if name != "setting"})
        self.scene = SceneNet(len(labels["setting"]))


def crop_boxes(pictures: Tensor, boxes: Tensor) -> Tensor:
    """What is in each box with a narrow rim around it, stretched to a square.

    Args:
        pictures: `(N, 3, 64, 64)`.
        boxes: `(N, 4)`. Crops that reach beyond the picture repeat its border.

    Returns:
        `(N, 3, 32, 32)`.
    """
    # grid_sample counts from -1 to 1 over the picture.
    transform = torch.zeros(len(boxes), 2, 3, device=boxes.device)
    transform[:, 0, 0], transform[:, 1, 1] = (CROP_CONTEXT * (boxes[:, 2:] - boxes[:, :2])).unbind(1)
    transform[:, :, 2] = boxes[:, :2] + boxes[:, 2:] - 1
    # Two samples a pixel and an average: large objects shrink here, and fine stripes must not alias.
    grid = F.affine_grid(transform, [len(boxes), 1, 2 * CROP_SIZE, 2 * CROP_SIZE], align_corners=False)
    return F.avg_pool2d(F.grid_sample(pictures, grid, padding_mode="border", align_corners=False), 2)


# --- answers -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """What stands in a region. All attributes are None where nothing does (`category is None`).

    `second_colour` and `scale` are None for a plain object, `accessory` for one without (or with its usual one), and
    `subject` for somebody unknown. `probability` holds one entry per attribute: how sure the judge is of that answer;
    an answer that follows from another one has that one's probability.
    """

    category: str | None
    colour: str | None
    pattern: str | None
    second_colour: str | None
    scale: str | None
    accessory: str | None
    subject: str | None
    probability: Mapping[str, float]


@dataclass(frozen=True)
class Detection:
    """An object found in a picture. `score` in [0, 1]: the centre's, times the category's probability."""

    category: str
    subject: str | None
    box: Box
    score: float
    verdict: Verdict


class Judge:
    """The trained yardstick; `Judge.load()` gives the one that ships with the package.

    Args:
        network: the networks.
        labels: attribute -> names of its classes, in the order of the logits.
        metadata: plain data that travels with the weights; `held_out` is the judge's own accuracy.
    """

    def __init__(self, network: JudgeNetwork, labels: Labels, metadata: Mapping[str, Any] | None = None):
        self.network = network.eval()
        self.labels = {name: tuple(names) for name, names in labels.items()}
        self.metadata = dict(metadata or {})

    # --- disk ---

    @classmethod
    def load(cls, path: str | Path = CHECKPOINT, device: str | torch.device = "cpu") -> Judge:
        """Read a judge from its `.safetensors` file. Raises `FileNotFoundError` and `ValueError` with the remedy."""
        if not Path(path).is_file():
            raise FileNotFoundError(f"judge {str(path)!r}: no such file; train one with tiny_world/train_judge.py.")
        with safe_open(str(path), framework="pt") as file:
            metadata = {key: json.loads(value) for key, value in (file.metadata() or {}).items()}
            state = {key: file.get_tensor(key).float() for key in file.keys()}  # noqa: SIM118 — not a mapping
        if "labels" not in metadata:
            raise ValueError(f"judge {str(path)!r}: its header has no `labels`; expected a file of train_judge.py.")
        labels = {name: tuple(names) for name, names in metadata.pop("labels").items()}
        network = JudgeNetwork(labels)
        network.load_state_dict(state)
        return cls(network.to(device), labels, metadata)

    def save(self, path: str | Path) -> None:
        """Write weights (half precision), labels and metadata into one file; an old one stays until it is whole."""
        state = {key: value.detach().half().contiguous() for key, value in self.network.state_dict().items()}
        header = {key: json.dumps(value) for key, value in {**self.metadata, "labels": self.labels}.items()}
        write_atomically(Path(path), save(state, header))

    # --- questions ---

    def classify(self, pictures: Pictures, regions: Sequence[Region], *, threshold: float = 0.35) -> list[Verdict]:
        """What stands in `regions[i]` of `pictures[i]`, for all pairs at once.

        Of the objects that `detect` finds, the one that shares the largest area with the region answers for it, when
        half of its box lies in the region (or a third, in a region that it nearly fills). Where there is none, the
        verdict is nothing, as sure as the centre map is empty there.

        Args:
            pictures: as many as regions (repeat a picture to ask about several of its regions). PIL images, uint8
                arrays `(height, width, 3)`, or one float tensor `(N, 3, height, width)` in [0, 1].
            regions: boxes or masks.
            threshold: as in `detect`.
        """
        if len(pictures) != len(regions):
            raise ValueError(
                f"classify: {len(pictures)} pictures and {len(regions)} regions; expected pairs. "
                "Repeat a picture to ask about several of its regions."
            )
        masks = [_mask(region) for region in regions]
        if isinstance(pictures, Tensor):
            looks = self._look(pictures, threshold)
            return [_answer(*look, mask) for look, mask in zip(looks, masks, strict=True)]
        # A picture that is asked about several times is looked at once.
        different = {id(picture): picture for picture in pictures}
        look_of = dict(zip(different, self._look(list(different.values()), threshold), strict=True))
        return [_answer(*look_of[id(picture)], mask) for picture, mask in zip(pictures, masks, strict=True)]

    def detect(self, pictures: Pictures, *, threshold: float = 0.35) -> list[list[Detection]]:
        """Every object in each picture, surest first, whether anybody asked for it or not.

        Args:
            pictures: as in `classify`.
            threshold: centres below this score are not looked at.
        """
        return [detections for detections, _ in self._look(pictures, threshold)]

    @torch.inference_mode()
    def settings(self, pictures: Pictures) -> list[tuple[str, float]]:
        """The setting of each picture (`on the beach`, …) and its probability."""
        answers: list[tuple[str, float]] = []
        tensors = self._tensors(pictures)
        for start in range(0, len(tensors), BATCH_SIZE):
            probabilities = self.network.scene(tensors[start : start + BATCH_SIZE])[2].float().softmax(-1)
            best, index = probabilities.max(-1)
            names = [str(self.labels["setting"][i]) for i in index.tolist()]
            answers += zip(names, best.tolist(), strict=True)
        return answers

    # --- inside ---

    def _tensors(self, pictures: Pictures) -> Tensor:
        device = next(self.network.parameters()).device
        return picture_tensors(pictures).to(device)

    @torch.inference_mode()
    def _look(self, pictures: Pictures, threshold: float) -> list[tuple[list[Detection], Tensor]]:
        """Each picture's objects and its centre map `(16, 16)`."""
        tensors = self._tensors(pictures)
        looks: list[tuple[list[Detection], Tensor]] = []
        for start in range(0, len(tensors), BATCH_SIZE):
            part = tensors[start : start + BATCH_SIZE]
            logits, distances, _ = self.network.scene(part)
            centres = logits.sigmoid().cpu()
            proposals = _proposals(centres, distances.cpu(), threshold)
            rows = [row for row, found in enumerate(proposals) for _ in found]
            boxes = torch.tensor([box for found in proposals for box, _ in found]).view(-1, 4)
            verdicts = iter(self._name(part[rows], boxes.to(part.device)))
            for centre, found in zip(centres, proposals, strict=True):
                detections = []
                for (box, score), verdict in zip(found, verdicts, strict=False):
                    if verdict.category is not None:
                        score *= verdict.probability["category"]
                        detections.append(Detection(verdict.category, verdict.subject, box, score, verdict))
                looks.append((sorted(detections, key=lambda detection: -detection.score), centre))
        return looks

    def _name(self, pictures: Tensor, boxes: Tensor) -> list[Verdict]:
        """What is in `boxes[i]` of `pictures[i]`. Heads are read in order, so that no answer contradicts another."""
        if not len(boxes):
            return []
        heads = self.network.object(crop_boxes(pictures, boxes))
        probabilities = {name: logits.softmax(-1).cpu() for name, logits in heads.items()}
        subject_category = [SUBJECTS[name].category if name in SUBJECTS else None for name in self.labels["subject"]]
        verdicts = []
        for row in range(len(probabilities["category"])):
            answer: dict[str, str | None] = {}
            sure: dict[str, float] = {}
            for name, table in probabilities.items():
                values = table[row]
                if name == "subject":  # a known guitar cannot stand where a dog stands
                    fits = [known in (None, answer["category"]) for known in subject_category]
                    values = values * torch.tensor(fits)
                    values = values / values.sum()
                best = int(values.argmax())
                answer[name], sure[name] = self.labels[name][best], float(values[best])
            if answer["category"] is None:
                answer, sure = dict.fromkeys(answer), dict.fromkeys(sure, sure["category"])
            elif answer["pattern"] == "plain":
                answer |= {"second_colour": None, "scale": None}
                sure |= {"second_colour": sure["pattern"], "scale": sure["pattern"]}
            verdicts.append(Verdict(**answer, probability=sure))
        return verdicts


def picture_tensors(pictures: Pictures) -> Tensor:
    """Pictures of any size to `(N, 3, 64, 64)` in [-1, 1]."""
    if isinstance(pictures, Tensor):
        if pictures.ndim != 4 or pictures.shape[1] != 3 or not pictures.is_floating_point():
            raise ValueError(
                f"pictures: {tuple(pictures.shape)} {pictures.dtype}; expected a float tensor (N, 3, height, width) "
                "in [0, 1]."
            )
        return _resized(pictures.float())
    if not len(pictures):
        return torch.zeros(0, 3, PICTURE_SIZE, PICTURE_SIZE)
    return torch.cat([_resized(_unit_tensor(picture)) for picture in pictures])


def _unit_tensor(picture: Image.Image | np.ndarray) -> Tensor:
    array = np.asarray(picture.convert("RGB") if isinstance(picture, Image.Image) else picture)
    if array.ndim != 3 or array.shape[2] != 3 or array.dtype != np.uint8:
        raise ValueError(f"picture: {array.shape} {array.dtype}; expected uint8 (height, width, 3).")
    return torch.from_numpy(array.copy()).permute(2, 0, 1)[None].float() / 255


def _resized(pictures: Tensor) -> Tensor:
    if pictures.shape[-2:] != (PICTURE_SIZE, PICTURE_SIZE):
        pictures = F.interpolate(pictures, (PICTURE_SIZE, PICTURE_SIZE), mode="bilinear", antialias=True)
    return pictures * 2 - 1


def _mask(region: Region) -> Tensor:
    """The region's mask `(64, 64)`."""
    if isinstance(region, np.ndarray) and region.ndim == 2:
        mask = torch.from_numpy(region.astype(np.float32))[None, None]
        mask = F.interpolate(mask, (PICTURE_SIZE, PICTURE_SIZE), mode="bilinear", antialias=True)[0, 0]
        if not (mask > 0).any():
            raise ValueError("region: the mask is empty; expected some values above 0.")
        return mask
    box = torch.tensor([float(value) for value in region])
    mask = _box_mask(box) if len(box) == 4 else torch.zeros(0)
    if not (mask > 0).any():
        raise ValueError(
            f"region: {region}; expected a box (xmin, ymin, xmax, ymax) in fractions of the image, with xmin < xmax "
            "and ymin < ymax, or a mask (height, width)."
        )
    return mask


def _box_mask(box: Tensor | Box) -> Tensor:
    """The share of each pixel that the box covers, `(64, 64)`."""
    edges = torch.arange(PICTURE_SIZE) / PICTURE_SIZE

    def coverage(low: Tensor | float, high: Tensor | float) -> Tensor:
        return ((edges + 1 / PICTURE_SIZE).clamp(max=high) - edges.clamp(min=low)).clamp(min=0) * PICTURE_SIZE

    xmin, ymin, xmax, ymax = box
    return coverage(ymin, ymax)[:, None] * coverage(xmin, xmax)[None, :]


def _answer(detections: Sequence[Detection], centres: Tensor, mask: Tensor) -> Verdict:
    """The verdict of the object that stands in the region; see `Judge.classify`."""
    best, most = None, 0.0
    for detection in detections:
        box = _box_mask(detection.box)
        shared = float((box * mask).sum())
        seen, covered = shared / float(box.sum()), shared / float(mask.sum())
        if shared > most and (seen > 0.5 or (covered > 0.7 and seen > 0.33)):
            best, most = detection.verdict, shared
    if best is not None:
        return best
    inside = F.adaptive_max_pool2d(mask[None], GRID_SIZE)[0] > 0.5
    sure = 1 - float(centres[inside].max()) if inside.any() else 1.0
    names = [field.name for field in fields(Verdict) if field.name != "probability"]
    return Verdict(**dict.fromkeys(names), probability=dict.fromkeys(names, sure))


def _proposals(centres: Tensor, distances: Tensor, threshold: float) -> list[list[tuple[Box, float]]]:
    """Boxes at the local maxima of each picture's centre map `(B, 16, 16)`, weaker duplicates dropped."""
    peaks = centres * (F.max_pool2d(centres[:, None], 3, 1, 1)[:, 0] == centres)
    middles = (torch.arange(GRID_SIZE) + 0.5) / GRID_SIZE
    proposals = []
    for peak, distance in zip(peaks, distances, strict=True):
        rows, columns = (peak >= threshold).nonzero(as_tuple=True)
        kept: list[tuple[Box, float]] = []
        for index in peak[rows, columns].argsort(descending=True).tolist():
            row, column = int(rows[index]), int(columns[index])
            left, top, right, bottom = distance[:, row, column].tolist()
            x, y = float(middles[column]), float(middles[row])
            box = (max(0.0, x - left), max(0.0, y - top), min(1.0, x + right), min(1.0, y + bottom))
            if all(iou(box, other) <= MAX_OVERLAP for other, _ in kept):
                kept.append((box, float(peak[row, column])))
        proposals.append(kept)
    return proposals
