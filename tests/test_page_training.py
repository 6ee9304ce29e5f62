"""Trainings that the page starts: what they are given, how far they are, how they end, and how they go on."""

import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from multisubject.base_models import load_text_encoders
from multisubject.generation.base_model import BaseModel
from multisubject.page.subjects import SubjectLibrary
from multisubject.page.training import MOST_JOBS, MOST_PICTURES, TrainingJobs, TrainingPicture, cores
from multisubject.training.pictures import load_pictures

QUICK = {"train_batch_size": 1, "validation_inference_steps": 1}
RED = TrainingPicture(Image.new("RGB", (64, 64), "red"))


@pytest.fixture(scope="module")
def base(base_path):
    return BaseModel.read(base_path), load_text_encoders(base_path)


@pytest.fixture
def library(base, tmp_path):
    return SubjectLibrary(tmp_path / "subjects", *base)


@pytest.fixture
def jobs(library, tmp_path):
    jobs = TrainingJobs(tmp_path / "trainings", library, library.base, "cpu", QUICK)
    yield jobs
    jobs.close()


@pytest.fixture
def stand_in(monkeypatch):
    """Have a line of Python in the place of the trainer."""

    def put(code):
        monkeypatch.setattr(TrainingJobs, "_command", lambda self, job: [sys.executable, "-c", code])

    return put


def wait(jobs, key, until, seconds=240):
    end = time.monotonic() + seconds
    while not until(state := jobs.state(key)):
        assert time.monotonic() < end, state
        assert not state.is_over or until(state), state
        time.sleep(0.05)
    return state


def over(state):
    return state.is_over


# --- real trainings --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_training_ends_in_the_library(jobs, library):
    key = jobs.start([RED, RED], "rex", "person", steps=9)
    with pytest.raises(ValueError, match="training of <rex> is running"):
        jobs.start([RED], "max", "person", steps=9)
    state = wait(jobs, key, over)
    assert (state.phase, state.step, state.steps, state.error) == ("done", 9, 9, None)
    assert [step for step, _ in state.losses] == [*range(1, 10)] and 0 < state.loss < 10
    assert state.sheet.name == "step-000009.png" and len(list(state.sheet.parent.iterdir())) == 9
    (said,) = library.listing()
    assert (said["name"], said["class_phrase"]) == ("rex", "person") and said["thumbnail"]
    assert Path(library.sources()["rex"]).parent == library.folder
    again = TrainingJobs(jobs.folder, library, library.base)
    assert again.states() == [state] and not state.can_resume
    jobs.remove(key)
    assert not jobs.states() and not list(jobs.folder.iterdir()) and Path(library.sources()["rex"]).exists()


@pytest.mark.slow
def test_one_that_the_server_stopped_is_resumed_by_the_next(jobs, library):
    key = jobs.start([RED], "rex", "red ball", steps=400)
    early = wait(jobs, key, lambda state: state.step >= 2)
    jobs.close()
    state = jobs.state(key)
    assert (state.phase, state.error, state.can_resume) == ("stopped", None, True) and early.step <= state.step < 400
    assert "pictures" in os.listdir(jobs.folder / key) and not library.listing()

    again = TrainingJobs(jobs.folder, library, library.base, "cpu", QUICK)
    assert again.states() == [state]
    again.resume(key)
    try:
        later = wait(again, key, lambda later: later.step > state.step)
        assert later.losses[0] == pytest.approx(state.losses[0]) or later.step > 200  # what was learnt is kept
        again.cancel(key)
        assert wait(again, key, over).phase == "stopped"
    finally:
        again.close()


@pytest.mark.slow
def test_pictures_that_cannot_be_learnt_from_are_named(jobs):
    key = jobs.start([TrainingPicture(Image.new("RGB", (8, 8)))], "rex", "person", steps=1)
    state = wait(jobs, key, over)
    assert state.phase == "failed" and "none of the 1 picture(s)" in state.error and state.can_resume


# --- what the trainer is given ---------------------------------------------------------------------------------------


def test_pictures_and_masks_are_those_that_the_trainer_reads(jobs, stand_in):
    stand_in("pass")
    mask = Image.new("L", (64, 48))
    mask.paste(255, (0, 0, 32, 48))
    masked = TrainingPicture(Image.new("RGB", (64, 48), "blue"), mask)
    cut_out = TrainingPicture(Image.new("RGBA", (48, 48), (255, 0, 0, 0)))
    cut_out.image.paste((0, 255, 0, 255), (0, 0, 24, 24))
    unpainted = TrainingPicture(RED.image, Image.new("L", (64, 64)))
    key = jobs.start([RED, masked, cut_out, unpainted], "rex", "person")
    read = load_pictures(jobs.folder / key / "pictures")
    assert [picture.mask is not None for picture in read] == [False, True, True, False]
    assert np.array_equal(read[1].mask, mask) and read[1].image.getpixel((0, 0)) == (0, 0, 255)
    assert np.asarray(read[2].mask).mean() == pytest.approx(255 / 4)


