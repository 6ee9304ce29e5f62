"""Objects are found where attention has them, moved into their regions, and nothing else changes."""

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LMSDiscreteScheduler,
)
from torch.utils._python_dispatch import TorchDispatchMode

from multisubject.benchmarks.bases import DrawnBase
from multisubject.benchmarks.placement import draw_tasks
from multisubject.benchmarks.placement_scores import score_picture
from multisubject.guidance_methods import multisubject, uses_own_summaries, uses_own_words
from multisubject.move_times import check_moves, steps_of_moves
from multisubject.recurrence import RecurrentScheduler
from multisubject.region_moves import (
    RegionLook,
    RegionMover,
    _background,
    _of_its_goals_shape,
    _set_down,
    boxes_around,
    covered,
)
from multisubject.tiny_world import EMBEDDED_BASE
from multisubject.tiny_world.judge import Judge

SIZE = (16, 16)
PROMPT = "a photo of a red dog and a blue ball"
LAYOUT = {"red dog": (0.1, 0.2, 0.4, 0.7), "blue ball": (0.6, 0.3, 0.9, 0.8)}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sample(pipe: Any, prompt: Any = PROMPT, **kwargs: Any) -> torch.Tensor:
    """Final latents of a run that is just long enough."""
    return pipe(prompt, **({"num_inference_steps": 10, "output_type": "latent", "generator": seeded()} | kwargs)).images


class Watch(TorchDispatchMode):
    """What torch does meanwhile.

    Attributes:
        largest: numbers in the largest tensor that an operation has returned.
    """

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.largest = max(self.largest, result.numel())
        return result


@pytest.fixture(params=["sd1", "xl"])
def pipe(request):
    return request.getfixturevalue(f"{request.param}_pipe")


def look_that_sees(boxes: torch.Tensor, objects: torch.Tensor, size: tuple[int, int] = SIZE) -> RegionLook:
    """As if each region's words were attended to on its object, and places of one object to one another."""
    look = RegionLook(boxes, size)
    shown = covered(objects, size)
    look.words += shown
    kinds = torch.cat([shown, 1 - shown.amax(dim=1, keepdim=True)], dim=1).flatten(2)
    look.alike += kinds.transpose(1, 2) @ kinds
    return look


# --- where objects are -----------------------------------------------------------------------------------------------


def test_boxes_go_around_masks_and_empty_ones_are_empty():
    masks = torch.zeros(1, 3, 20, 40)
    masks[0, 0, 5:10, 8:20] = 0.8
    masks[0, 0, 0, 0] = 0.3  # less than half of the peak
    masks[0, 2] = 1
    expected = [[0.2, 0.25, 0.5, 0.5], [0, 0, 0, 0], [0, 0, 1, 1]]
    assert torch.allclose(boxes_around(masks), torch.tensor([expected]))


@pytest.mark.parametrize("size", [(16, 16), (24, 32)])
def test_objects_are_found_where_attention_has_them(size):
    boxes = torch.tensor([[(0.1, 0.2, 0.4, 0.7), (0.6, 0.3, 0.9, 0.8)]])
    objects = boxes + torch.tensor([(0.05, -0.12) * 2, (0.0, 0.1) * 2])
    found = look_that_sees(boxes, objects, size).found()
    assert (found - objects).abs().max() < 0.04
    assert (found - boxes).abs().max() > 0.08


def test_where_nothing_is_seen_the_region_itself_is_found():
    boxes = torch.tensor([[(0.1, 0.2, 0.4, 0.7), (0.0, 0.0, 0.0, 0.0)]])
    look = RegionLook(boxes, SIZE)
    look.words += 1
    look.alike += 1
    assert (look.found() - boxes)[0, 0].abs().max() < 0.05


def test_a_look_adds_up_the_layers_of_its_size_alone():
    boxes, tokens = torch.tensor([[(0.1, 0.2, 0.4, 0.7)]]), torch.tensor([[[False, True, False]]])
    look = RegionLook(boxes, (2, 2))
    query, key = torch.randn(1, 2, 4, 8, generator=seeded(1)), torch.randn(1, 2, 3, 8, generator=seeded(2))
    look.add(query, key, 0.5, tokens)
    expected = (0.5 * query @ key.transpose(-1, -2)).softmax(-1).mean(1)[0, :, 1].view(2, 2)
    assert torch.allclose(look.words[0, 0], expected, atol=1e-6)
    look.add(torch.randn(1, 2, 16, 8), key, 0.5, tokens)
    look.add(torch.randn(1, 2, 16, 8), torch.randn(1, 2, 16, 8), 0.5, None)
    assert torch.allclose(look.words[0, 0], expected, atol=1e-6)
    assert look.alike.abs().max() == 0


