"""Trainings as jobs of the page's server, and the same over HTTP."""

import base64
import os
import subprocess
import sys
import time
from pathlib import Path

import gradio as gr
import pytest
from PIL import Image

import multisubject
from multisubject.page.subjects_service import SubjectsService
from multisubject.page.training import TrainingJobs, TrainingPicture, as_training_picture, training_threads
from multisubject.pictures import data_url
from multisubject.tiny_world.scenes import World
from multisubject.tiny_world.subjects import get_subject, subject_pictures
from multisubject.training.pictures import load_pictures

EMBEDDINGS = Path(multisubject.__file__).parent / "embeddings"


@pytest.fixture(scope="module")
def pictures():
    drawn = subject_pictures(get_subject("comet"), World(), count=2)
    mask = Image.new("L", drawn[0].size)
    mask.paste(255, (32, 32, 96, 96))
    return [TrainingPicture(drawn[0], mask), TrainingPicture(drawn[1])]


def wait(until, seconds=120.0):
    end = time.monotonic() + seconds
    while not (value := until()):
        assert time.monotonic() < end, "it never came"
        time.sleep(0.05)
    return value


def test_what_cannot_be_trained_is_refused(jobs, pictures):
    jobs.library.read(str(EMBEDDINGS))
    for name, phrase, given, steps, words in (
        ("comet", "ball", pictures, 3, "already"),
        ("../x", "ball", pictures, 3, "a subject's name is"),
        ("rex", "", pictures, 3, "what it is: is empty"),
        ("rex", "a photo of a dog", pictures, 3, "the class phrase alone"),
        ("rex", "<b>", pictures, 3, "without '<' and '>'"),
        ("rex", None, pictures, 3, "what it is: is empty"),
        ("rex", "dog", [], 3, "0 pictures; expected 1 to 30"),
        ("rex", "dog", pictures * 16, 3, "32 pictures"),
        ("rex", "dog", pictures, 4001, "steps: 4001"),
        ("rex", "dog", pictures, 2.5, "steps: 2.5"),
    ):
        with pytest.raises(ValueError) as error:
            jobs.start(name, phrase, given, steps)
        assert words in str(error.value)
    with pytest.raises(ValueError, match="cannot go on"):
        jobs.resume("nobody")
    assert not jobs.jobs() and not jobs.folder.exists()


@pytest.mark.slow
def test_a_training_is_cancelled_goes_on_in_a_new_server_and_ends_among_the_subjects(jobs, pictures, base):
    job = jobs.start("balloon", "ball", pictures, 40)
    assert {path.name for path in (jobs.folder / "balloon" / "pictures").iterdir()} == {
        "000.png", "000_mask.png", "001.png",
    }  # fmt: skip
    with pytest.raises(ValueError, match="being trained already"):
        jobs.start("Balloon", "ball", pictures, 3)
    second = jobs.start("other", "ball", pictures, 3)
    wait(lambda: jobs.progress(job).get("phase") == "training")
    assert jobs.get(second.key).state == "waiting", "one at a time"
    jobs.stop(second.key)
    jobs.stop(job.key)
    wait(lambda: not jobs.get(job.key).is_active)
    assert [jobs.get(key).state for key in (job.key, second.key)] == ["stopped", "stopped"]
    reached = jobs.progress(job)["step"]
    assert jobs.progress(job)["phase"] == "stopped" and 1 <= reached < 40
    assert (jobs.folder / job.key / "run" / f"checkpoint-{reached}").is_dir()
    assert "1 masks in use" in (jobs.folder / job.key / "log.txt").read_text()
    jobs.close()

    again = TrainingJobs(base, jobs.library, jobs.folder, on_cpu=True, options=jobs._options)
    try:
        assert {one.key: one.state for one in again.jobs()} == {"balloon": "stopped", "other": "stopped"}
        again.remove("other")
        assert not (again.folder / "other").exists()
        again.resume("balloon")
        wait(lambda: not again.get("balloon").is_active)
        assert again.get("balloon").state == "done", again.get("balloon").message
        told = again.progress(job)
        assert told["phase"] == "done" and told["step"] == 40 and len(told["curve"]) == 40
        assert "from the beginning" not in (again.folder / "balloon" / "log.txt").read_text()
        assert again.sheets(job)[-1].name == "step-000040.png"
        (said,) = again.library.listing()
        assert (said["name"], said["class_phrase"]) == ("balloon", "ball") and said["thumbnail"]
    finally:
        again.close()


