"""The arguments of a pipeline's methods: diffusers' and our own under one signature, and checked before work begins."""

from __future__ import annotations

import functools
import inspect
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from .layout import is_whole
from .move_times import EXPECTED, are_moves
from .region_ip_adapters import adapter_layers, check_encoder_width, reads_patches

if TYPE_CHECKING:
    from .subject_loader import EncoderSlot

__multisubject_version__ = "0.1.0"

_DEPRECATED = ("callback", "callback_steps")  # diffusers' pipelines still take them among their `**kwargs`
_Method = TypeVar("_Method", bound=Callable[..., Any])


# --- one signature ---------------------------------------------------------------------------------------------------


def joined(method: _Method, base: Callable[..., Any], **defaults: Any) -> _Method:
    """A method that passes `*args, **kwargs` on to a base class's method, as it should look from outside.

    Args:
        method: takes `*args`, arguments of its own by keyword, and `**kwargs`.
        base: what it passes them on to.
        defaults: of arguments for which the base has none.

    Returns:
        `method` whose signature and docstring also have the base's arguments, in the base's order and with its
        defaults and explanations, but for those that `method` explains itself.
    """

    @functools.wraps(method)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        return method(self, *args, **kwargs)

    def is_named(parameter: inspect.Parameter) -> bool:
        return parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)

    own = inspect.signature(method).parameters
    of_base = inspect.signature(base).parameters
    parameters = [
        parameter.replace(default=defaults.get(name, parameter.default))
        for name, parameter in of_base.items()
        if is_named(parameter)
    ]
    parameters += [parameter for name, parameter in own.items() if is_named(parameter) and name not in of_base]
    parameters += [parameter for parameter in of_base.values() if parameter.kind is parameter.VAR_KEYWORD]
    returned = inspect.signature(method).return_annotation
    wrapped.__signature__ = inspect.Signature(parameters, return_annotation=returned)  # type: ignore[attr-defined]

    doc = inspect.getdoc(method) or ""
    explained = _explanations(doc)
    further = [
        text
        for name, text in _explanations(inspect.getdoc(base) or "").items()
        if name in of_base and name not in explained
    ]
    head, args, tail = doc.partition("\nArgs:\n")
    before, gap, after = tail.partition("\n\n")
    wrapped.__doc__ = head + args + "\n".join([before, *further]) + gap + after
    return wrapped  # type: ignore[return-value]


def _explanations(doc: str) -> dict[str, str]:
    """Name -> what a docstring's `Args:` say of it, with its name, indented by four."""
    section = re.search(r"^( *)Args:\n((?:\1 +.*\n|\n)+)", doc, re.MULTILINE)
    found = re.split(r"^(?=(\w+) ?[(:])", textwrap.dedent(section[2]) if section else "", flags=re.MULTILINE)[1:]
    return {name: textwrap.indent(text.rstrip(), " " * 4) for name, text in zip(found[::2], found[1::2], strict=True)}


def bind_arguments(
    base: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    own: Callable[..., Any],
    **defaults: Any,
) -> dict[str, Any]:
    """The arguments of a base class's method by name, with their defaults.

    Args:
        base: the bound method that is going to be called with them.
        args, kwargs: what came for it.
        own: the method that they came to, whose arguments an error lists besides.
        defaults: of arguments for which the base has none.

    Raises:
        TypeError: an argument that neither knows, one too many, or a missing one.
    """
    signature = inspect.signature(base)
    takes_more = any(parameter.kind is parameter.VAR_KEYWORD for parameter in signature.parameters.values())
    if unknown := sorted(set(kwargs) - {*signature.parameters, *(_DEPRECATED if takes_more else ())}):
        known = {*signature.parameters, *inspect.signature(own).parameters} - {"self", "args", "kwargs"}
        raise TypeError(f"Unknown arguments {unknown}; expected some of {sorted(known)}.")
    parameters = [
        parameter.replace(default=defaults.get(name, parameter.default))
        for name, parameter in signature.parameters.items()
    ]
    bound = signature.replace(parameters=parameters).bind(*args, **kwargs)
    bound.apply_defaults()
    bound.arguments.update(bound.arguments.pop("kwargs", {}))  # the deprecated ones
    return bound.arguments


# --- checks ----------------------------------------------------------------------------------------------------------


