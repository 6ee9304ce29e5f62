"""The trainer's flags: a dataclass, a command line and a YAML file with the same names, and lists of subjects."""

from __future__ import annotations

import itertools
import math
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, NoReturn

import yaml
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from multisubject.generation.arguments import DataclassParser
from multisubject.generation.config_file import MOST_SEED
from multisubject.subject_file import check_class_phrase, check_subject_name

# The delta lives on the scale of the encoder's normalised output (about 1); weights are hundreds of times smaller. With
# Stable Diffusion XL, which reads an output before that norm, it is measured in lengths of the class words.
LEARNING_RATES = {"residual": 5e-2, "text_encoder": 1e-4, "lora": 1e-3}

_POSITIVE = (
    "token_num", "resolution", "num_crops", "lora_rank", "num_class_images", "max_train_steps", "train_batch_size",
    "gradient_accumulation_steps", "checkpointing_steps", "validation_steps", "validation_inference_steps",
)  # fmt: skip
_NOT_NEGATIVE = (
    "learning_rate", "lr_warmup_steps", "weight_decay", "max_grad_norm", "snr_gamma", "noise_offset",
    "key_preservation", "preservation_before", "preservation_after", "prior_loss_weight", "checkpoints_total_limit",
    "seed",
)  # fmt: skip


