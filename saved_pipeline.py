"""A pipeline on disk and on the Hub: the code and the subjects that it carries beside its models.

`copy_pipeline_sources` writes the code as `custom_pipeline` wants it and `push_pipeline_to_hub` publishes it, the other
two keep the subjects of `save_pretrained` for `from_pretrained`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from .base_models import ARCHITECTURES, SD
from .hub_client import PushOptions, RepoState, check_options, commit_files
from .subject_file import naming, read_bytes, read_safetensors, write_atomically, write_safetensors

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

    from .residual_embeddings import ResidualEmbedding

__multisubject_version__ = "0.1.0"

PIPELINES = {one.module: one.pipeline for one in ARCHITECTURES}
"""The pipelines' modules and classes. What is common to them is in the other files of a saved or published pipeline:"""

PIPELINE_SIBLINGS = (
    "attention_processors",
    "base_models",
    "call_arguments",
    "guidance_methods",
    "guidance_schedule",
    "hub_client",
    "hub_utils",
    "layout",
    "layout_images",
    "model_card",
    "move_times",
    "multisubject_mixin",
    "pictures",
    "placed_prompts",
    "prompt_encoder",
    "recurrence",
    "region_attention",
    "region_conditioning",
    "region_contents",
    "region_ip_adapters",
    "region_loras",
    "region_moves",
    "region_texts",
    "residual_embeddings",
    "saved_pipeline",
    "shared_models",
    "subject_file",
    "subject_loader",
    "subject_pickle",
    "unknown_names",
)

# A saved pipeline keeps its subjects in the tokenizer's folder: diffusers downloads that folder whole, and a loaded
# tokenizer knows where it came from, be it a folder or the Hub, at whatever revision, online or off. The ending is not
# `.safetensors`, because diffusers takes every such file for a component's weights and then downloads the wrong ones.
_SAVED_SUBJECTS = "subjects.multisubject"


def copy_pipeline_sources(folder: str | os.PathLike[str], module: str = SD.module) -> None:
    """Write a pipeline's code into a folder, which can then be given as `custom_pipeline=folder`.

    Args:
        folder: where to.
        module: one of `PIPELINES`.
    """
    for name, text in pipeline_sources(module).items():
        write_atomically(Path(folder) / name, text.encode())


def pipeline_sources(module: str) -> dict[str, str]:
    """File name -> text of a pipeline's modules, and of the `pipeline.py` that diffusers looks for in a repository."""
    here = Path(__file__).parent
    sources = {f"{name}.py": (here / f"{name}.py").read_text(encoding="utf-8") for name in (module, *PIPELINE_SIBLINGS)}
    # Given a folder, diffusers copies what this file imports and nothing that those files import: hence every sibling.
    # Composed, because diffusers finds imports with a regular expression, and would find these in this file.
    imports = [f"from .{name} import __multisubject_version__  # noqa: F401" for name in PIPELINE_SIBLINGS]
    imports += [f"from .{module} import {PIPELINES[module]}  # noqa: F401"]
    # In one process, diffusers runs the `pipeline.py` of every folder in one module, and wants to find one class there.
    former = "\n".join(f'globals().pop("{pipeline}", None)' for pipeline in PIPELINES.values())
    sources["pipeline.py"] = "\n".join(
        ['"""What `custom_pipeline="user/repo"` loads."""', "", former, "", *imports, ""]
    )
    return sources


def push_pipeline_to_hub(
    repo_id: str, *, architecture: str = SD.name, **push_options: Unpack[PushOptions]
) -> CommitInfo:
    """Publish a pipeline's code, so that `custom_pipeline="user/repo"` works for everybody else.

    `custom_pipeline` loads one pipeline from a repository: each architecture's has one of its own. For work offline,
    as the published README explains: `custom_pipeline=snapshot_download("user/repo")`.

    Args:
        repo_id: `user/repo`.
        architecture: `sd`, the pipeline for Stable Diffusion 1.x and 2.x, or `sdxl`, that for XL.
        push_options: as `PushOptions` explains: `private`, `token`, `revision` (a branch), `create_pr`, `tag`,
            `commit_message`.

    Raises:
        ValueError: an architecture that there is not, or a repository that holds another one's pipeline already.
        TypeError: an option that there is not.
        huggingface_hub.errors.HfHubHTTPError: what the Hub answers.
    """
    from .model_card import pipeline_card

    check_options(push_options, PushOptions)
    known = {one.name: one for one in ARCHITECTURES}
    if architecture not in known:
        raise ValueError(f"architecture={architecture!r}, expected one of {[*known]}.")
    chosen = known.pop(architecture)
    files = {name: text.encode() for name, text in pipeline_sources(chosen.module).items()}

    def prepare(state: RepoState) -> dict[str, bytes]:
        for other in known.values():
            if f"{other.module}.py" in state.sizes:
                raise ValueError(
                    f"{repo_id!r} holds the pipeline for {other.family} already, and `custom_pipeline` loads one from "
                    f"a repository: whoever uses it would get that for {chosen.family}. Push to another repository, "
                    f"such as '{repo_id}-{chosen.name}'."
                )
        return files | {"README.md": pipeline_card(repo_id, state.read_text("README.md"), chosen).encode()}

    return commit_files(repo_id, prepare, f"Upload multisubject {__multisubject_version__}", push_options)


def save_subjects_with_pipeline(
    subjects: Mapping[str, ResidualEmbedding], save_directory: str | os.PathLike[str]
) -> None:
    """Write a pipeline's subjects into the folder that the pipeline is saved to."""
    path = Path(save_directory, "tokenizer", _SAVED_SUBJECTS)
    if subjects:
        write_atomically(path, write_safetensors(subjects))
    else:
        path.unlink(missing_ok=True)


def load_saved_subjects(tokenizer: Any) -> dict[str, ResidualEmbedding]:
    """The subjects that a pipeline was saved with, given the tokenizer that was loaded with it."""
    folder = getattr(tokenizer, "name_or_path", "")
    path = Path(folder, _SAVED_SUBJECTS)
    if not folder or not path.is_file():
        return {}
    data = read_bytes(path)
    with naming(path):
        return read_safetensors(data)
