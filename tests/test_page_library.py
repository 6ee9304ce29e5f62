"""The subjects of the page: where they come from, what is refused, what stays."""

import shutil
import threading
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

import multisubject
from multisubject.base_models import load_text_encoders
from multisubject.generation.base_model import BaseModel
from multisubject.hub_utils import load_subject, save_subject
from multisubject.page import subjects as subjects_module
from multisubject.page.subjects import SubjectLibrary
from multisubject.tiny_world import EMBEDDED_BASE, EMBEDDED_BASE_XL

EMBEDDINGS = Path(multisubject.__file__).parent / "embeddings"


@pytest.mark.parametrize(("folder", "path"), [("", EMBEDDED_BASE), ("xl", EMBEDDED_BASE_XL)])
def test_shipped_subjects_have_small_thumbnails(folder, path, tmp_path):
    library = SubjectLibrary(BaseModel.read(str(path)), load_text_encoders(path), tmp_path)
    assert len(library.read(str(EMBEDDINGS / folder))) == 8
    for said in library.listing():
        assert said["thumbnail"].startswith("data:image/png;base64,"), said["name"]
        assert (EMBEDDINGS / folder / "thumbnails" / f"{said['name']}.png").stat().st_size < 8000


def test_an_added_file_is_copied_and_there_again_after_a_restart(library, tmp_path):
    sent = tmp_path / "sent.safetensors"
    shutil.copy(EMBEDDINGS / "comet.safetensors", sent)
    assert library.add_file(sent, name="balloon") == ["balloon"]
    sent.unlink()
    again = SubjectLibrary(library.base, library._text_encoders, library.folder)
    assert again.sources() == library.sources() == {"balloon": str(library.folder / "balloon.safetensors")}
    assert load_subject(again.sources()["balloon"])["balloon"].class_phrase == "ball"
    again.read(str(EMBEDDINGS / "comet.safetensors"))
    assert [said["name"] for said in again.listing()] == ["comet", "balloon"]
    again.remove("Balloon")
    assert [*again.sources()] == ["comet"] and not [*library.folder.glob("*.safetensors")]


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


def test_a_subject_of_another_base_keeps_its_file(library):
    other = load_subject(EMBEDDINGS / "xl" / "comet.safetensors")["comet"]
    library.folder.mkdir()
    theirs = save_subject(other, library.folder / "comet.safetensors")
    before = theirs.read_bytes()
    library = SubjectLibrary(library.base, library._text_encoders, library.folder)
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