def test_a_training_leaves_a_core_to_the_page(jobs, stand_in):
    stand_in("import os, sys; sys.exit(f'error: {os.environ[\"OMP_NUM_THREADS\"]} {os.nice(0) > 5}')")
    state = wait(jobs, jobs.start([RED], "rex", "person"), over)
    assert state.error == f"{max(1, cores() - 1)} True"


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"pictures": []}, "There are 0 pictures; expected 1 to"),
        ({"pictures": [RED] * (MOST_PICTURES + 1)}, "pictures; expected 1 to"),
        ({"name": "../rex"}, "a subject's name is 1 to 64 letters"),
        ({"class_phrase": ""}, "The class phrase: is empty"),
        ({"class_phrase": "a photo of a dog"}, "expected the class phrase alone"),
        ({"class_phrase": "<script>"}, "expected the words that stand for the subject"),
        ({"steps": 0}, "The number of steps is 0; expected 1 to"),
        ({"steps": 10**9}, "expected 1 to"),
        ({"steps": 2.5}, "expected 1 to"),
        ({"pictures": [TrainingPicture(RED.image, Image.new("L", (3, 3)))]}, "A mask is 3 x 3, its picture 64 x 64"),
    ],
)
def test_what_cannot_be_trained_is_refused(asked, message, jobs, stand_in):
    stand_in("raise SystemExit('it began')")
    with pytest.raises(ValueError, match=message):
        jobs.start(**{"pictures": [RED], "name": "rex", "class_phrase": "person", **asked})
    assert not jobs.states() and not (jobs.folder.exists() and list(jobs.folder.iterdir()))


def test_a_taken_name_is_refused(jobs, library):
    embeddings = Path(__file__).parent.parent / "embeddings"
    library.add_source(embeddings / "petrucci.safetensors")
    with pytest.raises(ValueError, match="There is a subject <petrucci> already"):
        jobs.start([RED], "Petrucci", "person")


# --- how it ends -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("print('one'); print('error: no space'); raise SystemExit(1)", "no space"),
        ("raise KeyError('x')", "KeyError: 'x'"),
        ("import os; os.kill(os.getpid(), 9)", "the trainer ended with status -9"),
        ("pass", "no such file or folder"),
    ],
)
def test_how_a_trainer_failed_is_said(code, error, jobs, stand_in):
    stand_in(code)
    state = wait(jobs, jobs.start([RED], "rex", "person"), over)
    assert state.phase == "failed" and error in state.error and state.can_resume
    assert TrainingJobs(jobs.folder, jobs.library, jobs.base).states() == [state]


def test_a_training_is_cancelled_before_its_first_step_and_begins_anew(jobs, stand_in):
    stand_in("import time; time.sleep(60)")
    key = jobs.start([RED], "rex", "person")
    with pytest.raises(ValueError, match="cancel it first"):
        jobs.remove(key)
    jobs.cancel(key)
    state = wait(jobs, key, over, 30)
    assert (state.phase, state.step, state.error) == ("stopped", 0, None)
    stand_in("raise SystemExit('error: again')")
    jobs.resume(key)
    assert wait(jobs, key, over).error == "again"


def test_half_a_progress_file_is_no_progress(jobs, stand_in):
    stand_in("open('progress.json', 'w').write('{\"phase\": '); import time; time.sleep(60)")
    key = jobs.start([RED], "rex", "person")
    time.sleep(0.5)
    assert jobs.state(key).phase == "waiting" and jobs.state(key).losses == ()


def test_the_number_of_trainings_is_limited(jobs, stand_in):
    stand_in("raise SystemExit(1)")
    for number in range(MOST_JOBS):
        wait(jobs, jobs.start([RED], f"rex{number}", "person"), over)
    with pytest.raises(ValueError, match=f"There are {MOST_JOBS} trainings; remove"):
        jobs.start([RED], "rex", "person")


@pytest.mark.parametrize("key", ["nobody", "../..", None, ["x"], {}])
def test_unknown_trainings_are_refused(key, jobs):
    for ask in (jobs.state, jobs.cancel, jobs.resume, jobs.remove):
        with pytest.raises(ValueError, match="That training is not there any more"):
            ask(key)


def test_a_damaged_job_is_left_alone(jobs):
    for number, text in enumerate(("{", "[]", json.dumps({"id": "x"}))):
        folder = jobs.folder / str(number)
        folder.mkdir(parents=True)
        (folder / "job.json").write_text(text)
    assert TrainingJobs(jobs.folder, jobs.library, jobs.base).states() == []