def _flag(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class TrainConfig:
    """What a run does. One field per command-line flag; the help texts are in the metadata."""

    pretrained_model_name_or_path: str | None = _flag(
        None,
        "Stable Diffusion 1.x, 2.x or XL: Hub id or folder in diffusers format; which one it is, the base says. Left "
        "out: the small embedded base.",
    )
    pretrained_vae_model_name_or_path: str | None = _flag(
        None,
        "Another VAE for the base: Hub id or folder, e.g. one that does not overflow in fp16. Left out: the base's own "
        "(that of Stable Diffusion XL computes in float32 under fp16).",
    )
    revision: str | None = _flag(None, "Branch, tag or commit of the base on the Hub.")
    variant: str | None = _flag(None, "Variant of the base's weight files, e.g. fp16.")
    instance_data_dir: str | None = _flag(
        None, "Folder with the subject's pictures; captions (dog.txt) and masks (dog_mask.png) may lie beside them."
    )
    instance_prompt: str | None = _flag(
        None, "The class phrase: what the subject is, in words the base knows (person, red guitar). Not a sentence."
    )
    token_num: int | None = _flag(None, "Tokens of the class phrase; left out: counted. A wrong number is refused.")
    name: str | None = _flag(None, "What the subject is called. Left out: the output folder's name.")
    concepts_list: str | None = _flag(
        None,
        "JSON or YAML file with a list of subjects to learn one after another, the models loaded once. Each is an "
        "object of flags of this list, e.g. {name, instance_data_dir, instance_prompt}, and gets its own subfolder.",
    )
    output_dir: str = _flag("output", "Everything the run leaves goes here.")
    overwrite_output_dir: bool = _flag(False, "Replace the run that --output_dir holds.")

    resolution: int | None = _flag(None, "Training size in pixels, e.g. 768. Left out: what the base was made for.")
    aspect_ratio_buckets: bool = _flag(
        True, "Keep each picture's proportions, with about resolution² pixels; --no_aspect_ratio_buckets crops squares."
    )
    random_flip: bool = _flag(False, "Also learn from mirror images (not for faces, letters or anything one-sided).")
    num_crops: int = _flag(1, "Views cached per picture: the whole one, and this many minus one random crops.")
    use_masks: bool = _flag(True, "Restrict the loss to the subject where a mask file or transparency shows it.")
    strict: bool = _flag(False, "Refuse a folder with an unreadable picture in it; otherwise it is skipped and named.")
    templates: list[str] | None = _flag(  # noqa: RUF009 (this is dataclasses.field)
        None, "Sentences to learn in, with {} for the class phrase. Left out: ten neutral ones."
    )

    method: Literal["residual", "text_encoder", "lora"] = _flag(
        "residual",
        "residual: the delta is the only parameter. text_encoder: tune the encoder as Cones 2 does and average what "
        "changed. lora: the same through LoRA layers. All three end in the same kind of file.",
    )
    lora_rank: int = _flag(8, "Rank of the LoRA layers of --method lora.")
    key_preservation: float = _flag(
        0.0,
        "--method residual: weight of how far the delta moves the subject's keys in the UNet's cross-attention. Keys "
        "say where a word is looked at, values what is seen there (cf. Perfusion's locked keys, arXiv:2305.01644). "
        "Held back, they leave the prompt's other words more say; held back too much, the likeness suffers.",
    )
    preservation_before: float = _flag(
        1e-2, "Encoder-tuning methods: weight of the drift of the tokens before the subject's (start token included)."
    )
    preservation_after: float = _flag(1e-3, "Encoder-tuning methods: weight of the drift of the tokens after them.")
    with_prior_preservation: bool = _flag(
        False,
        "Encoder-tuning methods: also learn from pictures of the plain class, made by the base where missing. There is "
        "no identifier word, so they pull the words that are taught back to the class: more variety, less likeness.",
    )
    class_data_dir: str | None = _flag(None, "Folder of the class pictures for --with_prior_preservation.")
    class_prompt: str | None = _flag(None, "Prompt of the class pictures. Left out: `a photo of a {}`.")
    num_class_images: int = _flag(50, "Class pictures wanted; what the folder lacks is generated.")
    prior_loss_weight: float = _flag(1.0, "Weight of the class pictures' loss.")

    max_train_steps: int = _flag(300, "Optimiser steps.")
    train_batch_size: int = _flag(4, "Pictures per step, process and accumulation step.")
    gradient_accumulation_steps: int = _flag(1, "Batches whose gradients are averaged before each step.")
    learning_rate: float | None = _flag(None, f"Peak rate. Left out: {LEARNING_RATES} by method, 1 for prodigy.")
    lr_scheduler: Literal[
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"
    ] = _flag("cosine", "How the rate goes over the run's optimiser steps.")
    lr_warmup_steps: int = _flag(0, "Optimiser steps over which the rate rises to its peak.")
    optimizer: Literal["adamw", "adamw8bit", "prodigy"] = _flag(
        "adamw", "adamw8bit needs `pip install bitsandbytes`, prodigy (finds its own rate) `pip install prodigyopt`."
    )
    adam_beta1: float = _flag(0.9, "Decay of the gradient's running mean.")
    adam_beta2: float = _flag(0.999, "Decay of the squared gradient's running mean.")
    adam_epsilon: float = _flag(1e-8, "Added to the root of the second mean.")
    weight_decay: float = _flag(1e-2, "Decoupled decay of the parameters; a smaller delta leaves other words more say.")
    max_grad_norm: float = _flag(1.0, "Gradients longer than this are shortened to it; 0: off.")
    snr_gamma: float | None = _flag(
        5.0, "Min-SNR weighting (arXiv:2303.09556) holds the weight of easy steps down; 0: off."
    )
    noise_offset: float = _flag(
        0.0, "Share of noise that is constant over the picture; about 0.05 helps very dark or light subjects."
    )
    gradient_checkpointing: bool = _flag(
        False, "Recompute activations in the backward pass: less memory, a third slower."
    )
    mixed_precision: Literal["no", "fp16", "bf16"] | None = _flag(
        None, "Precision of the frozen models; what is tuned stays float32. Left out: what `accelerate config` says."
    )
    seed: int = _flag(0, "Same seed, same result.")

    checkpointing_steps: int = _flag(100, "A checkpoint every so many steps.")
    checkpoints_total_limit: int | None = _flag(2, "Checkpoints kept, newest first; 0: all.")
    resume_from_checkpoint: str | None = _flag(None, "`latest`, or the path of a checkpoint of this run.")
    validation: bool = _flag(
        False,
        "Score the delta on a picture that training does not see, at every checkpoint, and keep the best: no need to "
        "know --max_train_steps. Takes one picture of three or more away from training.",
    )
    validation_steps: int | None = _flag(None, "Validation pictures every so many steps. Left out: at the end only.")
    validation_prompts: list[str] | None = _flag(  # noqa: RUF009 (this is dataclasses.field)
        None, "Prompts of those pictures, with {} for the class phrase."
    )
    validation_guidance_scale: float = _flag(7.5, "Classifier-free guidance of those pictures.")
    validation_inference_steps: int = _flag(25, "Denoising steps of those pictures.")
    report_to: str | None = _flag(
        None, "Tracker: tensorboard, wandb, or another that accelerate knows; all: every installed one."
    )

    progress_file: str | None = _flag(
        None,
        "JSON file for programs that watch the run, replaced as it goes on: phase, step, of, loss, curve "
        "(docs/training.md).",
    )

    push_to_hub: bool = _flag(False, "Upload the result (log in with `hf auth login` first).")
    hub_model_id: str | None = _flag(None, "Repository to upload to. Left out: your user name and the subject's name.")
    hub_private: bool = _flag(False, "Create the repository private.")
    license: str | None = _flag(None, "Licence of the adapter for the model card, e.g. cc-by-4.0.")

    def __post_init__(self) -> None:
        if self.progress_file is not None and not Path(self.progress_file).absolute().parent.is_dir():
            raise ValueError(f"--progress_file: {self.progress_file!r}; expected a file in a folder that is there.")
        for flags, least in ((_POSITIVE, 1), (_NOT_NEGATIVE, 0)):
            for flag in flags:
                value = getattr(self, flag)
                if value is not None and not (math.isfinite(value) and value >= least):
                    raise ValueError(f"--{flag}: {value}; expected a finite number of at least {least}.")
        for flag in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, flag) < 1:
                raise ValueError(f"--{flag}: {getattr(self, flag)}; expected a number from 0 up to, but not, 1.")
        if not 0 < self.adam_epsilon < math.inf:
            raise ValueError(f"--adam_epsilon: {self.adam_epsilon}; expected a small positive number such as 1e-8.")
        if not math.isfinite(self.validation_guidance_scale):
            raise ValueError(
                f"--validation_guidance_scale: {self.validation_guidance_scale}; expected a finite number."
            )
        if self.seed > MOST_SEED:
            raise ValueError(f"--seed: {self.seed}; expected at most {MOST_SEED}.")
        if self.lr_warmup_steps and self.lr_warmup_steps >= self.max_train_steps:
            raise ValueError(
                f"--lr_warmup_steps: {self.lr_warmup_steps}; expected fewer than --max_train_steps "
                f"({self.max_train_steps}), so that the rate reaches its peak."
            )
        if self.hub_model_id:
            try:
                validate_repo_id(self.hub_model_id)
            except HFValidationError as error:
                raise ValueError(f"--hub_model_id: {self.hub_model_id!r}: {error}") from None
        for flag in ("templates", "validation_prompts"):
            for sentence in getattr(self, flag) or ():
                if "{}" not in sentence:
                    raise ValueError(f"--{flag}: {sentence!r} has no {{}}; expected one where the class phrase goes.")
        if self.with_prior_preservation and self.method == "residual":
            raise ValueError(
                "--with_prior_preservation: --method residual leaves the base untouched, so there is no prior to "
                "preserve; drop the flag, or use --method text_encoder or lora."
            )
        if self.with_prior_preservation and not self.class_data_dir:
            raise ValueError("--with_prior_preservation: needs --class_data_dir, where the class pictures are kept.")
        if self.concepts_list and self.resume_from_checkpoint not in (None, "latest"):
            raise ValueError(
                f"--resume_from_checkpoint: {self.resume_from_checkpoint!r} is one subject's; with --concepts_list "
                "expected `latest`, which goes on with each."
            )

    @property
    def subject_name(self) -> str:
        """The subject's name: `name`, or the output folder's."""
        return self.name or Path(self.output_dir).resolve().name

    def without_effect(self) -> dict[str, str]:
        """Flags that were set and mean nothing beside the others -> what they would mean something with."""
        needs = {
            "--method residual": (self.method == "residual", ("key_preservation",)),
            "--method lora": (self.method == "lora", ("lora_rank",)),
            "--method text_encoder or lora": (
                self.method != "residual",
                ("preservation_before", "preservation_after"),
            ),
            "another --lr_scheduler than constant": (self.lr_scheduler != "constant", ("lr_warmup_steps",)),
            "--with_prior_preservation": (
                self.with_prior_preservation,
                ("class_data_dir", "class_prompt", "num_class_images", "prior_loss_weight"),
            ),
            "one subject; with --concepts_list each entry has its own": (not self.concepts_list, ("name",)),
        }
        return {
            flag: need
            for need, (met, flags) in needs.items()
            for flag in flags
            if not met and getattr(self, flag) != getattr(TrainConfig, flag)
        }