def test_keys_without_a_token_are_not_looked_at():
    boxes, tokens = torch.tensor([[(0.1, 0.2, 0.4, 0.7)]]), torch.tensor([[[False, True, False, False, False]]])
    query, key = torch.randn(1, 2, 4, 8, generator=seeded(1)), torch.randn(1, 2, 5, 8, generator=seeded(2))
    some, all_there = RegionLook(boxes, (2, 2)), RegionLook(boxes, (2, 2))
    some.add(query, key, 0.5, tokens, torch.tensor([[False, False, False, True, True]]))
    all_there.add(query, key[:, :, :3], 0.5, tokens[..., :3])
    assert torch.allclose(some.words, all_there.words, atol=1e-6)


@pytest.mark.parametrize("is_cross", [False, True])
def test_a_look_at_a_large_layer_holds_one_head_at_once(is_cross):
    """Of SDXL's shape."""
    places, heads = 1024, 20
    boxes = torch.tensor([[(0.1, 0.2, 0.4, 0.7)]])
    query, key = (torch.randn(1, heads, places, 64, generator=seeded(n)) for n in (1, 2))
    tokens = None
    if is_cross:
        key, tokens = key[:, :, :77], (torch.arange(77) == 5).view(1, 1, 77)
    look = RegionLook(boxes, (32, 32))
    with Watch() as watch:
        look.add(query, key, 0.125, tokens)
    assert watch.largest <= max(places**2, query.numel())
    expected = (0.125 * query @ key.transpose(-1, -2)).softmax(-1).mean(1)
    if is_cross:
        assert torch.allclose(look.words[0, 0].flatten(), expected[0, :, 5], rtol=1e-4, atol=1e-7)
    else:
        assert torch.allclose(look.alike, expected, rtol=1e-4, atol=1e-7)


# --- moving them -----------------------------------------------------------------------------------------------------


def mover_that_sees(objects: torch.Tensor, boxes: torch.Tensor) -> RegionMover:
    mover = RegionMover(torch.zeros(*boxes.shape[:2], 4, 4), None, (0.5,))
    mover.seen = look_that_sees(boxes, objects)
    return mover


def test_an_object_is_lifted_off_its_background_and_set_down():
    boxes = torch.tensor([[(0.25, 0.25, 0.625, 0.625)]])
    objects = boxes + torch.tensor((0.0, 0.125) * 2)
    x0 = 1 + 4 * covered(objects, SIZE).expand(1, 4, -1, -1)
    signal, level = torch.tensor(0.8), torch.tensor(0.6)
    before = signal * x0 + level * torch.randn(1, 4, *SIZE, generator=seeded(3))
    after = mover_that_sees(objects, boxes).move(before, x0, signal, level, seeded(4))
    left, right, top, bottom = 4, 10, 4, 10
    inside = (after[..., top:bottom, left:right] / signal).mean()
    below = (after[..., bottom, left:right] / signal).mean()
    assert inside == pytest.approx(5, abs=0.4)
    assert below == pytest.approx(1, abs=0.8)
    changed = (after != before).any(dim=1)[0]
    assert not changed[:3].any() and not changed[13:].any() and not changed[:, :3].any() and not changed[:, 11:].any()
    noise = (after - signal * x0) / level
    assert noise[..., changed].std() > 0.5


def test_an_object_that_is_far_too_large_is_set_down_smaller():
    boxes = torch.tensor([[(0.3125, 0.3125, 0.625, 0.625)]])
    objects = torch.tensor([[(0.1875, 0.1875, 0.75, 0.75)]])
    x0 = 1 + 4 * covered(objects, SIZE).expand(1, 4, -1, -1)
    x0[..., 5:9, 5:9] = 3  # its middle
    signal, level = torch.tensor(0.8), torch.tensor(1e-3)
    after = mover_that_sees(objects, boxes).move(signal * x0, x0, signal, level, seeded(4)) / signal
    assert after[..., 7, 5:10].amax() == pytest.approx(5, abs=0.6)
    assert after[..., 7, 7].mean() == pytest.approx(3, abs=0.6)
    assert after[..., 4:11, 3].mean() == pytest.approx(1, abs=1)


