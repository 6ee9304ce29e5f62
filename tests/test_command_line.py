"""Every command ends a wrong command line in the same way, with what is wrong and no usage of many lines before it."""

import sys

import pytest

from multisubject import cli, evaluate, generate_images, train_residual
from multisubject.benchmarks import speed


def speed_main(arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["speed.py", *arguments])
        speed.main()


@pytest.mark.parametrize(
    ("main", "arguments", "wrong", "command"),
    [
        (cli.main, ["--nothing"], "COMMAND", "multisubject"),
        (cli.main, ["push", "rex.safetensors", "user/rex", "--nothing"], "--nothing", "multisubject"),
        (cli.main, ["push"], "USER/REPO", "multisubject push"),
        (evaluate.main, ["--pictures", "results", "--nothing"], "--nothing", "multisubject-evaluate"),
        (evaluate.main, [], "--pictures", "multisubject-evaluate"),
        (generate_images.main, ["--generation_config", "x.json", "--nothing"], "--nothing", "multisubject-generate"),
        (generate_images.main, [], "--generation_config", "multisubject-generate"),
        (train_residual.main, ["--nothing"], "--nothing", ""),
        (train_residual.main, ["--train_batch_size", "many"], "--train_batch_size", ""),
        (speed_main, ["--pairs", "many"], "--pairs", "speed.py"),
    ],
)
def test_a_wrong_command_line_ends_with_what_is_wrong(main, arguments, wrong, command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    out, err = capsys.readouterr()
    said, remedy = err.splitlines()
    assert stopped.value.code == 2 and not out
    assert said.startswith("error: ") and wrong in said
    assert remedy.startswith(f"See {command}") and remedy.endswith(" --help.")
