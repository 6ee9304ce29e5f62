"""The command line of `evaluate.py`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers.hf_argparser import HfArg

from multisubject.generation.arguments import check_device

# DINO ViT-S/16 is what papers on personal subjects mostly report. Its main branch has pickled weights only; a pull
# request of the Hub itself has the same ones as safetensors.
DEFAULT_MODELS = {
    "clip_model": "openai/clip-vit-large-patch14",
    "dino_model": "facebook/dino-vits16@refs/pr/1",
    "detector": "google/owlv2-base-patch16-ensemble",
}


class EvaluationError(ValueError):
    """Input that cannot be evaluated. The message names the argument, the value, what was expected and the remedy."""


@dataclass
class EvaluateArguments:
    """The command line."""

    pictures: list[str] = HfArg(  # noqa: RUF009 (this is dataclasses.field)
        help="Folders, searched with their subfolders: an output folder of multisubject-generate, whose PNGs say what "
        "they were to show, or one with any pictures, together with --prompt and --class_phrases."
    )
    references: list[str] = HfArg(  # noqa: RUF009
        default_factory=list,
        help="NAME=FOLDER with real pictures of a subject, for each subject: petrucci=data/petrucci. NAME is the "
        "subject's in the prompt, or that of its file (embeddings/petrucci.pt). Without it: CLIP-T and layout only.",
    )
    prompt: str | None = HfArg(default=None, help="The prompt of pictures that do not carry theirs.")
    class_phrases: list[str] = HfArg(  # noqa: RUF009
        default_factory=list,
        help="NAME=PHRASE for each reference, petrucci=person, for pictures that do not carry theirs: what to detect.",
    )
    generation_config: str | None = HfArg(
        default=None,
        help="The config that the pictures were made from, if files of its layouts are to be found beside it and not "
        "in the working folder.",
    )
    clip_model: str | None = HfArg(
        default=None,
        help="For CLIP-T and CLIP-I: a folder or Hub id, or ID@REVISION. Name any of the three models, and no others "
        f"are used; name none, and all are, this one being {DEFAULT_MODELS['clip_model']}.",
    )
    dino_model: str | None = HfArg(
        default=None, help=f"For DINO: a vision transformer with a class token, such as {DEFAULT_MODELS['dino_model']}."
    )
    detector: str | None = HfArg(
        default=None,
        help=f"For the rest: an open-vocabulary detector such as {DEFAULT_MODELS['detector']} (OWL-ViT, OWLv2, "
        "Grounding DINO), or one of fixed classes (DETR, YOLOS, …) that include the class phrases.",
    )
    detector_query: str | None = HfArg(
        default=None,
        help="What an open-vocabulary detector is asked, {} being the class phrase. Default: 'a photo of a {}' for OWL "
        "models, which learned such sentences, and '{}' for others.",
    )
    detection_threshold: float | None = HfArg(
        default=None, help="Least score of a detection, 0 to 1. Default: what transformers has for the detector."
    )
    output: str | None = HfArg(
        default=None,
        help="JSON file for every picture's scores, the contact sheet beside it. Default: evaluation.json in the first "
        "folder of --pictures.",
    )
    device: str | None = HfArg(default=None, help="cpu, cuda, cuda:1, mps … Default: the best there is.")
    dtype: str = HfArg(
        default="float32",
        help="Precision of the models. Half precision is faster and less exact.",
        metadata={"choices": ["float32", "float16", "bfloat16"]},
    )
    batch_size: int = HfArg(default=16, help="Pictures per call of a model: lower it if memory runs out.")

    def __post_init__(self) -> None:
        """Refuse values that argparse lets through, and fill in what was left out. Raises `ValueError`."""
        if self.batch_size < 1:
            raise ValueError(f"--batch_size is {self.batch_size}; expected at least 1.")
        if self.detection_threshold is not None and not 0 <= self.detection_threshold <= 1:
            raise ValueError(f"--detection_threshold is {self.detection_threshold}; expected a score from 0 to 1.")
        if self.detector_query is not None and "{}" not in self.detector_query:
            raise ValueError(f"--detector_query is {self.detector_query!r}; expected {{}} where the class phrase goes.")
        if self.dino_model and not self.references:
            raise ValueError(
                f"--dino_model is {self.dino_model!r} without --references; expected NAME=FOLDER for them."
            )
        if not (self.clip_model or self.dino_model or self.detector):
            self.clip_model, self.detector = DEFAULT_MODELS["clip_model"], DEFAULT_MODELS["detector"]
            self.dino_model = DEFAULT_MODELS["dino_model"] if self.references else None
        self.output = self.output or str(Path(self.pictures[0]) / "evaluation.json")
        if not self.output.endswith(".json"):
            raise ValueError(f"--output is {self.output!r}; expected the name of a .json file.")
        if self.device is None:
            import torch  # seconds, which `--help` need not wait for

            best = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
            self.device = best.type if best else "cpu"
        check_device(self.device)


def read_pairs(argument: str, pairs: Sequence[str]) -> dict[str, str]:
    """`["petrucci=person"]` -> `{"petrucci": "person"}`. Raises `EvaluationError`."""
    result: dict[str, str] = {}
    for pair in pairs:
        name, _, value = (part.strip() for part in pair.partition("="))
        if not name or not value or name in result:
            raise EvaluationError(f"{argument} has {pair!r}; expected NAME=VALUE as in petrucci=…, each name once.")
        result[name] = value
    return result
