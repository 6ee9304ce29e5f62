"""The page's subjects: the library, trainings as jobs of the server, the tab in a real browser on tiny settings."""

import base64
import json
import os
import shutil
import socket
import sys
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import gradio as gr
import pytest
from PIL import Image

import multisubject
from multisubject.base_models import load_text_encoders
from multisubject.generation.base_model import BaseModel
from multisubject.hub_utils import load_subject, save_subject
from multisubject.page import subjects as subjects_module
from multisubject.page.subjects import SubjectLibrary
from multisubject.page.subjects_service import SubjectsService
from multisubject.page.training import TrainingJobs, TrainingPicture, as_training_picture, training_threads
from multisubject.pictures import data_url
from multisubject.tiny_world import EMBEDDED_BASE, EMBEDDED_BASE_XL
from multisubject.tiny_world.scenes import World
from multisubject.tiny_world.subjects import get_subject, subject_pictures
from multisubject.train_residual import main as train_main
from multisubject.training.pictures import load_pictures
from multisubject.training.progress import ProgressFile, thinned

ROOT = Path(multisubject.__file__).parent
EMBEDDINGS = ROOT / "embeddings"
FAST = ["--train_batch_size=1", "--validation_inference_steps=1", "--validation_prompts", "a photo of a {}"]


@pytest.fixture(scope="module")
def base(base_path):
    return BaseModel.read(base_path)


@pytest.fixture(scope="module")
def encoders(base_path):
    return load_text_encoders(base_path)


@pytest.fixture
def library(base, encoders, tmp_path):
    return SubjectLibrary(base, encoders, tmp_path / "subjects")


@pytest.fixture
def jobs(base, library, tmp_path):
    made = TrainingJobs(base, library, tmp_path / "trainings", on_cpu=True, options=FAST)
    yield made
    made.close()


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


# ---------------------------------------------------------------------------------------------------------------------
# The library
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("folder", "path"), [("", EMBEDDED_BASE), ("xl", EMBEDDED_BASE_XL)])
def test_shipped_subjects_have_small_thumbnails(folder, path, tmp_path):
    library = SubjectLibrary(BaseModel.read(str(path)), load_text_encoders(path), tmp_path)
    assert len(library.read(str(EMBEDDINGS / folder))) == 8
    for said in library.listing():
        assert said["thumbnail"].startswith("data:image/png;base64,"), said["name"]
        assert (EMBEDDINGS / folder / "thumbnails" / f"{said['name']}.png").stat().st_size < 8000


def test_an_added_file_is_copied_and_there_again_after_a_restart(library, encoders, tmp_path):
    sent = tmp_path / "sent.safetensors"
    shutil.copy(EMBEDDINGS / "comet.safetensors", sent)
    assert library.add_file(sent, name="balloon") == ["balloon"]
    sent.unlink()
    again = SubjectLibrary(library.base, encoders, library.folder)
    assert again.sources() == library.sources() == {"balloon": str(library.folder / "balloon.safetensors")}
    assert load_subject(again.sources()["balloon"])["balloon"].class_phrase == "ball"
    again.remove("Balloon")
    assert not again.sources() and not [*library.folder.glob("*.safetensors")]


def test_what_cannot_be_added_is_refused_and_leaves_nothing(library, tmp_path):
    library.read(str(EMBEDDINGS))
    junk = tmp_path / "junk.safetensors"
    junk.write_bytes(b"junk" * 100)
    for path, options, words in (
        (EMBEDDINGS / "comet.safetensors", {}, "there is a subject ['comet'] already"),
        (EMBEDDINGS / "comet.safetensors", {"name": "COMET"}, "already"),
        (EMBEDDINGS / "comet.safetensors", {"name": "../x"}, "a subject's name is"),
        (EMBEDDINGS / "comet.safetensors", {"name": "x", "class_phrase": "<b>"}, "without '<' and '>'"),
        (EMBEDDINGS / "comet.pt", {"name": "x"}, "fill in both"),
        (
            EMBEDDINGS / "xl" / "comet.safetensors",
            {"name": "x"},
            "has deltas for ['text_encoder', 'text_encoder_2'], this base",
        ),
        (junk, {}, "junk.safetensors"),
    ):
        with pytest.raises(ValueError) as error:
            library.add_file(path, **options)
        assert words in str(error.value) and str(tmp_path) not in str(error.value)
    with pytest.raises(ValueError, match="was not added on this page"):
        library.remove("comet")
    assert len(library.sources()) == 8 and not library.folder.exists()


def test_a_path_of_the_server_is_no_hub_id(library, monkeypatch):
    monkeypatch.setattr(subjects_module, "pull_subject", lambda *_, **__: pytest.fail("nothing is fetched"))
    for source in ("../../etc/passwd", "/etc/passwd", str(EMBEDDINGS), "petrucci", "user/../x", ""):
        with pytest.raises(ValueError, match="no Hub id"):
            library.add_from_hub(source)