def parse_config(arguments: Sequence[str] | None = None) -> TrainConfig:
    """Command line -> configuration. Flags win over the file of `--config`, which wins over the defaults.

    Unknown keys of the file, like unknown flags, end the program with a message that names them.
    """
    parser = _parser()
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        options, _ = parser.parse_known_args(arguments)
        from_file = _file_arguments(Path(options.config)) if options.config else []
        config, *_ = parser.parse_args_into_dataclasses(from_file + arguments, look_for_args_file=False)
    except (OSError, ValueError) as error:
        DataclassParser.error(parser, str(error))
    return config


class _Parser(DataclassParser):
    """One that says what is wrong to the code: a command line is not all that it reads."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def _parser() -> DataclassParser:
    parser = _Parser(
        TrainConfig, description="Teach Stable Diffusion a subject from a few pictures.", allow_abbrev=False
    )
    for action in parser._actions:
        if action.option_strings[0].startswith("--no_"):
            action.help = f"Switch --{action.dest} off, which is on otherwise."
    parser.add_argument("--config", help="YAML file of flags without the dashes; unknown keys are refused.")
    return parser


def _file_arguments(path: Path) -> list[str]:
    """A YAML file's keys as command-line arguments, so that both go through the same checks."""
    if not path.is_file():
        raise FileNotFoundError(f"--config: {str(path)!r} is not a file.")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--config: {path} is not valid YAML in UTF-8: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"--config: {path} holds a {type(values).__name__}; expected `flag: value` lines.")
    known = [item.name for item in fields(TrainConfig)]
    if unknown := sorted(str(key) for key in values if key not in known):
        raise ValueError(f"--config: {path} has unknown keys {unknown}; expected some of {known}.")
    return _as_arguments(values)