@pytest.mark.parametrize(
    "found, expected",
    [
        ((0.33, 0.2, 0.57, 0.6), (0.35, 0.15, 0.55, 0.65)),  # 1.2 times as wide as its goal, and not so high
        ((0.3, 0.1, 0.7, 0.6), (0.3, -0.15, 0.7, 0.85)),  # twice as wide: all of it has to be half as large
    ],
)
def test_objects_keep_their_shape_and_where_they_have_room_their_size(found, expected):
    goals = torch.tensor([[(0.25, 0.25, 0.45, 0.75)]])
    assert torch.allclose(_of_its_goals_shape(torch.tensor([[found]]), goals), torch.tensor([[expected]]), atol=1e-6)


def test_a_neighbour_that_stays_and_a_region_in_front_are_left_alone():
    boxes = torch.tensor([[(0.0, 0.25, 0.5, 0.75), (0.5, 0.25, 1.0, 0.75), (0.125, 0.375, 0.25, 0.5)]])
    found = boxes.clone()
    found[0, 0] += torch.tensor((0.125, 0.0) * 2)  # the first reaches into the second, the third stands in front of it
    x0 = torch.rand(1, 4, *SIZE, generator=seeded(5))
    moved, changed = _set_down(x0, boxes, found, torch.tensor([[True, False, False]]), boxes)
    for box in boxes[0, 1:]:
        there = covered(box[None, None], SIZE)[0, 0] == 1
        assert torch.equal(moved[..., there], x0[..., there]) and not changed[0, 0][there].any()
    assert changed[0, 0, 5:11, 3:8].any()


def test_a_place_far_from_all_background_is_filled_with_it():
    outside = torch.zeros(1, 1, *SIZE)
    outside[:, :, 0] = 1
    assert torch.allclose(_background(3 * torch.ones(1, 4, *SIZE), outside), 3 * torch.ones(1, 4, *SIZE), atol=1e-3)
    assert _background(torch.ones(1, 4, *SIZE), torch.zeros(1, 1, *SIZE)).isfinite().all()


@pytest.mark.parametrize(
    "box", [(0.3, 0.6, 0.7, 1.0), (0.3, 0.7, 0.6, 1.0), (0.0, 0.5, 0.4, 1.0), (0.3, 0.0, 0.7, 0.4)]
)
def test_what_stands_in_its_region_at_the_edge_of_the_picture_stays(box):
    boxes = torch.tensor([[box]])
    before = torch.randn(1, 4, *SIZE, generator=seeded(6))
    after = mover_that_sees(boxes, boxes).move(before, before, torch.tensor(0.8), torch.tensor(0.6), None)
    assert after is before


def test_what_does_not_guide_now_is_no_background():
    boxes = torch.tensor([[(0.1, 0.2, 0.4, 0.7), (0.0, 0.0, 0.0, 0.0)]])
    regions = torch.tensor([[(0.1, 0.2, 0.4, 0.7), (0.6, 0.2, 0.9, 0.7)]])
    ended = covered(regions, SIZE)[0, 1] == 1
    assert RegionLook(boxes, SIZE).outside[0][ended].all()
    look = RegionLook(boxes, SIZE, regions)
    assert not look.outside[0][ended].any() and not look.evidence(boxes)[0, 0][ended].any()


def test_objects_are_moved_under_autocast(sd1_pipe):
    with torch.autocast("cpu", torch.bfloat16):
        assert sample(sd1_pipe, layout=LAYOUT, moves=(0.2, 0.5)).isfinite().all()


