import itertools
import random
from dataclasses import asdict
from pathlib import Path

import pytest
from PIL import Image

from multisubject.tiny_world import picture_size
from multisubject.tiny_world.scenes import Look, World, render
from multisubject.tiny_world.subjects import (
    SUBJECTS,
    Subject,
    get_subject,
    main,
    subject_pictures,
    subject_scene,
    subject_scenes,
)

WORLD = World()


def test_the_cast_is_complete():
    categories = [subject.category for subject in SUBJECTS.values()]
    assert len(SUBJECTS) == 8
    assert SUBJECTS["petrucci"].category == SUBJECTS["slash"].category == "person"
    assert SUBJECTS["majesty"].category == "guitar"
    assert {name: categories.count(name) for name in ("guitar", "dog")} == {"guitar": 2, "dog": 2}


@pytest.mark.parametrize("a, b", itertools.combinations(SUBJECTS.values(), 2), ids=lambda subject: subject.name)
def test_no_two_subjects_share_a_colour_pair(a, b):
    assert (a.look.colour, a.look.second_colour) != (b.look.colour, b.look.second_colour)
    if a.category == b.category:
        ours, theirs = asdict(a.look), asdict(b.look)
        assert sum(ours[field] != theirs[field] for field in ours) >= 3


@pytest.mark.parametrize("subject", SUBJECTS.values(), ids=lambda subject: subject.name)
def test_subject_goes_round_all_settings_in_view(subject):
    scenes = subject_scenes(subject, WORLD)
    assert len(scenes) == 6
    assert {scene.setting for scene in scenes} == set(WORLD.settings)
    assert len({scene.objects[0].box for scene in scenes}) == 6
    for scene in scenes:
        (box,) = render(scene, 64).boxes
        assert box is not None and box[3] - box[1] > 0.3


def test_same_seed_gives_the_same_bytes_and_splits_share_none():
    subject = SUBJECTS["petrucci"]
    first, again = (subject_pictures(subject, WORLD) for _ in range(2))
    held_out = subject_pictures(subject, WORLD, split="held_out")
    assert [picture.tobytes() for picture in first] == [picture.tobytes() for picture in again]
    assert not {picture.tobytes() for picture in first} & {picture.tobytes() for picture in held_out}


def test_longer_list_begins_with_the_shorter():
    subject = SUBJECTS["majesty"]
    assert subject_scenes(subject, WORLD, count=9)[:5] == subject_scenes(subject, WORLD, count=5)


def test_command_writes_one_folder_per_subject(tmp_path: Path, capsys):
    main(
        ["--output_dir", str(tmp_path), "--num_pictures", "2", "--image_size", "96", "--subjects", "petrucci", "comet"]
    )
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.png")) == [
        "comet/0.png",
        "comet/1.png",
        "petrucci/0.png",
        "petrucci/1.png",
        "subjects.png",
    ]
    assert Image.open(tmp_path / "petrucci" / "0.png").size == (96, 96)
    assert "2 subjects" in capsys.readouterr().out


def test_pictures_have_the_size_of_the_embedded_base_unless_told(tmp_path: Path, base_path: str):
    main(["--output_dir", str(tmp_path), "--num_pictures", "1", "--subjects", "comet"])
    assert Image.open(tmp_path / "comet" / "0.png").size == (picture_size(base_path),) * 2


def test_unknown_subject_names_the_known_ones():
    with pytest.raises(ValueError, match=r"'hendrix'.*majesty"):
        get_subject("hendrix")


def test_subject_that_a_caption_could_spell_is_refused():
    with pytest.raises(ValueError, match="expected a pattern, a second colour and an accessory"):
        Subject("plain", "dog", Look("red"))


def test_subject_with_unreadable_stripes_is_refused():
    with pytest.raises(ValueError, match="second_colour cannot be told from 'red'"):
        Subject("dim", "dog", Look("red", "striped", "orange", "fine", "blue"))


def test_invisible_setting_is_refused():
    ghost = Subject("ghost", "dog", Look("white", "striped", "red", "fine", "blue"))
    with pytest.raises(ValueError, match="cannot be seen in the snow"):
        subject_scene(ghost, random.Random(0), "in the snow")


def test_subject_of_another_world_is_refused():
    with pytest.raises(ValueError, match="not of this world"):
        subject_scenes(SUBJECTS["comet"], World(categories=("dog",)))