@pytest.fixture
def stand_in(monkeypatch):
    """Have a line of Python in the place of the trainer."""

    def put(code):
        monkeypatch.setattr(TrainingJobs, "_command", lambda self, job: [sys.executable, "-c", code])

    return put


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("print('one'); print('no space'); raise SystemExit(1)", "no space"),
        ("raise KeyError('x')", "KeyError: 'x'"),
        ("import os; os.kill(os.getpid(), 9)", "the training ended with status -9."),
        ("pass", "no such file or folder"),
    ],
)
def test_how_a_trainer_failed_is_said_also_after_a_restart(code, message, jobs, pictures, stand_in):
    stand_in(code)
    job = jobs.start("rex", "dog", pictures, 3)
    wait(lambda: not jobs.get(job.key).is_active)
    assert jobs.get(job.key).state == "failed" and message in jobs.get(job.key).message
    again = TrainingJobs(jobs.base, jobs.library, jobs.folder)
    assert again.jobs() == jobs.jobs()
    again.close()


def test_a_trainer_is_given_less_than_the_page(jobs, pictures, stand_in):
    stand_in("import os, sys, time; time.sleep(0.2); sys.exit(f'{os.environ[\"OMP_NUM_THREADS\"]} {os.nice(0)}')")
    job = jobs.start("rex", "dog", pictures, 3)
    wait(lambda: not jobs.get(job.key).is_active)
    assert jobs.get(job.key).message == f"{training_threads()} {min(19, os.nice(0) + 10)}"


def test_a_trainer_that_hears_nothing_is_ended_with_the_server(jobs, pictures, stand_in, monkeypatch):
    stand_in(
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(99)"
    )
    monkeypatch.setattr("multisubject.page.training._SECONDS_TO_STOP", 1.0)
    job = jobs.start("rex", "dog", pictures, 3)
    wait(
        lambda: (
            (jobs.folder / job.key / "log.txt").exists() and "deaf" in (jobs.folder / job.key / "log.txt").read_text()
        )
    )
    process = jobs._process
    jobs.stop(job.key)
    assert jobs.get(job.key).state == "stopping"
    jobs.close()
    assert process.wait(10) == -9 and jobs.get(job.key).state == "stopped"


def test_a_name_that_was_taken_meanwhile_stops_a_resumed_training(jobs, pictures, stand_in):
    stand_in("raise SystemExit(1)")
    job = jobs.start("rex", "dog", pictures, 3)
    wait(lambda: not jobs.get(job.key).is_active)
    jobs.library.add_file(EMBEDDINGS / "pepper.safetensors", name="Rex")
    with pytest.raises(ValueError, match="there is a subject"):
        jobs.resume(job.key)


def test_a_full_disk_takes_one_training_and_no_other(jobs, pictures, stand_in, monkeypatch):
    def full(path, data):
        raise OSError("No space left on device")

    stand_in("raise SystemExit('the trainer was here')")
    with monkeypatch.context() as patch:
        patch.setattr("multisubject.page.training.write_atomically", full)
        with pytest.raises(OSError, match="No space"):
            jobs.start("rex", "dog", pictures, 3)
        assert not jobs.jobs() and not [*jobs.folder.iterdir()]
        patch.undo()
        first = jobs.start("rex", "dog", pictures, 3)
        wait(lambda: not jobs.get(first.key).is_active)
        patch.setattr("multisubject.page.training.write_atomically", full)
        jobs.resume(first.key)
        wait(lambda: not jobs.get(first.key).is_active)
    second = jobs.start("max", "dog", pictures, 3)
    wait(lambda: not jobs.get(second.key).is_active)
    assert jobs.get(second.key).message == "the trainer was here"


@pytest.mark.skipif(os.name == "nt", reason="a process keeps its parent's number there")
def test_a_trainer_stops_when_its_server_is_gone(tmp_path):
    trainer = """if True:
        import sys, time
        from multisubject.page import trainer
        trainer.train_residual.main = lambda options: print(*options, flush=True) or time.sleep(60)
        trainer.main(sys.argv[1:])
    """
    server = f"""if True:
        import os, subprocess, sys, time
        log = open({str(tmp_path / "log")!r}, "wb")
        command = [sys.executable, "-c", {trainer!r}, str(os.getpid()), "--steps=3"]
        print(subprocess.Popen(command, stdout=log, start_new_session=True).pid, flush=True)
        time.sleep(60)
    """
    process = subprocess.Popen([sys.executable, "-c", server], stdout=subprocess.PIPE, text=True)
    started = int(process.stdout.readline())
    wait(lambda: "--steps=3" in (tmp_path / "log").read_text())
    assert is_running(started)
    process.kill()
    process.wait()
    wait(lambda: not is_running(started), seconds=20)


def is_running(process):
    """Whether it is there, and no zombie that nobody waits for."""
    said = subprocess.run(["ps", "-o", "stat=", "-p", str(process)], capture_output=True, text=True, check=False)
    return said.stdout.strip()[:1] not in ("", "Z")


