"""Every input gives a subject or a clear error, in bounded memory and time: 22,000 damaged and hostile files."""

from __future__ import annotations

import io
import json
import random
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from multisubject.residual_embeddings import ResidualEmbedding
from multisubject.subject_file import SubjectFileError, read_safetensors, write_safetensors
from multisubject.subject_pickle import read_pickle

MAX_SECONDS_PER_FILE = 2.0  # a sound file takes 0.2 ms; the machine may be busy
MAX_GROWTH_KB = 100 * 1024


def sound_file() -> bytes:
    metadata = {"base_model": "user/base", "steps": 400, "library_versions": {"torch": "2"}, "scores": {"a": 0.5}}
    deltas = {"text_encoder": torch.linspace(-1, 1, 32).reshape(2, 16)}
    both = {**deltas, "text_encoder_2": torch.linspace(-1, 1, 24).reshape(2, 12)}  # of Stable Diffusion XL
    return write_safetensors(
        {
            "petrucci": ResidualEmbedding("red dog", deltas, metadata),
            "majesty": ResidualEmbedding("red dog", both, metadata),
        }
    )


def sound_pickle() -> bytes:
    buffer = io.BytesIO()
    torch.save({"petrucci": torch.linspace(-1, 1, 16), "majesty": torch.ones(2, 8)}, buffer)
    return buffer.getvalue()


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Truncated, extended, with bits flipped, bytes replaced, or a piece cut out, repeated or moved."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        # Headers are small and decide everything: half of the damage is done there.
        position = rng.randrange(min(len(out), 96) if rng.random() < 0.5 else len(out)) if out else 0
        length = rng.choice((1, 2, 4, 8, 64))
        match rng.randrange(7):
            case 0:
                del out[position:]
            case 1:
                out += rng.randbytes(length)
            case 2 if out:
                out[position] ^= 1 << rng.randrange(8)
            case 3:
                out[position : position + length] = rng.randbytes(length)
            case 4:
                del out[position : position + length]
            case 5:
                out[position:position] = out[position : position + length] * rng.choice((1, 3, 1000))
            case 6:
                out[position : position + 1] = rng.choice((b"\x00", b"\xff", b'"', b"{", b"}", b"[", b"-", b"9", b"e"))
    return bytes(out)


HOSTILE_VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 1.5, 2, 3, 75, 76, 2**31, 2**63, 2**64, 10**400, "", "1", "F32", "F64", "../../x", "{{7*7}}",
    "\x00", "\ud800", "x" * 10_000, [], {}, [1], [1, 2], [0, 128], [2, 16], [2**40, 2**40], [[1], [2]], [None, None],
    {"text_encoder": 16}, {"text_encoder": -16}, {"text_encoder": [16]}, {"text_encoder_2": 12}, {"dtype": "F32"},
)  # fmt: skip


def rewritten(data: bytes, rng: random.Random) -> bytes:
    """The header parsed, some of its values replaced, keys dropped or renamed, and put back with its right length."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    inner = json.loads(header["__metadata__"]["multisubject"])
    for _ in range(rng.choice((1, 1, 2, 4))):
        node: dict = rng.choice((header, inner))
        while (children := [value for value in node.values() if isinstance(value, dict)]) and rng.random() < 0.75:
            node = rng.choice(children)
        if not node:
            continue
        key = rng.choice([*node])
        match rng.randrange(4):
            case 0:
                del node[key]
            case 1:
                node[rng.choice(("", "__metadata__", "a.b.text_encoder", "x" * 99, "../x", "steps"))] = node.pop(key)
            case _:
                node[key] = rng.choice(HOSTILE_VALUES)
    if isinstance(header.get("__metadata__"), dict) and "multisubject" in header["__metadata__"]:
        header["__metadata__"]["multisubject"] = json.dumps(inner)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def rezipped(data: bytes, rng: random.Random) -> bytes:
    """A `.pt` with one member damaged inside an intact archive, so that the unpickler gets to see it."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(buffer, "w") as target:
        victim = rng.choice(["data.pkl", "data.pkl", "data.pkl", "0", "version", "byteorder"])
        for name in source.namelist():
            content = source.read(name)
            target.writestr(name, damaged(content, rng) if name.rpartition("/")[2] == victim else content)
    return buffer.getvalue()