def _as_arguments(values: dict[str, Any]) -> list[str]:
    arguments: list[str] = []
    for key, value in values.items():
        if key == "mixed_precision" and value is False:
            value = "no"  # which YAML reads as False
        if isinstance(value, list):
            arguments += [f"--{key}", *map(str, value)]
        elif value is not None:
            arguments.append(f"--{key}={value}")
    return arguments


def class_phrase_of(config: TrainConfig) -> str:
    """The class phrase with single spaces. Raises ValueError unless `--instance_prompt` is one."""
    phrase = " ".join((config.instance_prompt or "").split())
    if not phrase:
        raise ValueError("--instance_prompt: is empty; expected what the subject is, e.g. `person` or `red guitar`.")
    if "{}" in phrase:
        raise ValueError(
            f"--instance_prompt: {phrase!r}; expected the class phrase alone (`person`), sentences are --templates."
        )
    if re.match(r"(an?|the|my)\s|.*\b(photo|picture|image) of\b", phrase, re.IGNORECASE):
        raise ValueError(
            f"--instance_prompt: {phrase!r}; expected the class phrase alone, `dog` rather than `a photo of a dog`. "
            "There is no identifier word (`sks`): the subject gets its name when it is used. Sentences are --templates."
        )
    try:
        check_class_phrase(phrase)
    except ValueError as error:
        raise ValueError(f"--instance_prompt: {error}") from None
    return phrase