def test_a_slow_download_holds_nobody_up(library, monkeypatch):
    asked, answer = threading.Event(), threading.Event()

    def pull(source, *, name):
        asked.set()
        assert answer.wait(60)
        return [EMBEDDINGS / "comet.safetensors"]

    monkeypatch.setattr(subjects_module, "pull_subject", pull)
    thread = threading.Thread(target=library.add_from_hub, args=("user/comet",))
    thread.start()
    assert asked.wait(60)
    assert library.listing() == [] and library.add_file(EMBEDDINGS / "pepper.safetensors") == ["pepper"]
    answer.set()
    thread.join()
    assert [*library.sources()] == ["pepper", "comet"]


def test_a_subject_of_another_base_keeps_its_file(library, encoders):
    other = load_subject(EMBEDDINGS / "xl" / "comet.safetensors")["comet"]
    library.folder.mkdir()
    theirs = save_subject(other, library.folder / "comet.safetensors")
    before = theirs.read_bytes()
    library = SubjectLibrary(library.base, encoders, library.folder)
    assert library.add_file(EMBEDDINGS / "comet.safetensors") == ["comet"]
    assert theirs.read_bytes() == before and library.sources()["comet"].endswith("comet-2.safetensors")


def test_a_subject_that_would_fail_in_a_picture_is_refused_at_once(library, tmp_path):
    given = load_subject(EMBEDDINGS / "comet.safetensors")["comet"]
    for change, words in (
        ({"class_phrase": "red ball"}, "2 tokens"),
        ({"metadata": {"text_encoder_fingerprint": f"signs256:{'0' * 64}"}}, "trained against another text_encoder"),
    ):
        file = save_subject(replace(given, **change), tmp_path / "rex.safetensors")
        with pytest.raises(ValueError, match=words):
            library.add_file(file)
        with pytest.raises(ValueError, match=words):
            library.read(str(file))
    with pytest.raises(ValueError, match="does not say what it is"):
        library.read(str(EMBEDDINGS / "comet.pt"))
    assert not library.sources() and not library.folder.exists()


