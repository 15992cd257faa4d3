"""Every lesson runs in its quick mode, keeps the bars that its text promises, and draws its figures."""

import importlib.util
from pathlib import Path

import matplotlib
import pytest

matplotlib.use("agg")
LESSONS = Path(__file__).parent.parent / "lessons"


def check_05(got):
    assert got["step_difference"] < 1e-4
    assert got["same_picture"]
    assert got["samplers_db"] > 30
    assert got["error_right"] < 0.5 * got["error_without"] < 0.25 * got["error_wrong"]
    assert max(got["focus"][1:]) > 3  # somewhere the star's patches read 'star'


def check_06(got):
    assert got["silent"] and got["same_as_base"]
    assert got["parameters"] == (128 + 128) * 256
    assert got["difference"] < 1e-4
    assert got["chosen"] == pytest.approx(5 / 256)
    assert got["mixed"] > got["chosen"]
    assert got["loss_last"] < 0.5 * got["loss_first"]
    assert got["psnr"]["all"] > 16 > 14 > got["psnr"][0]  # 20.6 and 12.5 dB in full
    assert sum(got["blocks"]) == pytest.approx(1)


CHECKS = {
    "05_pixart": (check_05, {"05_denoising.png", "05_cross_attention.png"}),
    "06_finetune": (check_06, {"06_atoms.png", "06_importance.png"}),
}


def load(name):
    spec = importlib.util.spec_from_file_location(f"lesson_{name}", LESSONS / f"{name}.py")
    lesson = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(lesson)
    return lesson


@pytest.mark.parametrize("name", CHECKS)
def test_lesson(name, tmp_path):
    check, figures = CHECKS[name]
    check(load(name).main(quick=True, figures=tmp_path))
    assert {file.name for file in tmp_path.iterdir()} == figures
    assert min(file.stat().st_size for file in tmp_path.iterdir()) > 5000  # not an empty page


def test_no_lesson_is_left_out():
    assert {file.stem for file in LESSONS.glob("[0-9]*.py")} == set(CHECKS)