def check_inputs(config: TrainConfig, concepts: Sequence[TrainConfig]) -> None:
    """Raise ValueError or OSError where a subject of `config` lacks its pictures or its class phrase."""
    for concept in concepts:
        with errors_named(config, concept):
            if concept.instance_data_dir is None:
                raise ValueError("--instance_data_dir: missing; expected the folder with the subject's pictures.")
            if not Path(concept.instance_data_dir).is_dir():
                raise FileNotFoundError(
                    f"--instance_data_dir: {concept.instance_data_dir!r} is not a folder; expected one with the "
                    "pictures."
                )
            class_phrase_of(concept)


@contextmanager
def errors_named(config: TrainConfig, concept: TrainConfig) -> Iterator[None]:
    """Errors say which one of several subjects of `config` they are about."""
    try:
        yield
    except (ValueError, OSError) as error:
        if config.concepts_list is None:
            raise
        raise ValueError(f"--concepts_list: {concept.subject_name!r}: {error}") from error


def read_concepts(config: TrainConfig) -> list[TrainConfig]:
    """One configuration per subject: `config` itself, or one for each entry of `--concepts_list`."""
    concepts = [config] if config.concepts_list is None else _read_concepts_list(config, Path(config.concepts_list))
    for concept in concepts:
        try:
            check_subject_name(concept.subject_name)
        except ValueError as error:
            raise ValueError(f"--name (left out: the output folder's name): {error}") from None
        folders = {
            flag: Path(value).resolve()
            for flag in ("instance_data_dir", "output_dir", "class_data_dir")
            if (value := getattr(concept, flag)) is not None
        }
        for flag, other in itertools.combinations(folders, 2):
            if folders[flag] == folders[other]:
                raise ValueError(
                    f"--{other}: {str(folders[other])!r} is --{flag} as well; expected another folder, or what the run "
                    "writes would be learnt as pictures of the subject."
                )
    return concepts


def _read_concepts_list(config: TrainConfig, path: Path) -> list[TrainConfig]:
    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))  # JSON is YAML
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--concepts_list: {str(path)!r} cannot be read: {error}") from error
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(
            f"--concepts_list: {path}; expected a list of objects with instance_data_dir and instance_prompt."
        )
    allowed = {
        "name", "instance_data_dir", "instance_prompt", "token_num", "templates", "class_data_dir", "class_prompt",
        "validation_prompts", "max_train_steps", "learning_rate",
    }  # fmt: skip
    concepts = []
    for number, entry in enumerate(entries, start=1):
        if unknown := sorted(map(str, set(entry) - allowed)):
            raise ValueError(
                f"--concepts_list: {path}, entry {number}: unknown keys {unknown}; expected some of {sorted(allowed)}."
            )
        try:
            typed = _parser().parse_args_into_dataclasses(_as_arguments(entry), look_for_args_file=False)[0]
            own = {key: getattr(typed, key) for key, value in entry.items() if value is not None}
            name = typed.name or Path(typed.instance_data_dir or config.instance_data_dir or "").name
            if not name:
                raise ValueError("has neither name nor instance_data_dir.")
            own |= {"name": name, "output_dir": str(Path(config.output_dir) / name), "concepts_list": None}
            concepts.append(replace(config, **own))
        except ValueError as error:
            raise ValueError(f"--concepts_list: {path}, entry {number}: {error}") from error
    class_of: dict[str, tuple[str | None, str | None]] = {}
    for concept in concepts if config.with_prior_preservation else ():
        folder = str(Path(concept.class_data_dir or "").resolve())
        plain = (concept.instance_prompt, concept.class_prompt)
        if class_of.setdefault(folder, plain) != plain:
            raise ValueError(
                f"--concepts_list: {path}: {concept.subject_name!r} has the class pictures of another class in "
                f"class_data_dir {concept.class_data_dir!r}; give each class its own folder."
            )
    names = [concept.subject_name for concept in concepts]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"--concepts_list: {path}: the names {repeated} come more than once; give each entry its own.")
    return concepts