def check_call(
    asked: Mapping[str, Any],
    pipeline: Any,
    guidance_steps: int | None,
    recurrence: int,
    recurrence_steps: int | None,
    moves: Sequence[float] | None,
) -> None:
    """Raise `ValueError` or `TypeError` for arguments of a call that diffusers would stumble over deep inside.

    Args:
        asked: diffusers' arguments by name.
        pipeline: the one that is called.
        guidance_steps, recurrence, recurrence_steps, moves: the call's own.
    """
    check_steps("guidance_steps", guidance_steps, "all steps")
    check_steps("recurrence_steps", recurrence_steps, "the guided steps")
    _check_count("recurrence", recurrence, "each step once")
    has_own_steps = any(asked.get(name) is not None for name in ("timesteps", "sigmas"))
    if asked["num_inference_steps"] is not None or not has_own_steps:
        _check_count("num_inference_steps", asked["num_inference_steps"], "50 are usual")
    if moves is not None and not are_moves(moves):
        raise ValueError(f"`moves` is {moves!r}, expected {EXPECTED}.")
    _check_count("num_images_per_prompt", asked["num_images_per_prompt"], "one picture")
    check_prompts(asked, pipeline.encoder_slots)
    for name in ("ip_adapter_image", "ip_adapter_image_embeds"):
        if asked.get(name) is None:
            continue
        if getattr(pipeline.unet.config, "encoder_hid_dim_type", None) != "ip_image_proj":
            raise ValueError(f"`{name}` needs an IP-Adapter, and none is loaded: call `pipe.load_ip_adapter(…)` first.")
        if name == "ip_adapter_image" and pipeline.image_encoder is None:
            raise ValueError(
                "`ip_adapter_image` needs an image encoder, and none is loaded: call `pipe.load_ip_adapter(…)` with"
                " `image_encoder_folder`, or pass `ip_adapter_image_embeds`."
            )
    if asked.get("ip_adapter_image") is not None:
        encoder = pipeline.image_encoder.config
        for adapter, layer in enumerate(adapter_layers(pipeline.unet) or ()):
            width = getattr(encoder, "hidden_size" if reads_patches(layer) else "projection_dim", None)
            if width is not None:
                check_encoder_width("`ip_adapter_image`", width, adapter, layer)
    _check_attention_arguments(asked["cross_attention_kwargs"], pipeline.unet)


def check_prompts(asked: Mapping[str, Any], slots: Sequence[EncoderSlot]) -> None:
    """Raise `TypeError` or `ValueError` unless what text encoders are to read is text."""
    for name in (name for slot in slots for name in slot.prompts):
        prompt = asked.get(name)
        first = asked.get("prompt")
        is_second = name != "prompt" and not name.startswith("negative")
        if is_second and isinstance(first, list) and prompt and isinstance(prompt, str):
            raise ValueError(f"`{name}` is one text, expected one for each of the {len(first)} prompts in `prompt`.")
        if prompt is None or isinstance(prompt, str):
            continue
        if not isinstance(prompt, list):
            raise TypeError(f"`{name}` is {prompt!r}, expected a text or a list of texts.")
        if not prompt:
            raise ValueError(f"`{name}` is an empty list, expected a text or a list of texts.")
        for text in prompt:
            if not isinstance(text, str):
                raise TypeError(f"`{name}` is a list with {text!r} in it, expected texts.")
        if name != "prompt" and first is not None and len(prompt) != len([first] if isinstance(first, str) else first):
            raise ValueError(f"`{name}` has {len(prompt)} texts, expected one for each of the prompts in `prompt`.")


def check_steps(name: str, steps: int | None, otherwise: str) -> None:
    """Raise `ValueError` unless `steps` is None, which means `otherwise`, or a whole number from 0."""
    if steps is not None and not is_whole(steps, at_least=0):
        raise ValueError(f"`{name}` is {steps!r}, expected a whole number of at least 0, or None for {otherwise}.")


def _check_count(name: str, count: Any, meaning: str) -> None:
    if not is_whole(count, at_least=1):
        raise ValueError(f"`{name}` is {count!r}, expected a whole number of at least 1 ({meaning}).")


def _check_attention_arguments(arguments: Any, unet: Any) -> None:
    """diffusers hands these to every attention processor, each of which warns of what it does not know."""
    if arguments is None:
        return
    if not isinstance(arguments, Mapping):
        raise TypeError(f"`cross_attention_kwargs` is {arguments!r}, expected a dict such as {{'scale': 0.8}}.")
    known = {"scale", "gligen", "ip_adapter_masks"}  # which the UNet takes out, or leaves alone
    for processor in {type(processor) for processor in unet.attn_processors.values()}:
        known |= set(inspect.signature(processor.__call__).parameters)
    known -= {"self", "attn", "hidden_states", "encoder_hidden_states", "attention_mask", "temb", "args", "kwargs"}
    if unknown := sorted(set(arguments) - known):
        raise ValueError(
            f"`cross_attention_kwargs` has {unknown}, expected some of {sorted(known)}, which the UNet's attention"
            " processors take. (A layout is given as `layout`.)"
        )
