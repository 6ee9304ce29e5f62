"""The trainer's `--progress_file`, for programs that watch a run."""

import json
import shutil
import time

import pytest

from multisubject.train_residual import main as train_main
from multisubject.training.progress import ProgressFile, thinned


def test_the_curve_is_thinned_to_means():
    assert thinned([]) == []
    assert thinned([3.0, 1.0, 2.0]) == [[1, 3.0], [2, 1.0], [3, 2.0]]
    assert thinned([3.0, 1.0, 2.0], points=2) == [[2, 2.0], [3, 2.0]]
    assert len(thinned([1.0] * 4001)) <= 200 and thinned([1.0] * 4001)[-1] == [4001, 1.0]


def test_the_progress_file_says_how_a_run_ended(tmp_path, monkeypatch):
    path = tmp_path / "progress.json"
    progress_file = ProgressFile(str(path))
    with pytest.raises(OSError, match="full"), progress_file.outcome():
        assert json.loads(path.read_text())["phase"] == "loading"
        progress_file.tell("training", subject="rex", step=2, of=9, losses=[3.0, 1.0])
        raise OSError("full")
    told = json.loads(path.read_text())
    assert abs(told.pop("time") - time.time()) < 60
    curve = [[1, 3.0], [2, 1.0]]
    assert told == {
        "phase": "failed", "subject": "rex", "step": 2, "of": 9, "loss": 2.0, "curve": curve, "message": "full",
    }  # fmt: skip
    assert [*tmp_path.iterdir()] == [path]


def test_a_progress_file_that_cannot_be_written_any_more_is_told_of_once(tmp_path, caplog):
    folder = tmp_path / "gone"
    folder.mkdir()
    progress_file = ProgressFile(str(folder / "progress.json"))
    with progress_file.outcome():
        shutil.rmtree(folder)
        folder.touch()
        for step in (1, 2):
            progress_file.tell("training", subject="rex", step=step, of=step, losses=[1.0] * step)
    assert len(caplog.messages) == 1 and "the run goes on without" in caplog.messages[0]


def test_of_several_processes_the_first_one_writes_the_progress_file(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with ProgressFile(str(tmp_path / "progress.json")).outcome():
        pass
    assert not [*tmp_path.iterdir()]


def test_the_trainer_refuses_a_progress_file_in_no_folder(tmp_path, caplog):
    with pytest.raises(SystemExit):
        train_main(["--progress_file", str(tmp_path / "nowhere" / "p.json")])


def test_a_refused_run_says_why_in_its_progress_file(tmp_path):
    path = tmp_path / "progress.json"
    assert train_main(["--progress_file", str(path), "--output_dir", str(tmp_path / "run")]) == 1
    told = json.loads(path.read_text())
    assert told["phase"] == "failed" and "--instance_data_dir: missing" in told["message"]