def test_what_stands_in_its_region_stays_bit_for_bit():
    boxes = torch.tensor([[(0.25, 0.25, 0.625, 0.625)]])
    mover, before = mover_that_sees(boxes, boxes), torch.randn(1, 4, *SIZE)
    after = mover.move(before, torch.randn(1, 4, *SIZE), torch.tensor(0.8), torch.tensor(0.6), None)
    assert after is before
    assert mover.move(before, before, torch.tensor(0.8), torch.tensor(0.6), None) is before  # nothing was looked at


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_move_keeps_the_dtype_and_does_not_depend_on_the_batch(dtype):
    boxes = torch.tensor([[(0.25, 0.25, 0.625, 0.625)]]).repeat(3, 1, 1)
    objects = boxes + torch.tensor([(0.0, 0.125), (0.0, 0.0), (0.08, 0.1)]).repeat(1, 2)[:, None]
    before, x0 = (torch.randn(3, 4, *SIZE, generator=seeded(seed)).to(dtype) for seed in (1, 2))
    levels = torch.tensor(0.8), torch.tensor(0.6)
    together = mover_that_sees(objects, boxes).move(before, x0, *levels, [seeded(n) for n in range(3)])
    assert together.dtype == dtype and together.isfinite().all()
    assert torch.equal(together[1], before[1])
    alone = mover_that_sees(objects[2:], boxes[2:]).move(before[2:], x0[2:], *levels, [seeded(2)])
    assert torch.allclose(together[2:].float(), alone.float(), atol=1e-2)
    assert not torch.equal(together[2], before[2])


class Seen:
    """In place of a mover: what it is given."""

    at = (0.3,)

    def start(self, num_steps):
        self.num_steps, self.step, self.moves = num_steps, 0, []

    def looks_at(self):
        return self.step == 3

    def go_on(self):
        self.step += 1

    def move(self, sample, predicted, signal, level, generator):
        self.moves.append((sample - signal * predicted) / level)
        return sample


@pytest.mark.parametrize("recurrence", [1, 2])
@pytest.mark.parametrize(
    "kind",
    [DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler, EulerAncestralDiscreteScheduler, LMSDiscreteScheduler],
)
def test_a_mover_is_told_how_much_noise_the_sample_holds(kind, recurrence):
    """A perfect denoiser: what is left of the sample has a spread of 1, once, after the last visit of the step."""
    mover = Seen()
    scheduler = RecurrentScheduler(kind(), recurrence, None, seeded(), mover)
    scheduler.set_timesteps(10)
    picture = torch.full((1, 4, 64, 64), 0.5)
    x = torch.randn(picture.shape, generator=seeded(1)) * scheduler.init_noise_sigma
    more = {} if kind is LMSDiscreteScheduler else {"generator": seeded(2)}
    for timestep in scheduler.timesteps:
        scheduler.scale_model_input(x, timestep)
        alpha = scheduler.alphas_cumprod[int(timestep)]
        signal, level = alpha.sqrt(), (1 - alpha).sqrt()
        if hasattr(scheduler, "sigmas"):
            signal, level = 1, scheduler.sigmas[scheduler.step_index]
        x = scheduler.step((x - signal * picture) / level, timestep, x, **more)[0]
    assert mover.num_steps == 10
    (noise,) = mover.moves
    assert float(noise.std()) == pytest.approx(1, abs=0.05)
    assert float(noise.mean()) == pytest.approx(0, abs=0.1)


# --- when ------------------------------------------------------------------------------------------------------------


def test_moves_are_after_the_steps_during_which_their_shares_lie_behind():
    assert steps_of_moves((0.15, 0.3, 0.45), 20) == {3, 6, 9}  # three, six and nine lie behind
    assert steps_of_moves((0.15,), 25) == {3}
    assert steps_of_moves((0, 0.89, 0.9, 0.99), 10) == {0, 8}
    assert steps_of_moves((0.15,), 9) == set()
    assert steps_of_moves((0.9999999999,), 20) == set()  # of a last step, none after it
    with pytest.raises(ValueError, match="during the last of 20 steps"):
        check_moves((0.9999999999,), 20)
    for moves, num_steps in (((), 1), ((0.15, 0.89), 10)):
        check_moves(moves, num_steps)


@pytest.mark.parametrize("recurrence", [1, 3])
@pytest.mark.parametrize("kind", [DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler, LMSDiscreteScheduler])
def test_steps_are_counted_at_their_last_visit(kind, recurrence):
    class Recorder(RegionMover):
        def move(self, sample, *_):
            moved.append(last)
            return sample

    moved, looked = [], []
    mover = Recorder(torch.zeros(1, 1, 4, 4), None, (0.3, 0.7))
    scheduler = RecurrentScheduler(kind(), recurrence, 4, seeded(), mover)
    for _ in range(2):  # runs
        moved.clear(), looked.clear()
        scheduler.set_timesteps(10)
        plain = scheduler._scheduler.timesteps.tolist()
        x = torch.randn(1, 4, 8, 8, generator=seeded(1))
        for timestep in scheduler.timesteps:
            last = plain.index(float(timestep))
            looked += [last] if mover.looks_at() else []
            x = scheduler.step(x, timestep, scheduler.scale_model_input(x, timestep))[0]
        assert moved == [3, 7]
        assert looked == [3] * recurrence + [7]


