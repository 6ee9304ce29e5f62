"""Published code of other methods on a base of the drawn world, beside this package's functions for them.

    python benchmarks/peers.py --cones2 DIR --dense_diffusion DIR --bounded_attention DIR --layout_guidance DIR \\
        --boxdiff DIR

Each folder is a clone of the authors' repository: ali-vilab/Cones-V2 (447c194), naver-ai/DenseDiffusion (54a2ea6),
omer11a/bounded-attention (aeb6580; wants `pip install einops`), silent-chen/layout-guidance (50fcf75) and
showlab/BoxDiff (b0d5d3b). Their functions and classes run as they are, except that sizes of Stable Diffusion which
stand in them are replaced by the base's, and that they are given what newer libraries no longer have. They know Stable
Diffusion 1.x and 2.x alone, and so does `--base`. The first table compares logits and attention on the same queries,
keys and regions; the second one compares pictures from the same noise:

- Cones 2: both sides with its sampler, LMS with every step taken twice; the masks are each side's own.
- DenseDiffusion: both sides also get the background as a segment of its own, described by the setting.
- Bounded Attention: its masks of the boxes alone. The gradients, the hiding of function words and the clusters that
  take the boxes' place in later steps are off, as `bounded_attention` has none of them; what stays different is that
  its code also masks the self-attention of the unconditional half.
- Layout guidance: it changes latents instead of attention, so that its energy is compared; with steps of the length
  that suits this base. Its code samples with LMS, ours with DDIM, and looks at the middle and one block after it, ours
  at all layers of the two coarsest levels.
- BoxDiff: this package has no function for it, and `multisubject` stands beside it. Its maps of 16 x 16 cells are the
  finest ones here; what it counts in 50 steps is scaled to theirs, and the length of its descent is one that suits this
  base. Of a phrase it takes the last token, as of the nouns in its examples.
"""

from __future__ import annotations

import abc
import argparse
import ast
import importlib
import io
import logging
import math
import numbers
import sys
import time
import typing
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import LMSDiscreteScheduler, StableDiffusionPipeline
from diffusers.models.attention_processor import Attention, AttnProcessor
from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch.overrides import TorchFunctionMode

from multisubject.base_models import SD
from multisubject.benchmarks.bases import DrawnBase
from multisubject.benchmarks.layout_guidance import layout_energy
from multisubject.benchmarks.placement import METHODS, Task, draw_tasks
from multisubject.benchmarks.placement_scores import score_picture, whole
from multisubject.evaluation.intervals import bootstrap_interval
from multisubject.guidance_methods import GUIDANCE_METHODS, AttentionLayer, GuidanceMethod
from multisubject.residual_embeddings import parse_prompt
from multisubject.tiny_world import EMBEDDED_BASE
from multisubject.tiny_world.judge import Judge
from multisubject.tiny_world.scenes import Box, World
from multisubject.tiny_world.subjects import SUBJECTS

ALIGNED: tuple[Box, ...] = ((0.0, 0.25, 0.5, 1.0), (0.5, 0.0, 1.0, 0.75))
"""Boxes on the grid of every level, so that all ways to make a mask smaller agree."""
COLOURS = ((255, 0, 0), (0, 0, 255))
CHECK_STEPS = 10
"""Steps of the comparison of logits; DenseDiffusion's 3/10 of them are a whole number, as of the published 50."""


# --- somebody else's code --------------------------------------------------------------------------------------------


class Resized(ast.NodeTransformer):
    """Replaces numbers in code, also one that ends a string, as in `weight_64`."""

    def __init__(self, sizes: Mapping[float, float]):
        self.sizes = sizes

    def visit_Constant(self, node: ast.Constant) -> ast.Constant:
        value: Any = node.value
        if isinstance(value, str):
            stem, underscore, number = value.rpartition("_")
            if underscore and number.isdigit() and int(number) in self.sizes:
                value = f"{stem}_{self.sizes[int(number)]}"
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            value = self.sizes.get(value, value)
        return ast.copy_location(ast.Constant(value), node)


