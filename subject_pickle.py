"""Cones 2's pickles: a `.pt` file holds a tensor `(dim,)` or `(num_tokens, dim)`, or a dict of them, and nothing else.

They are read with `weights_only=True`, after a check that they ask for nothing but tensors. torch is imported by the
functions that make tensors, so that looking at a file is instant.
"""

from __future__ import annotations

import io
import pickletools
import zipfile
from typing import TYPE_CHECKING

from .subject_file import (
    MAX_FILE_BYTES,
    MAX_HEADER_BYTES,
    MAX_SUBJECTS_PER_FILE,
    SubjectFileError,
    check_size,
    check_subject_name,
    check_values,
    printable,
)

if TYPE_CHECKING:
    from .residual_embeddings import ResidualEmbedding

__multisubject_version__ = "0.1.0"

# All that a pickled tensor, or a dict of them, asks for when it is loaded.
_PICKLE_GLOBALS = {
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    "torch HalfStorage",
    "torch BFloat16Storage",
    "torch FloatStorage",
    "torch DoubleStorage",
    "collections OrderedDict",
}


def check_pickle(data: bytes) -> dict[str, int]:
    """Refuse a `.pt` file that holds more than tensors, or that would unpack into more than it is.

    Returns:
        The storages that it holds, by name, in bytes.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = {member.filename: member for member in archive.infolist()}
            total = sum(member.file_size for member in members.values())
            pickles = [name for name in members if name.endswith("/data.pkl")]
            if len(pickles) != 1 or total > MAX_FILE_BYTES or members[pickles[0]].file_size > MAX_HEADER_BYTES:
                raise SubjectFileError("not a PyTorch file that holds a residual.")
            program = archive.read(pickles[0])
    except SubjectFileError:
        raise
    except Exception as error:  # zipfile fails in many ways on hostile archives
        raise SubjectFileError(
            f"not a PyTorch .pt file of version 1.6 or later, or one that was cut off ({printable(error, 80)})."
        ) from None
    try:
        opcodes = [(opcode.name, argument) for opcode, argument, _ in pickletools.genops(program)]
    except Exception as error:  # pickletools too
        raise SubjectFileError(f"its pickle is damaged ({printable(error, 80)}).") from None
    wanted = {str(argument) for name, argument in opcodes if name in ("GLOBAL", "INST")}
    if any(name == "STACK_GLOBAL" for name, _ in opcodes):
        wanted.add("names that it computes")
    foreign = sorted(wanted - _PICKLE_GLOBALS)
    if foreign:
        raise SubjectFileError(
            f"refused: this pickle wants to use {printable(', '.join(foreign))}, which a residual does not need and "
            "which could run a stranger's code. Ask its author for a .safetensors file."
        )
    prefix = pickles[0].removesuffix("data.pkl") + "data/"
    storages = {name: part.file_size for name, part in members.items() if name.casefold().startswith(prefix.casefold())}
    # The archive finds a storage under its name in any case, torch remembers it under each name: once for each of them.
    sizes = {name.casefold(): size for name, size in storages.items()}
    mentions = {(type(argument), argument) for _, argument in opcodes if isinstance(argument, (str, int))}
    _check_unpacked(sum(sizes.get(f"{prefix}{argument}".casefold(), 0) for _, argument in mentions))
    return storages


def read_pickle(data: bytes, name: str) -> dict[str, ResidualEmbedding]:
    """The subject in the bytes of a Cones 2 `.pt`: a tensor `(dim,)` or `(num_tokens, dim)`, or a dict of them.

    It says nothing about the class phrase, which is therefore empty.
    """
    import torch

    from .residual_embeddings import ResidualEmbedding

    check_pickle(data)
    try:
        value = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler runs a hostile program: whatever it raises, the file is at fault
        raise SubjectFileError(f"its pickle is damaged ({type(error).__name__}).") from None

    tensors = value if isinstance(value, dict) else {name: value}
    if not 1 <= len(tensors) <= MAX_SUBJECTS_PER_FILE:
        raise SubjectFileError(f"it holds {len(tensors)} tensors, expected 1 to {MAX_SUBJECTS_PER_FILE}.")
    subjects = {}
    num_bytes = 0
    for key, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            raise SubjectFileError(f"it holds a {type(tensor).__name__}, expected a tensor or a dict of tensors.")
        is_plain = tensor.layout == torch.strided and not tensor.is_meta and tensor.is_floating_point()
        if tensor.ndim not in (1, 2) or not is_plain:
            raise SubjectFileError(
                f"it holds a {tensor.dtype} tensor of shape {printable(tuple(tensor.shape))}, expected floating point "
                "numbers of shape (dim,) or (num_tokens, dim)."
            )
        num_tokens, dim = (1, *tensor.shape)[-2:]
        check_size(num_tokens, dim, key)
        try:
            check_subject_name(key)
        except ValueError as error:
            raise SubjectFileError(str(error)) from None
        num_bytes += 4 * num_tokens * dim  # more than the file's own where tensors share or repeat their numbers
        _check_unpacked(num_bytes)
        delta = tensor.detach().to(torch.float32).reshape(num_tokens, dim).clone()
        check_values(delta, key)
        subjects[key] = ResidualEmbedding("", {"text_encoder": delta})
    return subjects


def write_pickle(subject: ResidualEmbedding) -> bytes:
    """The bytes of a Cones 2 `residual.pt`: one bare tensor `(num_tokens, dim)`. Its metadata is lost."""
    import torch

    if set(subject.deltas) != {"text_encoder"}:
        raise ValueError(
            f"a .pt file holds the residual of `text_encoder` alone, this subject has {sorted(subject.deltas)}, as "
            "Stable Diffusion XL needs. Write a .safetensors file, which holds them all."
        )
    check_values(subject.delta, "subject")
    buffer = io.BytesIO()
    torch.save(subject.delta.detach().to("cpu", torch.float32).clone(), buffer)
    return buffer.getvalue()


def _check_unpacked(num_bytes: int) -> None:
    """Refuse a small file that becomes a large one in memory."""
    if num_bytes > MAX_FILE_BYTES:
        raise SubjectFileError(f"refused: it would unpack into more than {MAX_FILE_BYTES:,} bytes.")
