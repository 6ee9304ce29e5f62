"""Released encoders and detectors, through transformers: pictures become unit vectors and boxes.

Weights are read from safetensors and code that comes with a model is never run. Boxes are `(xmin, ymin, xmax, ymax)` in
fractions of the picture.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image
from tqdm.auto import tqdm
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForObjectDetection,
    AutoModelForZeroShotObjectDetection,
    AutoProcessor,
    AutoTokenizer,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_ZERO_SHOT_OBJECT_DETECTION_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

from multisubject.evaluation.arguments import EvaluationError
from multisubject.evaluation.pictures import Crop
from multisubject.generation.console import quiet_loading
from multisubject.layout import Box

# Detections that overlap more than this are one thing found twice.
_SAME_THING = 0.5
_T = TypeVar("_T")


@dataclass(frozen=True)
class Runtime:
    """How models run: device, name of the weights' dtype, pictures per call."""

    device: str = "cpu"
    dtype: str = "float32"
    batch_size: int = 16


@dataclass(frozen=True)
class Detection:
    """A box and the detector's score in [0, 1]."""

    box: Box
    score: float


def load_model(argument: str, name: str, auto_model: Any, auto_processor: Any, runtime: Runtime) -> tuple[Any, Any]:
    """Model, ready to run, and processor of a folder or Hub id. Raises `EvaluationError`, which names `argument`."""
    source, options = _source(name)
    with _loading(argument, name), quiet_loading(transformers_logging):
        processor = auto_processor.from_pretrained(source, **options)
        model, info = auto_model.from_pretrained(
            source, dtype=getattr(torch, runtime.dtype), use_safetensors=True, output_loading_info=True, **options
        )
    # Poolers are missing from some published files and not used here; anything else would be random numbers.
    if missing := sorted(key for key in info["missing_keys"] if "pooler." not in key):
        raise EvaluationError(
            f"{argument} is {name!r}, whose file lacks {len(missing)} weights of {type(model).__name__} such as "
            f"{missing[0]!r}; expected a whole model. Download it again, or name another."
        )
    return model.eval().requires_grad_(False).to(runtime.device), processor


