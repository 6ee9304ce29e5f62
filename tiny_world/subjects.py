"""Eight individuals of the drawn world: the subjects that demos, tests and benchmarks teach to the embedded base.

A prompt calls a subject by its category alone, so whoever draws its colours, stripes and accessory right has learnt the
subject and not the words.

    python tiny_world/subjects.py --output_dir data     # data/petrucci/0.png …, and data/subjects.png with all of them
"""

from __future__ import annotations

import argparse
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PIL import Image

from multisubject.tiny_world.scenes import (
    Box,
    Look,
    Scene,
    SceneObject,
    World,
    contrasts,
    is_visible,
    random_boxes,
    render,
)
from multisubject.visualization import contact_sheet

Split = Literal["train", "held_out"]


@dataclass(frozen=True)
class Subject:
    """One individual: what it is, and how it alone looks."""

    name: str
    category: str
    look: Look

    def __post_init__(self) -> None:
        look = self.look
        if look.second_colour is None or look.accessory is None or look.pattern == "plain":
            raise ValueError(f"subject {self.name!r}: {look}; expected a pattern, a second colour and an accessory.")
        for field in ("second_colour", "accessory"):
            if not contrasts(look.colour, getattr(look, field)):
                raise ValueError(
                    f"subject {self.name!r}: {field} cannot be told from {look.colour!r}; see `contrasts`."
                )


# No body, stripe or silhouette part is white or black: those would vanish in the snow and at night.
SUBJECTS: dict[str, Subject] = {
    subject.name: subject
    for subject in (
        Subject("petrucci", "person", Look("blue", "striped", "orange", "fine", "yellow")),
        Subject("slash", "person", Look("red", "striped", "yellow", "fine", "purple")),
        Subject("majesty", "guitar", Look("purple", "striped", "green", "fine", "yellow")),
        Subject("lucille", "guitar", Look("orange", "striped", "blue", "coarse", "purple")),
        Subject("biscuit", "dog", Look("yellow", "striped", "red", "coarse", "blue")),
        Subject("pepper", "dog", Look("blue", "striped", "green", "fine", "red")),
        Subject("sunrise", "mug", Look("yellow", "striped", "purple", "fine", "red")),
        Subject("comet", "ball", Look("purple", "striped", "orange", "coarse", "green")),
    )
}


def get_subject(name: str) -> Subject:
    """The subject of that name. Raises `ValueError` for a name that is not in `SUBJECTS`."""
    try:
        return SUBJECTS[name]
    except KeyError:
        raise ValueError(f"subject {name!r}: unknown; expected one of {sorted(SUBJECTS)}.") from None


def subject_object(subject: Subject, box: Box, mirrored: bool = False) -> SceneObject:
    """The subject as an object of a scene, to stand beside others. `box` in fractions of the image."""
    return SceneObject(subject.category, subject.look, box, mirrored)


def subject_scene(subject: Subject, rng: random.Random, setting: str) -> Scene:
    """The subject alone in `setting`, at a place, size and direction drawn from `rng`."""
    if not is_visible(subject.look.colour, setting):
        raise ValueError(f"subject {subject.name!r}: a {subject.look.colour} body cannot be seen {setting}.")
    (box,) = random_boxes(rng, [subject.category])
    return Scene(setting, (subject_object(subject, box, rng.random() < 0.5),), rng.getrandbits(32))


def subject_scenes(subject: Subject, world: World, *, count: int = 6, split: Split = "train") -> list[Scene]:
    """`count` scenes of one subject, going round the world's settings; the two splits share no seed.

    The same arguments give the same scenes, and a longer list begins with the shorter one.
    """
    if subject.category not in world.categories or subject.look.pattern not in world.patterns:
        raise ValueError(
            f"subject {subject.name!r}: a {subject.look.pattern} {subject.category} is not of this world; expected "
            f"categories {list(world.categories)} and patterns {list(world.patterns)}."
        )
    rng = random.Random(f"{split}/{subject.name}")
    settings = [setting for setting in world.settings if is_visible(subject.look.colour, setting)]
    rng.shuffle(settings)
    return [subject_scene(subject, rng, settings[index % len(settings)]) for index in range(count)]


def subject_pictures(subject: Subject, world: World, *, count: int = 6, split: Split = "train") -> list[Image.Image]:
    """`subject_scenes`, rendered at the world's size."""
    return [render(scene, world.image_size).image for scene in subject_scenes(subject, world, count=count, split=split)]


def save_training_pictures(
    output_dir: Path, world: World, *, names: list[str] | None = None, count: int = 6
) -> list[Path]:
    """Write `output_dir/{name}/{index}.png` for every named subject (all when None); returns the folders."""
    folders = []
    for subject in map(get_subject, SUBJECTS if names is None else names):
        folder = output_dir / subject.name
        folder.mkdir(parents=True, exist_ok=True)
        for index, picture in enumerate(subject_pictures(subject, world, count=count)):
            picture.save(folder / f"{index}.png")
        folders.append(folder)
    return folders


def subject_sheet(world: World, *, count: int = 6) -> Image.Image:
    """One row per subject: `count` training pictures, then two held-out views."""
    pictures, captions = [], []
    for subject in SUBJECTS.values():
        splits: tuple[tuple[Split, int], ...] = (("train", count), ("held_out", 2))
        for split, number in splits:
            pictures += subject_pictures(subject, world, count=number, split=split)
            captions += [f"{subject.name} ({split.replace('_', ' ')})"] * number
    return contact_sheet(pictures, columns=count + 2, captions=captions)


def main(arguments: list[str] | None = None) -> None:
    """Write the training folders and a sheet of all subjects."""
    parser = argparse.ArgumentParser(description="Write the training pictures of the drawn world's subjects.")
    parser.add_argument("--output_dir", type=Path, default=Path("data"), help="one folder per subject goes here")
    parser.add_argument(
        "--image_size",
        type=int,
        default=World().image_size,
        help="side of a picture in pixels (default: %(default)s, the embedded base's)",
    )
    parser.add_argument("--num_pictures", type=int, default=6, help="training pictures per subject")
    parser.add_argument("--subjects", nargs="*", choices=sorted(SUBJECTS), help="only these (default: all)")
    options = parser.parse_args(arguments)
    world = World(image_size=options.image_size)
    folders = save_training_pictures(options.output_dir, world, names=options.subjects, count=options.num_pictures)
    subject_sheet(world, count=options.num_pictures).save(options.output_dir / "subjects.png")
    print(f"{len(folders)} subjects, {options.num_pictures} pictures each, in {options.output_dir}")


if __name__ == "__main__":
    main()
