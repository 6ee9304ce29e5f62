"""The speed benchmark: what it compares, and what it refuses."""

import sys

import pytest
import torch

from multisubject.benchmarks import speed


@pytest.mark.parametrize(("model", "parameters"), [("sd15", 859_520_964), ("sdxl", 2_567_463_684)])
def test_its_unets_have_the_released_models_shapes(model, parameters):
    with torch.device("meta"):
        unet = speed.random_unet(model)
    assert sum(weight.numel() for weight in unet.parameters()) == parameters


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["speed.py", *arguments])
    with pytest.raises(SystemExit) as stopped:
        speed.main()
    return stopped.value.code


def test_the_released_size_is_refused_on_a_cpu(monkeypatch, capsys):
    assert run(monkeypatch, "--model", "sdxl") == 2
    assert "10 GB in float32; expected a GPU" in capsys.readouterr().err


def test_the_thin_one_is_compared_there(monkeypatch, capsys):
    code = run(monkeypatch, "--model", "sdxl-tiny", "--pairs", "1", "--steps", "1", "--sdxl_latents", "8")
    (row,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| SDXL's")]
    assert code in (0, 1) and "latents 8 x 8 | multisubject | 1 |" in row


def test_loras_in_regions_are_compared_with_the_same_everywhere(monkeypatch, capsys):
    code = run(monkeypatch, "--model", "embedded", "--loras", "--pairs", "1", "--steps", "1")
    out = capsys.readouterr().out
    assert code in (0, 1) and "| embedded base, latents 16 x 16 | multisubject | 1 |" in out
    assert "within 1.1 of the time" in out
    assert run(monkeypatch, "--model", "sd15", "--loras") == 2
    assert "--loras are of the embedded base" in capsys.readouterr().err
