"""What a page is about: a run by its folder, or a study by its folder, its file or its name."""

from pathlib import Path

from dia_diffusion.errors import InputError
from dia_diffusion.io import shipped_names
from dia_diffusion.report.page import Page
from dia_diffusion.report.run import run_page
from dia_diffusion.report.study import study_page
from dia_diffusion.sweeps.sweep import STUDY_FILE, read_study, study_path
from dia_diffusion.training.run_folder import RunFolder


def page_of(subject: str) -> tuple[Page, Path]:
    """The page of a run or a study, and its folder.

    Raises:
        InputError: neither a run nor a study, a study of which nothing is there yet, or one whose files can't be read.
    """
    if RunFolder(subject).config.is_file():
        return run_page(Path(subject)), Path(subject)
    try:
        study_path(subject)
    except InputError:
        names = ", ".join(shipped_names("curves"))
        raise InputError(
            f"{subject} is no run's folder, which has a config.yaml, nor a study's, which has a {STUDY_FILE}; accepted "
            f"besides: a study's YAML file, or one of {names}"
        ) from None
    study = read_study(subject)
    if not study.folder.is_dir():
        raise InputError(f"nothing of study {subject} is in {study.folder}; `dia-diffusion curves {subject}` makes it")
    return study_page(study), study.folder