@contextmanager
def _loading(argument: str, name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # transformers and safetensors raise many kinds for what is no such model
        raise EvaluationError(
            f"{argument} is {name!r} and cannot be loaded; expected a folder or Hub id of a model that transformers "
            "has, with safetensors weights, a processor, and a tokenizer if it reads text; its own code is never run. "
            f"{type(error).__name__}: {error}"
        ) from error


def _check_tokenizer(argument: str, name: str, tokenizer: Any) -> None:
    """Refuse the tokenizer that transformers makes where its files are missing: to it all words are unknown."""
    if tokenizer("cat")["input_ids"] == tokenizer("dog")["input_ids"]:
        raise EvaluationError(
            f"{argument} is {name!r}, whose tokenizer has the same tokens for 'cat' and 'dog'; expected the "
            "files of a tokenizer beside the weights, such as tokenizer.json. Download them too, or name another."
        )


def _source(name: str) -> tuple[str, dict[str, Any]]:
    """Folder or Hub id, and the options for loading from it; `user/model@revision` names a revision."""
    source, _, revision = (name, "", "") if Path(name).exists() else name.partition("@")
    return source, {"revision": revision or "main", "trust_remote_code": False}


def _batches(items: Sequence[_T], size: int, what: str) -> Iterator[list[_T]]:
    with tqdm(total=len(items), desc=what, disable=None) as bar:
        for start in range(0, len(items), size):
            batch = list(items[start : start + size])
            yield batch
            bar.update(len(batch))


# --- encoders ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Encoder:
    """CLIP, or DINO if it has no `tokenizer`, as a map from pictures (and prompts) to unit vectors."""

    name: str
    model: Any
    processor: Any
    tokenizer: Any
    batch_size: int

    @classmethod
    def clip(cls, name: str, runtime: Runtime) -> Encoder:
        """Load `--clip_model`. Raises `EvaluationError`."""
        model, processor = load_model("--clip_model", name, AutoModel, AutoImageProcessor, runtime)
        if not all(hasattr(model, part) for part in ("get_image_features", "get_text_features")):
            raise EvaluationError(
                f"--clip_model is {name!r}, a {type(model).__name__}; expected a model with an image and a text tower "
                "such as openai/clip-vit-large-patch14."
            )
        source, options = _source(name)
        with _loading("--clip_model", name):
            tokenizer = AutoTokenizer.from_pretrained(source, **options)
        _check_tokenizer("--clip_model", name, tokenizer)
        return cls(name, model, processor, tokenizer, runtime.batch_size)

    @classmethod
    def dino(cls, name: str, runtime: Runtime) -> Encoder:
        """Load `--dino_model`. Raises `EvaluationError`."""
        model, processor = load_model("--dino_model", name, AutoModel, AutoImageProcessor, runtime)
        if not any(key.endswith("cls_token") for key, _ in model.named_parameters()):
            raise EvaluationError(
                f"--dino_model is {name!r}, a {type(model).__name__} without a class token; expected a vision "
                "transformer such as facebook/dinov2-base."
            )
        return cls(name, model, processor, None, runtime.batch_size)

    @property
    def text_limit(self) -> int:
        """Tokens of a prompt that are read."""
        return self.model.config.text_config.max_position_embeddings

    def count_tokens(self, prompt: str) -> int:
        """Tokens of a prompt, with those of its start and end."""
        return len(self.tokenizer(prompt)["input_ids"])

    @torch.inference_mode()
    def images(self, crops: Iterable[Crop]) -> dict[Crop, torch.Tensor]:
        """`(dim,)` float32 on the CPU, of unit length, for each crop."""
        vectors: dict[Crop, torch.Tensor] = {}
        for batch in _batches(list(dict.fromkeys(crops)), self.batch_size, f"{self.name}, pictures"):
            inputs = self.processor(images=[crop.load() for crop in batch], return_tensors="pt")
            pixels = inputs["pixel_values"].to(self.model.device, self.model.dtype)
            if self.tokenizer is None:
                features = self.model(pixel_values=pixels).last_hidden_state[:, 0]
            else:
                features = _pooled(self.model.get_image_features(pixel_values=pixels))
            vectors |= zip(batch, self._unit(features), strict=True)
        return vectors

    @torch.inference_mode()
    def texts(self, prompts: Iterable[str]) -> dict[str, torch.Tensor]:
        """`(dim,)` float32 on the CPU, of unit length, for each prompt; what is beyond `text_limit` is cut."""
        vectors: dict[str, torch.Tensor] = {}
        for batch in _batches(list(dict.fromkeys(prompts)), self.batch_size, f"{self.name}, prompts"):
            # All to one length: SigLIP was trained so, and CLIP does not care.
            tokens = self.tokenizer(
                batch, padding="max_length", truncation=True, max_length=self.text_limit, return_tensors="pt"
            )
            features = _pooled(self.model.get_text_features(**tokens.to(self.model.device)))
            vectors |= zip(batch, self._unit(features), strict=True)
        return vectors

    def _unit(self, features: torch.Tensor) -> torch.Tensor:
        features = features.float().cpu()
        if not torch.isfinite(features).all():
            raise EvaluationError(
                f"--dtype is {str(self.model.dtype).removeprefix('torch.')}, in which {self.name!r} gives numbers that "
                "are not finite; try float32. If it is that already, the weights are damaged."
            )
        return torch.nn.functional.normalize(features, dim=-1)


def _pooled(output: Any) -> torch.Tensor:
    return getattr(output, "pooler_output", output)  # before transformers 5 the features themselves


# --- detectors -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Detector:
    """Finds phrases in pictures.

    Args:
        name: folder or Hub id.
        model: the detector.
        processor: the one that belongs to it.
        query: what it is asked, `{}` being the phrase; None for a detector of fixed classes.
        threshold: least score; None: the processor's own.
        batch_size: pictures per call.
    """

    name: str
    model: Any
    processor: Any
    query: str | None
    threshold: float | None
    batch_size: int

    @classmethod
    def load(cls, name: str, runtime: Runtime, query: str | None = None, threshold: float | None = None) -> Detector:
        """Load `--detector`. Raises `EvaluationError`."""
        source, options = _source(name)
        try:
            kind = AutoConfig.from_pretrained(source, **options).model_type
        except (OSError, ValueError, KeyError):
            kind = ""  # load_model says what is wrong
        if kind in MODEL_FOR_ZERO_SHOT_OBJECT_DETECTION_MAPPING_NAMES:
            classes = (AutoModelForZeroShotObjectDetection, AutoProcessor)
            query = query or ("a photo of a {}" if kind.startswith("owl") else "{}")
        else:
            classes, query = (AutoModelForObjectDetection, AutoImageProcessor), None
        model, processor = load_model("--detector", name, *classes, runtime)
        if query is not None:
            _check_tokenizer("--detector", name, processor.tokenizer)
        return cls(name, model, processor, query, threshold, runtime.batch_size)

    def detect(self, wanted: Iterable[tuple[Path, str]]) -> dict[tuple[Path, str], list[Detection]]:
        """Detections of each `(picture, phrase)`, best first, without doubles.

        Raises:
            EvaluationError: a phrase that a detector of fixed classes does not know.
        """
        pairs = sorted(set(wanted), key=lambda pair: (pair[1], pair[0]))
        known = {label.lower() for label in self.model.config.id2label.values()}
        if self.query is None and (unknown := sorted({phrase for _, phrase in pairs if phrase.lower() not in known})):
            raise EvaluationError(
                f"--detector is {self.name!r}, which has no class {unknown[0]!r}; expected one of "
                f"{', '.join(sorted(known)[:100])}. Take an open-vocabulary one such as "
                "google/owlv2-base-patch16-ensemble."
            )
        found: dict[tuple[Path, str], list[Detection]] = {}
        for batch in _batches(pairs, self.batch_size, f"{self.name}, pictures"):
            images = {path: Crop(path).load() for path, _ in batch}

            # Others would be padded to one size, and what is found in a picture depend on its neighbours.
            def alike(pair: tuple[Path, str], images: Mapping[Path, Image.Image] = images) -> Any:
                return pair[1], images[pair[0]].size

            for (phrase, _), group in itertools.groupby(sorted(batch, key=alike), key=alike):
                same = list(group)
                found |= zip(same, self._detect([images[path] for path, _ in same], phrase), strict=True)
        return found

    @torch.inference_mode()
    def _detect(self, images: Sequence[Image.Image], phrase: str) -> list[list[Detection]]:
        """One phrase in pictures of one size."""
        is_open = self.query is not None
        text = {"text": [[self.query.replace("{}", phrase)]] * len(images)} if self.query is not None else {}
        inputs = self.processor(images=list(images), return_tensors="pt", **text)
        outputs = self.model(**inputs.to(self.model.device, self.model.dtype))
        post_process = "post_process_grounded_object_detection" if is_open else "post_process_object_detection"
        options: dict[str, Any] = {} if self.threshold is None else {"threshold": self.threshold}
        width, height = images[0].size
        results = getattr(self.processor, post_process)(
            outputs, target_sizes=[(height, width)] * len(images), **options
        )
        detections = []
        for result in results:
            boxes = (result["boxes"].float().cpu() / torch.tensor([width, height] * 2)).clamp(0, 1).tolist()
            found = [Detection(tuple(box), float(score)) for box, score in zip(boxes, result["scores"], strict=True)]
            if not is_open:
                labels = [self.model.config.id2label[int(label)].lower() for label in result["labels"]]
                found = [one for one, label in zip(found, labels, strict=True) if label == phrase.lower()]
            detections.append(best_detections(found))
        return detections


def best_detections(detections: Iterable[Detection]) -> list[Detection]:
    """Best first; without empty boxes, and without boxes that are mostly a better one."""
    kept: list[Detection] = []
    for one in sorted(detections, key=lambda one: -one.score):
        xmin, ymin, xmax, ymax = one.box
        if xmin < xmax and ymin < ymax and all(box_iou(one.box, other.box) <= _SAME_THING for other in kept):
            kept.append(one)
    return kept


def box_iou(first: Box, second: Box) -> float:
    """Intersection over union, in [0, 1]."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    shared = max(width, 0.0) * max(height, 0.0)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (first, second)]
    return shared / (sum(areas) - shared) if shared else 0.0
