"""The page's library of subjects: what it takes, what it refuses, where it keeps them."""

import shutil
import threading
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from PIL import Image

import multisubject
from multisubject.base_models import load_text_encoders
from multisubject.generation.base_model import BaseModel
from multisubject.hub_utils import load_subject, save_subject
from multisubject.page import subjects
from multisubject.page.subjects import THUMBNAIL_SIDE, SubjectLibrary, thumbnail_of
from multisubject.residual_embeddings import ResidualEmbedding

EMBEDDINGS = Path(multisubject.__file__).parent / "embeddings"


@pytest.fixture(scope="module")
def base(base_path):
    return BaseModel.read(base_path), load_text_encoders(base_path)


@pytest.fixture
def library(base, tmp_path):
    return SubjectLibrary(tmp_path / "subjects", *base)


def names(library):
    return [said["name"] for said in library.listing()]


def test_a_folder_is_listed_where_it_lies(library):
    assert library.add_source(EMBEDDINGS) == sorted(path.stem for path in EMBEDDINGS.glob("*.safetensors"))
    assert library.sources()["petrucci"] == str((EMBEDDINGS / "petrucci.safetensors").resolve())
    assert {said["name"]: said["class_phrase"] for said in library.listing()}["majesty"] == "guitar"
    assert all(said["thumbnail"].startswith("data:image/png;base64,") for said in library.listing())
    assert sum(len(said["thumbnail"]) for said in library.listing()) < 2**16
    assert not library.folder.exists() and not library.is_own("petrucci")


def test_a_file_is_written_anew_under_its_subjects_name(library, tmp_path):
    sent = shutil.copy(EMBEDDINGS / "petrucci.safetensors", tmp_path / "..;rm -rf.safetensors")
    assert library.add_file(Path(sent)) == ["petrucci"]
    Path(sent).unlink()
    assert library.sources() == {"petrucci": str(library.folder / "petrucci.safetensors")}
    kept, given = (load_subject(folder / "petrucci.safetensors")["petrucci"] for folder in (library.folder, EMBEDDINGS))
    assert torch.equal(kept.delta, given.delta) and kept.metadata == given.metadata


def test_a_pickle_needs_its_words(library, tmp_path):
    sent = Path(shutil.copy(EMBEDDINGS / "petrucci.pt", tmp_path / "upload.pt"))
    with pytest.raises(ValueError, match="does not say which words it stands for"):
        library.add_file(sent, "rex")
    assert library.add_file(sent, "rex", "person") == ["rex"]
    assert library.listing()[0]["class_phrase"] == "person"


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("x.safetensors", b"", "not a safetensors file"),
        ("x.safetensors", b"\x08\0\0\0\0\0\0\0{}      ", "not a subject"),
        ("x.pt", b"cos\nsystem\n(S'touch owned'\ntR.", "x.pt"),
        ("x.png", b"", "expected .safetensors, or .pt"),
    ],
)
def test_what_is_no_subject_is_refused(name, data, message, library, tmp_path):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message):
        library.add_file(tmp_path / name, "rex", "person")
    assert not library.listing() and not library.folder.exists() and not Path("owned").exists()


def test_subjects_of_another_base_are_refused(library, tmp_path):
    subject = ResidualEmbedding("person", {"text_encoder": torch.zeros(1, 1024)})
    file = save_subject(subject, tmp_path / "rex.safetensors")
    with pytest.raises(ValueError, match="1024 numbers per token"):
        library.add_file(file)
    given = load_subject(EMBEDDINGS / "petrucci.safetensors")["petrucci"]
    file = save_subject(ResidualEmbedding("red ball", given.deltas), tmp_path / "rex.safetensors")
    with pytest.raises(ValueError, match="2 tokens"):
        library.add_file(file)
    assert not library.folder.exists()


@pytest.mark.parametrize("name", ["../rex", "<b>rex</b>", "", "a" * 65, "rex\n"])
def test_bad_names_are_refused(name, library):
    with pytest.raises(ValueError, match="a subject's name is 1 to 64 letters"):
        library.check_new_name(name)


def test_names_are_taken_once_in_any_case(library):
    library.add_source(EMBEDDINGS / "petrucci.safetensors")
    with pytest.raises(ValueError, match="There is a subject <petrucci> already"):
        library.add_file(EMBEDDINGS / "slash.safetensors", "Petrucci")
    assert names(library) == ["petrucci"]