@pytest.mark.slow
def test_a_training_that_fails_says_why(jobs, pictures, base):
    failing = TrainingJobs(base, jobs.library, jobs.folder, on_cpu=True, options=[*jobs._options, "--resolution=7"])
    try:
        job = failing.start("rex", "dog", pictures, 3)
        wait(lambda: not failing.get(job.key).is_active)
        assert failing.get(job.key).state == "failed"
        assert "this base needs a multiple of" in failing.get(job.key).message
    finally:
        failing.close()


def test_pictures_are_kept_as_the_trainer_reads_them(jobs, stand_in):
    stand_in("pass")
    red = Image.new("RGB", (64, 48), "red")
    cut_out = Image.new("RGBA", (48, 48), (255, 0, 0, 0))
    cut_out.paste((0, 255, 0, 255), (0, 0, 24, 24))
    half = Image.new("L", red.size)
    half.paste(255, (0, 0, 32, 48))
    given = [
        (red, None),
        (red, half),
        (cut_out, None),
        (red, Image.new("RGB", red.size)),
        (red.resize((3200, 2400)), None),
    ]
    job = jobs.start("rex", "dog", [as_training_picture(*one) for one in given], 3)
    read = load_pictures(jobs.folder / job.key / "pictures", strict=True)
    assert [picture.mask is not None for picture in read] == [False, True, True, False, False]
    assert read[1].mask.tobytes() == half.tobytes() and read[1].image.getpixel((40, 0)) == (255, 0, 0)
    assert sum(read[2].mask.histogram()[255:]) == 24 * 24
    assert read[4].image.size == (1536, 1152)
    with pytest.raises(ValueError, match="a mask has the size"):
        as_training_picture(red, Image.new("L", (3, 3)))


# --- over HTTP -------------------------------------------------------------------------------------------------------


@pytest.fixture
def service(jobs):
    return SubjectsService(jobs.library, jobs)


def test_a_subject_comes_and_goes_over_http(service):
    data = base64.b64encode((EMBEDDINGS / "comet.safetensors").read_bytes()).decode()
    assert service.add_subject(data, "balloon") == ["balloon"]
    service.remove_subject("balloon")
    assert not service.library.sources()


def test_a_training_begins_and_ends_over_http(service, stand_in):
    stand_in("import time; time.sleep(60)")
    picture = {"image": data_url(Image.new("RGB", (64, 64), "red")), "mask": data_url(Image.new("L", (64, 64), 255))}
    key = service.train("rex", "dog", [picture])["key"]
    assert {"000.png", "000_mask.png"} == {path.name for path in (service.jobs.folder / key / "pictures").iterdir()}
    wait(lambda: service.trainings()[0]["state"] == "running")
    (said,) = service.trainings()
    assert (said["name"], said["class_phrase"], said["steps"], said["step"]) == ("rex", "dog", 300, 0)
    service.change_training(key, "stop")
    wait(lambda: service.trainings()[0]["state"] == "stopped")
    service.change_training(key, "remove")
    assert service.trainings() == []


RED = {"image": data_url(Image.new("RGB", (64, 64), "red"))}


@pytest.mark.parametrize(
    ("call", "given", "words"),
    [
        ("add_subject", ["%"], "file: expected base64"),
        ("add_subject", [None], "file: expected base64"),
        ("add_subject", [""], "not a safetensors file"),
        ("add_subject", ["AAAA", ["x"]], "name: expected text"),
        ("remove_subject", [{}], "was not added on this page"),
        ("train", ["rex", "dog", []], "pictures: expected a list of 1 to"),
        ("train", ["rex", "dog", ["/etc/passwd"]], "picture 1: expected"),
        ("train", ["rex", "dog", [{"image": "/etc/passwd"}]], "picture 1 is no picture"),
        ("train", ["rex", "dog", [{**RED, "mask": "x"}]], "the mask of picture 1 is no picture"),
        ("train", ["rex", "dog", [{**RED, "path": "x"}]], "picture 1: expected"),
        ("train", ["rex", "dog", [RED], "3"], "steps: '3'"),
        ("train", ["rex", "dog", [RED], False], "steps: False"),
        ("train", ["rex", None, [RED]], "class_phrase: expected text"),
        ("change_training", ["rex", "start"], "action: 'start'; expected one of stop, resume, remove"),
        ("change_training", ["../..", "remove"], "there is no training"),
        ("change_training", [["x"], "remove"], "there is no training"),
    ],
)
def test_what_makes_no_sense_over_http_is_refused_in_words(call, given, words, service):
    with pytest.raises(gr.Error) as error:
        getattr(service, call)(*given)
    assert words in str(error.value)
    assert not service.library.sources() and not service.jobs.jobs()


def test_a_training_leaves_a_processor_to_the_page(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(8), raising=False)
    assert training_threads() == 7
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(1), raising=False)
    assert training_threads() == 1