def load_code(paths: Sequence[Path], sizes: Mapping[float, float], **given: Any) -> Any:
    """One module with the functions and classes of some files and nothing else of them, not even their imports.

    Args:
        paths: the files; each one also stands in the module under its own name, as if imported.
        sizes: numbers to replace.
        given: names that the code finds defined.
    """
    module = ModuleType("peer")
    vars(module).update(torch=torch, F=F, nn=torch.nn, np=np, math=math, Image=Image, **given)
    for path in paths:
        tree = ast.parse(path.read_bytes())
        tree.body = [node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
        vars(module)[path.stem] = module
        exec(compile(Resized(sizes).visit(tree), str(path), "exec"), vars(module))
    return module


@dataclass(frozen=True, eq=False)
class Seen:
    """Queries `(n, Q, dim)`, keys `(n, K, dim)` and final logits `(n, Q, K)` of one softmax, n = batch * heads."""

    query: torch.Tensor
    key: torch.Tensor
    logits: torch.Tensor


class SoftmaxWatcher(TorchFunctionMode):
    """Within the context, notes each softmax and the factors of the last product before it, in any code, as `seen`."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Seen] = []
        self._factors = (torch.empty(0), torch.empty(0))

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in ("matmul", "bmm", "baddbmm"):
            self._factors = args[-2], args[-1].transpose(-1, -2)
        elif name == "einsum":
            self._factors = args[1], args[2]
        elif name == "softmax":
            self.seen.append(Seen(*self._factors, args[0]))
        return func(*args, **(kwargs or {}))


# --- agreement -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Agreement:
    """How far our logits and attention are from theirs at most; `effect`: how far theirs are from plain attention."""

    layers: int
    effect: float
    logits: float
    attention: float

    def __str__(self) -> str:
        return f"{self.layers} | {self.effect:.2f} | {self.logits:.1e} | {self.attention:.1e}"


def agreement(pairs: Sequence[tuple[Seen, AttentionLayer]], method: GuidanceMethod) -> Agreement:
    """Compare on their queries and keys, layer by layer, in a batch of one.

    Of their samples the last one counts, which is the conditional one. Our layers say which regions and which step it
    is. Logits that both sides hide (below -1e3) are taken to be equal.
    """
    differences = []
    for theirs, ours in pairs:
        heads = ours.query.shape[1]
        query, key, logits = (x[-heads:][None] for x in (theirs.query, theirs.key, theirs.logits))
        plain = query @ key.transpose(-1, -2) * ours.scale
        bias = method(replace(ours, query=query, key=key, key_moments=None))
        expected = plain if bias is None else plain + bias
        attention = logits.softmax(dim=-1)
        differences.append(
            [
                (attention - plain.softmax(dim=-1)).abs().max(),
                (expected.clamp(min=-1e3) - logits.clamp(min=-1e3)).abs().max(),
                (attention - expected.softmax(dim=-1)).abs().max(),
            ]
        )
    return Agreement(len(pairs), *torch.tensor(differences).amax(dim=0).tolist())


# --- the five --------------------------------------------------------------------------------------------------------


def box_mask(box: Box, size: int) -> np.ndarray:
    """`(size, size)` bool."""
    xmin, ymin, xmax, ymax = (round(side * size) for side in box)
    mask = np.zeros((size, size), dtype=bool)
    mask[ymin:ymax, xmin:xmax] = True
    return mask


def with_aligned_boxes(task: Task) -> Task:
    """A task of two regions, with the boxes of `ALIGNED`."""
    targets = tuple(replace(target, box=box) for target, box in zip(task.targets, ALIGNED, strict=True))
    return replace(task, targets=targets)


class Peer(ABC):
    """One repository, with a pipeline for its code (`plain`) and one of ours (`pipe`).

    Raises:
        ValueError: the folder has not all of `files`; the message names the option, which is called like `method`.
    """

    title: str
    method: str  # our function for it
    beside = ""  # of ours that stands beside it where there is no such function
    files: tuple[str, ...]
    cell = "described 2"
    subjects: tuple[str, ...] = ()
    recurrence = 1

    def __init__(self, folder: Path, base: DrawnBase, guidance_scale: float):
        for file in self.files:
            if not (folder / file).is_file():
                raise ValueError(f"--{self.method}: {folder} has no {file}; expected a clone of {self.title}'s code.")
        self.paths, self.guidance_scale = [folder / file for file in self.files], guidance_scale
        self.pipe = base.load(self.subjects)
        self.plain = StableDiffusionPipeline.from_pretrained(str(base.folder), dtype=torch.float32)
        self.plain.set_progress_bar_config(disable=True)
        self.attentions = [module for module in self.plain.unet.modules() if isinstance(module, Attention)]
        self.latent_size = self.plain.unet.config.sample_size

    @abstractmethod
    def draw(self, task: Task, steps: int) -> Image.Image:
        """The picture by their code."""

    def layout(self, task: Task) -> dict[str, Any]:
        """The task's layout for our pipeline."""
        return task.layout

    def draw_ours(self, tasks: Sequence[Task], steps: int, method: str | GuidanceMethod) -> list[Image.Image]:
        """The pictures by our pipeline, in one batch."""
        return self.pipe(
            [task.prompt for task in tasks],
            layout=[self.layout(task) for task in tasks],
            guidance_method=method,
            recurrence=self.recurrence,
            num_inference_steps=steps,
            guidance_scale=self.guidance_scale,
            generator=[torch.Generator().manual_seed(task.seed) for task in tasks],
        ).images

    def guided(self, seen: list[Seen]) -> list[Seen]:
        """Of all that was seen, the softmaxes that decide about the conditional sample."""
        return seen

    def check(self, task: Task) -> Iterator[tuple[str, Agreement | str]]:
        """Kind of attention and how it agrees, for the kinds that their code changes, on aligned boxes."""
        task = with_aligned_boxes(task)
        with SoftmaxWatcher() as watcher:
            self.draw(task, CHECK_STEPS)
        layers: list[AttentionLayer] = []
        self.draw_ours([task], CHECK_STEPS, layers.append)
        pairs = list(zip(self.guided(watcher.seen)[: len(layers)], layers, strict=True))  # the decoder's come last
        for kind, is_cross in (("cross", True), ("self", False)):
            found = agreement([pair for pair in pairs if pair[1].is_cross == is_cross], GUIDANCE_METHODS[self.method])
            if found.effect > 1e-3:
                yield kind, found


class LmsOfThen(LMSDiscreteScheduler):
    """LMS as Cones 2 knew it: evenly spaced from the last timestep on, every step looked up by its timestep."""

    @classmethod
    def from_config(cls, config: Any, **kwargs: Any) -> Any:
        return super().from_config(config, timestep_spacing="linspace", **kwargs)

    def scale_model_input(self, sample: torch.Tensor, timestep: Any) -> torch.Tensor:
        self._step_index = None  # a step may be taken twice
        return super().scale_model_input(sample, timestep)

    def step(self, model_output: Any, timestep: Any, *args: Any, **kwargs: Any) -> Any:
        self._step_index = None
        return super().step(model_output, timestep, *args, **kwargs)


class Cones2(Peer):
    """Its sampling function, with the subjects' residuals as files and the layout as a picture of colours."""

    title, method, cell, recurrence = "Cones 2", "cones2", "subjects 2", 2
    files = ("attention_control.py", "utils.py", "layout_guidance.py")
    subjects = tuple(SUBJECTS)

    def __init__(self, folder: Path, base: DrawnBase, guidance_scale: float):
        super().__init__(folder, base, guidance_scale)
        sizes: dict[float, float] = {width**2: (self.latent_size * width // 96) ** 2 for width in (96, 48, 24, 12)}
        sizes |= {1024: self.plain.unet.config.cross_attention_dim, 0.18215: self.plain.vae.config.scaling_factor}
        self.code = load_code(
            self.paths,
            sizes,
            CrossAttention=Attention,
            LMSDiscreteScheduler=LmsOfThen,
            StableDiffusionPipelineOutput=StableDiffusionPipelineOutput,
            tqdm=lambda steps, **_: steps,
        )
        for attention in self.attentions:
            attention.cross_attention_norm = None
        self.pipe.scheduler = LMSDiscreteScheduler.from_config(self.pipe.scheduler.config, timestep_spacing="linspace")

    def draw(self, task: Task, steps: int) -> Image.Image:
        text = parse_prompt(self.pipe.tokenizer, task.prompt, self.pipe.subjects)
        size = 8 * self.latent_size  # they divide by 8, whatever the VAE does
        picture = np.full((size, size, 3), 255, dtype=np.uint8)
        residuals = {}
        for colour, target, mention in zip(COLOURS, task.targets, text.mentions, strict=True):
            picture[box_mask(target.box, size)] = colour
            residuals[mention.subject] = io.BytesIO()
            torch.save(self.pipe.subjects[mention.subject].delta, residuals[mention.subject])
            residuals[mention.subject].seek(0)
        return self.code.layout_guidance_sampling(
            seed=task.seed,
            device="cpu",
            resolution=size,
            pipeline=self.plain,
            prompt=text.text,
            residual_dict=residuals,
            subject_list=[[mention.subject, mention.span.start] for mention in text.mentions],
            subject_color_dict=dict(zip(COLOURS, ([mention.phrase, 2.5] for mention in text.mentions), strict=True)),
            layout=Image.fromarray(picture),
            cfg_scale=self.guidance_scale,
            inference_steps=steps,
            guidance_steps=steps,
            guidance_weight=0.08,
        )

    def guided(self, seen: list[Seen]) -> list[Seen]:
        calls = (seen[start : start + len(self.attentions)] for start in range(0, len(seen), len(self.attentions)))
        return [layer for index, call in enumerate(calls) if index % 2 == 0 for layer in call]


class DenseDiffusion(Peer):
    """Its generation function and the attention that it puts into every layer."""

    title, method, files = "DenseDiffusion", "dense_diffusion", ("utils.py", "gradio_app.py")

    def segments(self, task: Task) -> dict[str, np.ndarray]:
        """Words to mask, the background's first."""
        masks = {target.words: box_mask(target.box, self.latent_size) for target in task.targets}
        return {task.setting: ~np.any(list(masks.values()), axis=0), **masks}

    def layout(self, task: Task) -> dict[str, Any]:
        return {words: mask.astype(np.float32) for words, mask in self.segments(task).items()}

    def tokenizer(self, *args: Any, **kwargs: Any) -> Any:
        """Counts tokens without the padding, as tokenizers did then."""
        tokens = self.plain.tokenizer(*args, **kwargs)
        tokens["length"] = tokens["attention_mask"].sum(dim=1)
        return tokens

    @torch.no_grad()
    def draw(self, task: Task, steps: int) -> Image.Image:
        self.plain.scheduler.set_timesteps(steps)
        pipe: Any = partial(self.plain, num_inference_steps=steps, guidance_scale=self.guidance_scale)
        pipe.tokenizer = partial(self.tokenizer)
        pipe.tokenizer.model_max_length = self.plain.tokenizer.model_max_length
        pipe.text_encoder = self.plain.text_encoder
        code = load_code(
            self.paths,
            {32: len(self.attentions), 50: steps},
            device="cpu",
            pipe=pipe,
            sp_sz=self.latent_size,
            timesteps=self.plain.scheduler.timesteps,
        )
        words, masks = zip(*self.segments(task).items(), strict=True)
        with patch.object(Attention, "__call__", code.mod_forward):
            return code.process_generation(masks, task.seed, 1.0, 0.3, 1.0, 1, task.prompt, *words)[0]


class BoundedAttention(Peer):
    """Its attention editor in a plain pipeline."""

    title, method = "Bounded Attention", "bounded_attention"
    files = ("injection_utils.py", "bounded_attention.py")

    def __init__(self, folder: Path, base: DrawnBase, guidance_scale: float):
        super().__init__(folder, base, guidance_scale)
        try:
            einops = importlib.import_module("einops")
        except ModuleNotFoundError:
            raise ValueError(f"--{self.method}: its code wants einops; run `pip install einops`.") from None
        self.code = load_code(self.paths, {}, einops=einops, rearrange=einops.rearrange, KMeans=lambda **_: None)

    def draw(self, task: Task, steps: int) -> Image.Image:
        text = parse_prompt(self.pipe.tokenizer, task.prompt, {})
        editor = self.code.BoundedAttention(
            [target.box for target in task.targets],
            [task.prompt],
            [list(text.find(target.words).span) for target in task.targets],
            cross_loss_layers=(),
            self_loss_layers=(),
            filter_token_indices=[],
            leading_token_indices=[],
            min_clustering_step=steps,
        )
        model = SimpleNamespace(unet=self.plain.unet, tokenizer=self.plain.tokenizer)
        self.code.register_attention_editor_diffusers(model, editor)
        return self.plain(
            task.prompt,
            num_inference_steps=steps,
            guidance_scale=self.guidance_scale,
            generator=torch.Generator().manual_seed(task.seed),
        ).images[0]

    def guided(self, seen: list[Seen]) -> list[Seen]:
        return seen[1::2]  # it computes the plain attention first


class LayoutGuidance(Peer):
    """Its sampling function and its energy, with a UNet that returns attention maps as its own does."""

    title, method, files = "Layout guidance", "layout_guidance", ("utils.py", "inference.py")
    ours = METHODS["layout guidance"]["guidance_method"]

    def __init__(self, folder: Path, base: DrawnBase, guidance_scale: float):
        super().__init__(folder, base, guidance_scale)
        self.code = load_code(
            self.paths,
            {64: self.latent_size, 0.18215: self.plain.vae.config.scaling_factor},
            LMSDiscreteScheduler=partial(
                LMSDiscreteScheduler, prediction_type=self.plain.scheduler.config.prediction_type
            ),
            tqdm=lambda steps: steps,
            hydra=SimpleNamespace(main=lambda **_: lambda function: function),
        )
        self.plain.unet.set_attn_processor(AttnProcessor())  # fused attention has no maps to return
        self.maps: dict[str, list[torch.Tensor]] = {}

    def unet(self, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """The prediction, and maps `(batch * heads, Q, K)` of cross-attention by up block, of the middle and below.

        As in Stable Diffusion, whose coarsest level has none, the first up block is left out.
        """
        self.maps = {}
        with ExitStack() as patches:
            for name, attention in self.plain.unet.named_modules():
                if isinstance(attention, Attention) and name.endswith("attn2"):
                    block = name.split(".attentions")[0]
                    patches.enter_context(
                        patch.object(attention, "get_attention_scores", self.noting(attention, block))
                    )
            prediction = self.plain.unet(sample, *args, **kwargs)
        return prediction, [self.maps["up_blocks.1"], self.maps["up_blocks.2"]], self.maps["mid_block"], []

    def noting(self, attention: Attention, block: str) -> Callable[..., torch.Tensor]:
        """`attention.get_attention_scores`, whose results are kept."""
        compute = attention.get_attention_scores

        def compute_and_note(*args: Any) -> torch.Tensor:
            # Its energy divides by what a token gets, which must not be nothing.
            self.maps.setdefault(block, []).append(compute(*args).clamp(min=1e-20))
            return self.maps[block][-1]

        return compute_and_note

    def draw(self, task: Task, steps: int) -> Image.Image:
        settings = SimpleNamespace(
            inference=SimpleNamespace(
                batch_size=1,
                rand_seed=task.seed,
                timesteps=steps,
                loss_scale=self.ours.scale,
                loss_threshold=self.ours.threshold,
                max_iter=self.ours.max_iterations,
                max_index_step=math.ceil(self.ours.guided_share * steps),
                classifier_free_guidance=self.guidance_scale,
            ),
            noise_schedule=self.plain.scheduler.config,
        )
        (picture,) = self.code.inference(
            torch.device("cpu"),
            self.unet,
            self.plain.vae,
            self.plain.tokenizer,
            self.plain.text_encoder,
            task.prompt,
            [[target.box] for target in task.targets],
            "; ".join(target.words for target in task.targets),
            settings,
            SimpleNamespace(info=lambda text: None),
        )
        return picture

    def draw_ours(self, tasks: Sequence[Task], steps: int, method: str | GuidanceMethod) -> list[Image.Image]:
        with self.ours.attached(self.pipe):
            return super().draw_ours(tasks, steps, self.ours)

    def check(self, task: Task) -> Iterator[tuple[str, Agreement | str]]:
        task = with_aligned_boxes(task)
        text = parse_prompt(self.pipe.tokenizer, task.prompt, {})
        boxes = [[target.box] for target in task.targets]
        tokens = [list(text.find(target.words).span) for target in task.targets]
        layers: list[AttentionLayer] = []
        super().draw_ours([task], CHECK_STEPS, layers.append)
        apart = []
        for layer in layers:
            if layer.is_cross:
                maps = (layer.query[0] @ layer.key[0].transpose(-1, -2) * layer.scale).softmax(dim=-1)
                theirs = self.code.compute_ca_loss([maps], [[]], boxes, tokens)
                apart.append(float((layout_energy(layer) - theirs).abs().max()))
        yield "cross", f"{len(apart)} | – | energies: {max(apart):.1e} | –"


class BoxDiff(Peer):
    """Its pipeline. We have no function for it: our default method stands beside it."""

    title, method, beside = "BoxDiff", "boxdiff", "multisubject"
    files = ("utils/gaussian_smoothing.py", "utils/ptp_utils.py", "pipeline/sd_pipeline_boxdiff.py")
    scale_factor = 20.0  # as published

    def __init__(self, folder: Path, base: DrawnBase, guidance_scale: float):
        super().__init__(folder, base, guidance_scale)
        self.code = load_code(
            self.paths,
            {},
            **{
                name: getattr(typing, name)
                for name in ("Any", "Callable", "Dict", "List", "Optional", "Tuple", "Union")
            },
            abc=abc,
            numbers=numbers,
            logger=logging.getLogger(self.title),
            randn_tensor=randn_tensor,
            CrossAttention=Attention,
            StableDiffusionPipeline=StableDiffusionPipeline,
            StableDiffusionPipelineOutput=StableDiffusionPipelineOutput,
        )
        self.code.GaussianSmoothing.cuda = lambda smoothing: smoothing
        self.theirs = self.code.BoxDiffPipeline(**self.plain.components, requires_safety_checker=False)
        self.theirs.set_progress_bar_config(disable=True)

    def draw(self, task: Task, steps: int) -> Image.Image:
        text = parse_prompt(self.pipe.tokenizer, task.prompt, {})
        store = self.code.AttentionStore()
        self.code.register_attention_control(self.theirs, store)
        return self.theirs(
            task.prompt,
            store,
            [text.find(target.words).span[-1] for target in task.targets],
            attention_res=self.latent_size,
            num_inference_steps=steps,
            guidance_scale=self.guidance_scale,
            generator=torch.Generator().manual_seed(task.seed),
            max_iter_to_alter=steps // 2,
            thresholds={0: 0.05, steps // 5: 0.5, 2 * steps // 5: 0.8},
            scale_factor=self.scale_factor,
            bbox=[[round(512 * side) for side in target.box] for target in task.targets],
            config=SimpleNamespace(P=0.2, L=1, refine=True),
        ).images[0]

    def check(self, task: Task) -> Iterator[tuple[str, Agreement | str]]:
        yield from ()


PEERS: tuple[type[Peer], ...] = (Cones2, DenseDiffusion, BoundedAttention, LayoutGuidance, BoxDiff)


# --- tables ----------------------------------------------------------------------------------------------------------


def agreement_table(peers: Sequence[Peer], world: World, seed: int) -> Iterator[str]:
    """Lines of markdown."""
    yield "| code | attention | layers | changes attention by up to | our logits differ by up to | our attention by |"
    yield "|" + "---|" * 6
    for peer in peers:
        for kind, found in peer.check(draw_tasks(peer.cell, 1, seed, world)[0]):
            yield f"| {peer.title} | {kind} | {found} |"


def score_table(peers: Sequence[Peer], world: World, options: argparse.Namespace) -> Iterator[str]:
    """Lines of markdown, two for each peer."""
    yield (
        "| cell | code | pictures | every region right | 95 % interval | ours less theirs, 95 % interval "
        "| regions: category | look | missing | leaked | extras per picture | seconds |"
    )
    yield "|" + "---|" * 12
    judge, steps = Judge.load(), options.num_inference_steps
    for peer in peers:
        tasks = draw_tasks(peer.cell, options.num_pictures, options.seed, world)
        theirs: np.ndarray | None = None
        for name in (f"{peer.title}, its code", f"{peer.title}, our `{peer.beside or peer.method}`"):
            start = time.perf_counter()
            if theirs is None:
                pictures = [peer.draw(task, steps) for task in tasks]
            else:
                pictures = peer.draw_ours(tasks, steps, peer.beside or peer.method)
            seconds = (time.perf_counter() - start) / len(tasks)
            rows = [score_picture(judge, *pair) for pair in zip(tasks, pictures, strict=True)]
            every = whole(rows, "look")
            low, high = bootstrap_interval(every)
            apart = "–"
            if theirs is not None:
                least, most = bootstrap_interval(every - theirs)
                apart = f"{(every - theirs).mean():+.0%}, {least:+.0%} to {most:+.0%}"
            theirs = every
            regions = sum(row["regions"] for row in rows)
            shares = [sum(row[key] for row in rows) / regions for key in ("category", "look", "missing", "leaked")]
            yield (
                f"| {peer.cell} | {name} | {len(rows)} | {every.mean():.0%} | {low:.0%} to {high:.0%} | {apart} "
                f"| {' | '.join(f'{share:.0%}' for share in shares)} "
                f"| {sum(row['extras'] for row in rows) / len(rows):.2f} | {seconds:.2f} |"
            )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for peer in PEERS:
        parser.add_argument(f"--{peer.method}", type=Path, metavar="DIR", help=f"{peer.title}'s code")
    parser.add_argument("--base", type=Path, default=EMBEDDED_BASE, help="a folder in diffusers' format")
    parser.add_argument("--embeddings", type=Path, help="its subjects (default: embeddings)")
    parser.add_argument("--num_pictures", type=int, default=40, help="per row; 0: no second table (default: 40)")
    parser.add_argument("--num_inference_steps", type=int, default=25)
    parser.add_argument("--guidance_scale", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(arguments)
    if options.num_pictures < 0:
        parser.error("--num_pictures: expected at least 0.")
    try:
        base = DrawnBase.read(options.base, options.embeddings)
        if base.architecture is not SD:
            raise ValueError(f"--base: {base.name} is of {base.architecture.family}; their code is for {SD.family}.")
        chosen = [(peer, getattr(options, peer.method)) for peer in PEERS]
        peers = [peer(folder, base, options.guidance_scale) for peer, folder in chosen if folder is not None]
        if not peers:
            raise ValueError(f"expected at least one of {', '.join(f'--{peer.method}' for peer in PEERS)}.")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for line in agreement_table(peers, base.world, options.seed):
        print(line, flush=True)
    if options.num_pictures:
        print()
        for line in score_table(peers, base.world, options):
            print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