def peak_kb(reset: bool = False) -> int:
    """Peak resident memory since the last reset; 0 where the platform cannot tell."""
    if sys.platform != "linux":
        return 0
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0])


def fuzz(read: Callable[[bytes], object], inputs: Iterator[bytes]) -> dict[str, int]:
    """Read every input; count what came of it."""
    counts = {"subject": 0, "error": 0}
    before = peak_kb(reset=True)
    for data in inputs:
        start = time.process_time()
        try:
            subjects = read(data)
        except SubjectFileError as error:
            assert 0 < len(str(error)) < 2_000, data
            assert str(error).isprintable(), data
            counts["error"] += 1
        else:
            assert isinstance(subjects, dict)
            for subject in subjects.values():
                assert subject.class_phrase.isprintable()
                assert subject.delta.ndim == 2
                assert torch.isfinite(subject.delta).all()
            counts["subject"] += 1
        assert time.process_time() - start < MAX_SECONDS_PER_FILE, data
    assert peak_kb() - before < MAX_GROWTH_KB
    return counts


def test_damaged_subject_files():
    data, rng = sound_file(), random.Random(0)
    counts = fuzz(read_safetensors, (damaged(data, rng) for _ in range(10_000)))
    assert counts["error"] > 5_000
    assert counts["subject"] > 100  # damage to the numbers alone is still a subject


def test_every_truncation():
    data = sound_file()
    counts = fuzz(read_safetensors, (data[:length] for length in range(len(data))))
    assert counts == {"subject": 0, "error": len(data)}


def test_hostile_headers():
    data, rng = sound_file(), random.Random(1)
    counts = fuzz(read_safetensors, (rewritten(data, rng) for _ in range(8_000)))
    assert counts["error"] > 4_000
    assert counts["subject"] > 100  # some keys are the author's own


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_damaged_pickles():
    data, rng = sound_pickle(), random.Random(2)
    inputs = (damaged(data, rng) if index % 2 else rezipped(data, rng) for index in range(3_000))
    counts = fuzz(lambda data: read_pickle(data, "dog"), inputs)
    assert counts["error"] > 1_000
    assert counts["subject"] > 100


def many_names_for_one_storage(count: int, folder: str = "data") -> bytes:
    """Names that differ only in case: the archive finds the same storage under each, torch unpacks it under each."""
    letters = "abcdefgh"
    buffer = io.BytesIO()
    torch.save({f"{index:03}": torch.zeros(2**18) + index for index in range(count)}, buffer)
    buffer, source = io.BytesIO(), zipfile.ZipFile(buffer)
    program = source.read("archive/data.pkl")
    for index in range(count):
        name = "".join(c.upper() if index >> bit & 1 else c for bit, c in enumerate(letters))
        key, new = str(index).encode(), name.encode()
        old = b"X" + len(key).to_bytes(4, "little") + key
        for memo in (b"q", b"r"):
            program = program.replace(old + memo, b"X" + len(new).to_bytes(4, "little") + new + memo)
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as target:
        target.writestr("archive/data.pkl", program)
        target.writestr("archive/version", "3")
        target.writestr(f"archive/{folder}/{letters}", bytes(2**20))
    return buffer.getvalue()


def test_small_pickles_that_unpack_into_much():
    buffer = io.BytesIO()
    torch.save({str(index): torch.ones(1).expand(75, 16384) for index in range(16)}, buffer)
    files = [many_names_for_one_storage(100), many_names_for_one_storage(100, folder="DATA"), buffer.getvalue()]
    for data in files:
        assert len(data) < 100_000
        with pytest.raises(SubjectFileError, match="it would unpack into more than"):
            read_pickle(data, "dog")
    assert fuzz(lambda data: read_pickle(data, "dog"), iter(files)) == {"subject": 0, "error": 3}
    assert len(torch.load(io.BytesIO(many_names_for_one_storage(10)))) == 10, "the attack is none"


def test_subjects_that_share_a_storage():
    buffer, matrix = io.BytesIO(), torch.randn(256, 1024)
    torch.save({f"s{index}": matrix[index] for index in range(100)}, buffer)
    assert len(read_pickle(buffer.getvalue(), "dog")) == 100