# --- in a pipeline ---------------------------------------------------------------------------------------------------


def test_moves_change_the_picture_with_no_further_call_and_leave_the_unet_as_it_was(pipe):
    processors, scheduler, calls = dict(pipe.unet.attn_processors), pipe.scheduler, []
    hook = pipe.unet.register_forward_hook(lambda *_: calls.append(1))
    moved = sample(pipe, layout=LAYOUT)
    assert len(calls) == 10
    still = sample(pipe, layout=LAYOUT, moves=())
    hook.remove()
    assert moved.isfinite().all() and not torch.equal(moved, still)
    assert pipe.scheduler is scheduler and dict(pipe.unet.attn_processors) == processors
    without = uses_own_summaries(uses_own_words(lambda layer: multisubject(layer)))  # a method that moves nothing
    assert torch.equal(sample(pipe, layout=LAYOUT, guidance_method=without), still)
    assert torch.equal(sample(pipe, layout=LAYOUT, moves=(0.15, 0.3, 0.45)), moved)


@pytest.mark.parametrize("arguments", [{}, {"layout": {}}, {"layout": LAYOUT, "num_inference_steps": 9},
                                       {"layout": LAYOUT, "guidance_steps": 1}])  # fmt: skip
def test_nothing_moves_without_a_layout_in_short_runs_and_unguided_steps(pipe, arguments, recwarn, caplog):
    expected = sample(pipe, **arguments, moves=())
    recwarn.clear(), caplog.clear()
    assert torch.equal(sample(pipe, **arguments), expected)
    said = [str(warning.message) for warning in recwarn.list] + [record.getMessage() for record in caplog.records]
    assert not [text for text in said if "moves" in text]  # nobody has asked for it
    if "num_inference_steps" not in arguments:
        assert torch.equal(sample(pipe, **arguments, moves=(0.2,)), expected)


@pytest.mark.parametrize("arguments", [{}, {"layout": LAYOUT, "guidance_steps": 0}])
def test_moves_are_not_compared_with_the_steps_where_no_layout_is_followed(sd1_pipe, arguments):
    sample(sd1_pipe, **arguments, moves=(0.15, 0.99), num_inference_steps=3)
    sd1_pipe.scheduler = DPMSolverMultistepScheduler.from_config(sd1_pipe.scheduler.config)
    sample(sd1_pipe, **arguments, moves=(0.15,))


def test_a_scheduler_says_how_many_steps_there_are_of_given_sigmas(sd1_pipe):
    """Euler takes one fewer."""
    sd1_pipe.scheduler = EulerDiscreteScheduler.from_config(sd1_pipe.scheduler.config)
    sigmas = [14.0, 10, 7, 5, 4, 3, 2, 1.5, 1, 0.5, 0]
    moved = sample(sd1_pipe, layout=LAYOUT, moves=(0.89,), sigmas=sigmas)
    assert not torch.equal(moved, sample(sd1_pipe, layout=LAYOUT, moves=(), sigmas=sigmas))
    with pytest.raises(ValueError, match=r"0.9 is during the last of 10 steps"):
        sample(sd1_pipe, layout=LAYOUT, moves=(0.9,), sigmas=sigmas)
    with pytest.raises(ValueError, match="the run has 9 steps"):
        sample(sd1_pipe, layout=LAYOUT, moves=(0.2,), sigmas=sigmas[1:])


@pytest.mark.parametrize(
    "moves, arguments, named",
    [
        (
            (0.2, 0.99),
            {},
            r"`moves` is \[0.2, 0.99\], but 0.99 is during the last of 10 steps, .* less than 0.9\.",
        ),
        ((0.9,), {}, r"0.9 is during the last of 10 steps"),
        (
            (0.2,),
            {"num_inference_steps": 9},
            r"`moves` is \[0.2\], but the run has 9 steps, expected at least 10.*\[\]",
        ),
        ((0.2,), {"timesteps": [900, 500, 100]}, r"the run has 3 steps, expected at least 10"),
    ],
)
def test_moves_that_would_do_nothing_raise_before_the_first_step(sd1_pipe, moves, arguments, named):
    scheduler = sd1_pipe.scheduler = EulerDiscreteScheduler.from_config(sd1_pipe.scheduler.config)
    calls = []
    hook = sd1_pipe.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(ValueError, match=named):
        sample(sd1_pipe, layout=LAYOUT, moves=moves, **arguments)
    hook.remove()
    assert not calls and sd1_pipe.scheduler is scheduler