def test_one_of_many_threads_gets_a_name(library):
    barrier, won = threading.Barrier(6), []

    def add():
        barrier.wait()
        with suppress(ValueError):
            won.extend(library.add_file(EMBEDDINGS / "slash.safetensors", name="rex"))

    threads = [threading.Thread(target=add) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert won == ["rex"] == [*library.sources()] and len([*library.folder.iterdir()]) == 1


def test_a_kept_thumbnail_is_small(library):
    photo = Image.effect_noise((640, 480), 90).convert("RGB")
    library.add_trained(EMBEDDINGS / "slash.safetensors", photo)
    (said,) = library.listing()
    assert said["thumbnail"].startswith("data:image/png;base64,") and len(said["thumbnail"]) < 2**14


# ---------------------------------------------------------------------------------------------------------------------
# The trainer's progress file
# ---------------------------------------------------------------------------------------------------------------------


def test_the_curve_is_thinned_to_means():
    assert thinned([]) == []
    assert thinned([3.0, 1.0, 2.0]) == [[1, 3.0], [2, 1.0], [3, 2.0]]
    assert thinned([3.0, 1.0, 2.0], points=2) == [[2, 2.0], [3, 2.0]]
    assert len(thinned([1.0] * 4001)) <= 200 and thinned([1.0] * 4001)[-1] == [4001, 1.0]


def test_the_progress_file_says_how_a_run_ended(tmp_path, monkeypatch):
    path = tmp_path / "progress.json"
    progress_file = ProgressFile(str(path))
    with pytest.raises(OSError, match="full"), progress_file.outcome():
        assert json.loads(path.read_text())["phase"] == "loading"
        progress_file.tell("training", subject="rex", step=2, of=9, losses=[3.0, 1.0])
        raise OSError("full")
    told = json.loads(path.read_text())
    assert abs(told.pop("time") - time.time()) < 60
    curve = [[1, 3.0], [2, 1.0]]
    assert told == {
        "phase": "failed", "subject": "rex", "step": 2, "of": 9, "loss": 2.0, "curve": curve, "message": "full",
    }  # fmt: skip
    assert [*tmp_path.iterdir()] == [path]


def test_a_progress_file_that_cannot_be_written_any_more_is_told_of_once(tmp_path, caplog):
    folder = tmp_path / "gone"
    folder.mkdir()
    progress_file = ProgressFile(str(folder / "progress.json"))
    with progress_file.outcome():
        shutil.rmtree(folder)
        folder.touch()
        for step in (1, 2):
            progress_file.tell("training", subject="rex", step=step, of=step, losses=[1.0] * step)
    assert len(caplog.messages) == 1 and "the run goes on without" in caplog.messages[0]


def test_of_several_processes_the_first_one_writes_the_progress_file(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with ProgressFile(str(tmp_path / "progress.json")).outcome():
        pass
    assert not [*tmp_path.iterdir()]


def test_the_trainer_refuses_a_progress_file_in_no_folder(tmp_path, caplog):
    with pytest.raises(SystemExit):
        train_main(["--progress_file", str(tmp_path / "nowhere" / "p.json")])


def test_a_refused_run_says_why_in_its_progress_file(tmp_path):
    path = tmp_path / "progress.json"
    assert train_main(["--progress_file", str(path), "--output_dir", str(tmp_path / "run")]) == 1
    told = json.loads(path.read_text())
    assert told["phase"] == "failed" and "--instance_data_dir: missing" in told["message"]


# ---------------------------------------------------------------------------------------------------------------------
# Jobs
# ---------------------------------------------------------------------------------------------------------------------


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

    again = TrainingJobs(base, jobs.library, jobs.folder, on_cpu=True, options=FAST)
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


@pytest.mark.slow
def test_a_training_that_fails_says_why(jobs, pictures, base):
    failing = TrainingJobs(base, jobs.library, jobs.folder, on_cpu=True, options=[*FAST, "--resolution=7"])
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


# ---------------------------------------------------------------------------------------------------------------------
# Over HTTP
# ---------------------------------------------------------------------------------------------------------------------


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


# ---------------------------------------------------------------------------------------------------------------------
# The tab
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_subject_is_taught_from_pictures_on_the_page(jobs, tmp_path):
    browser_module = pytest.importorskip("multisubject.tests.browser")
    if browser_module.CHROMIUM is None:
        pytest.skip("there is no Chromium: apt-get install chromium")
    from multisubject.page.canvas import canvas
    from multisubject.page.subjects_tab import CSS, subjects_tab

    jobs.library.read(str(EMBEDDINGS))
    files = []
    for index, picture in enumerate(subject_pictures(get_subject("comet"), World(), count=3)):
        files.append(str(tmp_path / f"{index}.png"))
        picture.resize((320, 256)).save(files[-1])
    (tmp_path / "bad.png").write_bytes(b"no picture")
    with gr.Blocks() as blocks:
        document = {"size": [128, 128], "prompt": "", "negative_prompt": "", "regions": [], "underlay": None}
        offers = {"sizes": [], "subjects": jobs.library.listing(), "loras": [], "adapters": 0}
        subjects_tab(jobs.library, jobs, canvas(document, offers))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    _, url, _ = blocks.launch(
        server_name="127.0.0.1", server_port=port, share=False, ssr_mode=False, quiet=True, prevent_thread_lock=True,
        css=CSS,
    )  # fmt: skip
    try:
        with browser_module.started() as browser:
            context = browser.new_context(viewport={"width": 1280, "height": 1000})
            context.set_default_timeout(60_000)
            page = context.new_page()
            page.goto(url)
            page.wait_for_selector("#subjects img")
            assert page.locator("#subjects img").count() == 8

            page.locator("#new_pictures input[type=file]").set_input_files([*files, str(tmp_path / "bad.png")])
            page.wait_for_selector("#strip img")
            assert "Left out: bad.png cannot be read" in page.locator("#train_said").inner_text()
            page.locator("#strip button:has(img)").first.click()
            page.wait_for_selector("#editor canvas")
            page.wait_for_timeout(1500)  # its drawing surface grows to its size
            page.locator("#editor").scroll_into_view_if_needed()
            box = page.locator("#editor canvas").first.bounding_box()
            x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
            page.mouse.move(x - 60, y)
            page.mouse.down()
            page.mouse.move(x + 60, y, steps=8)
            page.mouse.up()
            page.locator("#keep").click()
            page.wait_for_selector("#strip :text('1 · masked')")

            page.locator("#train").click()
            page.wait_for_selector("#train_said [role=alert]")  # without a name
            page.locator("#new_name").locator("input, textarea").fill("balloon")
            page.locator("#new_phrase").locator("input, textarea").fill("ball")
            page.locator("#new_steps input").fill("4")
            page.locator("#train").click()
            page.wait_for_selector("#training_progress :text('<balloon> · ball')")
            page.reload()
            page.wait_for_selector("#training_progress :text('is among the subjects')", timeout=120_000)
            page.wait_for_selector("#training_progress svg polyline")
            page.wait_for_selector("#validation img")
            page.wait_for_selector("#subjects :text('balloon · ball')")
            page.wait_for_selector(".chip[data-subject=balloon]")
            context.close()
    finally:
        blocks.close()
    with Image.open(jobs.folder / "balloon" / "pictures" / "000_mask.png") as mask:
        assert mask.size == (320, 256) and 0.01 < sum(mask.convert("L").tobytes()) / 255 / (320 * 256) < 0.5