def test_one_of_many_threads_gets_a_name(library):
    barrier, won = threading.Barrier(8), []

    def add():
        barrier.wait()
        with suppress(ValueError):
            won.extend(library.add_file(EMBEDDINGS / "slash.safetensors", "rex"))

    threads = [threading.Thread(target=add) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert won == ["rex"] == names(library) and len([*library.folder.iterdir()]) == 1


def test_what_was_added_is_there_again(library, base, tmp_path):
    library.add_file(EMBEDDINGS / "petrucci.safetensors", "rex")
    library.add_trained(EMBEDDINGS / "slash.safetensors", "max", Image.new("RGB", (64, 48), "red"))
    save_subject(ResidualEmbedding("person", {"text_encoder": torch.zeros(1, 8)}), library.folder / "other.safetensors")
    again = SubjectLibrary(library.folder, *base)
    assert again.listing() == sorted(library.listing(), key=lambda said: said["name"])
    assert library.listing()[1]["thumbnail"].startswith("data:image/png;base64,")


def test_a_subject_of_another_base_is_not_written_over(library):
    foreign = ResidualEmbedding("person", {"text_encoder": torch.zeros(1, 8)})
    kept = save_subject(foreign, library.folder / "rex.safetensors").read_bytes()
    library.add_file(EMBEDDINGS / "petrucci.safetensors", "rex")
    assert (library.folder / "rex.safetensors").read_bytes() == kept
    assert load_subject(library.sources()["rex"])["rex"].class_phrase == "person"


def test_only_what_was_added_can_be_removed(library):
    library.add_source(EMBEDDINGS / "petrucci.safetensors")
    library.add_trained(EMBEDDINGS / "slash.safetensors", "rex", Image.new("RGB", (8, 8)))
    with pytest.raises(ValueError, match="was not added here"):
        library.remove("petrucci")
    library.remove("rex")
    assert names(library) == ["petrucci"] and not [file for file in library.folder.rglob("*") if file.is_file()]
    assert (EMBEDDINGS / "petrucci.safetensors").exists()


def test_from_the_hub(library, monkeypatch):
    asked = []

    def pull(source, name=None):
        asked.append((source, name))
        return [EMBEDDINGS / "petrucci.safetensors", EMBEDDINGS / "slash.safetensors"]

    monkeypatch.setattr(subjects, "pull_subject", pull)
    assert library.add_from_hub(" user/band ", "slash") == ["slash"] and asked == [("user/band", "slash")]
    with pytest.raises(ValueError, match="holds petrucci, slash; expected one of these"):
        library.add_from_hub("user/band", "rex")


@pytest.mark.parametrize("source", ["/etc/passwd", "../../etc/passwd", "C:\\x", "", str(EMBEDDINGS), "user/../x"])
def test_the_hub_is_asked_for_no_path_of_this_machine(source, library):
    with pytest.raises((ValueError, FileNotFoundError)):
        library.add_from_hub(source)


def test_listing_waits_for_no_download(library, monkeypatch):
    started, go_on = threading.Event(), threading.Event()

    def pull(source, name=None):
        started.set()
        assert go_on.wait(30)
        return [EMBEDDINGS / "petrucci.safetensors"]

    monkeypatch.setattr(subjects, "pull_subject", pull)
    thread = threading.Thread(target=library.add_from_hub, args=("user/petrucci",))
    thread.start()
    assert started.wait(30)
    assert library.add_file(EMBEDDINGS / "slash.safetensors") == ["slash"] == names(library)
    go_on.set()
    thread.join()
    assert names(library) == ["slash", "petrucci"]


@pytest.mark.parametrize("folder", [EMBEDDINGS, EMBEDDINGS / "xl"])
def test_every_subject_that_comes_along_has_a_thumbnail(folder):
    assert {file.stem for file in folder.glob("*.safetensors")} == {file.stem for file in folder.glob("thumbnails/*")}


def test_thumbnails_are_small_squares():
    assert thumbnail_of(Image.new("RGBA", (400, 200))).size == (THUMBNAIL_SIDE, THUMBNAIL_SIDE)
    assert thumbnail_of(Image.new("L", (40, 20))).size == (20, 20)