def test_schedulers_that_build_on_former_steps_move_nothing_unless_asked(sd1_pipe):
    sd1_pipe.scheduler = DPMSolverMultistepScheduler.from_config(sd1_pipe.scheduler.config)
    assert torch.equal(sample(sd1_pipe, layout=LAYOUT), sample(sd1_pipe, layout=LAYOUT, moves=()))
    with pytest.raises(
        ValueError, match=r"`moves` is \[0.3\], but DPMSolverMultistepScheduler cannot .* give \[\] to move"
    ):
        sample(sd1_pipe, layout=LAYOUT, moves=[0.3])
    sd1_pipe.scheduler = LMSDiscreteScheduler.from_config(sd1_pipe.scheduler.config)
    assert torch.equal(sample(sd1_pipe, layout=LAYOUT), sample(sd1_pipe, layout=LAYOUT, moves=()))
    assert not torch.equal(sample(sd1_pipe, layout=LAYOUT, moves=(0.3,)), sample(sd1_pipe, layout=LAYOUT, moves=()))


@pytest.mark.parametrize("moves", [0.3, (1.0,), (-0.1,), ("a",), (True,), "0.3"])
def test_wrong_moves_raise(sd1_pipe, moves):
    with pytest.raises(
        ValueError, match=r"`moves` is .*, expected shares of the steps, from 0 to less than 1, such as"
    ):
        sample(sd1_pipe, layout=LAYOUT, moves=moves)


def test_a_picture_does_not_depend_on_its_batch(sd1_pipe):
    generators = [seeded(5), seeded(6), seeded(7)]
    layouts = [LAYOUT, None, {"blue ball": (0.3, 0.3, 0.7, 0.6)}]
    together = sample(sd1_pipe, [PROMPT] * 3, layout=layouts, generator=generators)
    for index, layout in enumerate(layouts):
        alone = sample(sd1_pipe, layout=layout, generator=seeded(5 + index))
        assert torch.allclose(together[index], alone[0], atol=2e-2)
    assert not torch.allclose(together[0], sample(sd1_pipe, layout=LAYOUT, generator=seeded(5), moves=())[0], atol=2e-2)


def test_recorded_attention_is_that_of_the_calls_also_where_they_are_looked_at(sd1_pipe):
    output = sd1_pipe(PROMPT, layout=LAYOUT, num_inference_steps=10, output_type="latent", generator=seeded(),
                      output_attention_maps=True)  # fmt: skip
    assert torch.equal(output.images, sample(sd1_pipe, layout=LAYOUT))
    assert len(output.attention_maps[0]["red dog"]) == 10


@pytest.mark.parametrize("recurrence", [1, 2])
def test_the_scheduler_comes_back_after_an_interrupt_and_moves_begin_anew(sd1_pipe, recurrence):
    scheduler, expected = sd1_pipe.scheduler, sample(sd1_pipe, layout=LAYOUT, recurrence=recurrence, recurrence_steps=2)

    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample(sd1_pipe, layout=LAYOUT, callback_on_step_end=stop)
    assert sd1_pipe.scheduler is scheduler
    again = sample(sd1_pipe, layout=LAYOUT, recurrence=recurrence, recurrence_steps=2)
    assert torch.equal(again, expected)


def test_objects_stand_more_exactly_in_their_boxes():
    """On the embedded base, whose judge says where they are."""
    base, judge = DrawnBase.read(EMBEDDED_BASE), Judge.load()
    tasks, pipe = draw_tasks("described 2", 8, 3, base.world), base.load()

    def overlaps(**arguments: Any) -> np.ndarray:
        pictures = pipe(
            [task.prompt for task in tasks],
            layout=[task.layout for task in tasks],
            num_inference_steps=16,
            guidance_scale=5.0,
            generator=[seeded(task.seed) for task in tasks],
            **arguments,
        ).images
        return np.array([score_picture(judge, *pair)["ious"] for pair in zip(tasks, pictures, strict=True)])

    moved, still = overlaps(), overlaps(moves=())
    assert moved.mean() > still.mean() + 0.05
