"""The names in a run's directory: one place for all of them, and no student among them."""

from __future__ import annotations

from pathlib import Path

import pytest

from duet.cache.errors import UserError
from duet.pipeline.config.load import load_config
from duet.pipeline.config.run_dir import RunDir, StudentDir

RUN = RunDir(Path())
PATHS = {name: path for name, path in vars(RUN).items() if name != "path"}


def test_every_folder_of_a_run_is_listed_as_one():
    """What has no ending, or has files in it, is a folder."""
    folders = {Path(path.parts[0]) for path in PATHS.values() if len(path.parts) > 1 or not path.suffix}
    assert folders == set(RUN.folders)
    assert len(set(PATHS.values())) == len(PATHS), "two names for one file"


@pytest.mark.parametrize("folder", RUN.folders, ids=str)
def test_no_student_has_the_name_of_a_folder_of_the_run(lab_config, folder):
    with pytest.raises(UserError, match=f"the name '{folder}' is taken by a folder of the run"):
        load_config(str(lab_config(students=[{"name": str(folder)}])))


def test_a_configs_files_lie_in_its_run_directory(lab_config, tmp_path):
    config = load_config(str(lab_config()))
    assert config.run.path == config.run_dir == tmp_path / "runs" / "lab"
    assert config.run.results == config.run_dir / "results.json"
    assert config.run.student("a.b").training == config.run_dir / "a.b" / "training.json"


def test_a_student_is_done_once_its_training_is_recorded(tmp_path):
    student = StudentDir(tmp_path)
    assert not student.is_done
    student.training.write_text("{}")
    assert student.is_done
