"""Every lesson runs in its quick mode, its checks hold, and its page is made of what the script says."""

import builtins
import re
import runpy
import sys
from pathlib import Path

import matplotlib
import pytest
from lesson import Lesson

matplotlib.use("agg")
LESSONS = Path(__file__).parent.parent / "lessons"


def look_01(got):
    assert (got["codes"] - got["library"]).abs().max() < 1e-4  # ISTA by hand and fista find the same codes
    restart = got["fista"](got["signals"], got["atoms"], got["lam"], max_iter=40, tol=1e-3)  # warns if it's not enough
    assert got["lasso_objective"](got["signals"], restart, got["atoms"], got["lam"]) < got["fast"] * (1 + 1e-4)
    assert got["needed"]["learned"] < 0.6 * got["needed"]["random"]


def look_02(got):
    assert (got["mixed"]["trained: σ(X W_s)"] != 0).sum(-1).eq(2).all()  # top-2, whatever else is printed
    chosen = (got["mixed"]["fresh: σ(X W_s)"] != 0).any(1)  # (B, M): by any token
    assert ((got["mixed"]["fresh: A σ(X W_s)"] != 0) == chosen[:, None]).all()


def look_03(got):
    assert got["new_error"]["soft", "atoms"] < 0.3 * got["new_error"]["soft", "coefficients"]
    assert got["needed"]["soft threshold"] < got["needed"]["dense"]
    assert abs(got["cosine"]["dense"] - got["cosine"]["chance"]) < 0.1  # mixtures, as chance has them


def look_04(got):
    assert got["flipped"][0] == got["no_sigma"][0] == 0  # without atoms it is the model that draws an 8
    assert got["flipped"][12] > got["at_random"] + 0.3 and got["flipped"][12] > got["no_sigma"][12] + 0.3
    assert got["half"](got["flipped"]) < got["half"](got["no_sigma"])


def look_05(got):
    assert got["first"].shape == got["noise"].shape and got["same"]
    assert got["right"] < got["nothing"] < got["wrong"]
    assert got["attention"].sum(dim=1).allclose(got["torch"].ones(64), atol=1e-4)  # rows of A


def look_06(got):
    assert got["kept"]["all"] > got["kept"][0]
    assert not got["drawn"][0].equal(got["drawn"]["all"])
    assert got["picks"].count_nonzero() == 5 * 64


def look_07(got):
    assert set(got["scores"]) == {"base model", *got["methods"]} and len(got["edits"]) == 5
    assert got["pictures"].keys() == set(got["prompts"])
    assert len({images[0].tobytes() for images in got["drawn"].values()}) == 5  # every adapter draws its own picture


def look_08(got):
    assert got["by_hand"][0] == pytest.approx(got["scores"]["M 256, ρ 0.2"][0], abs=1e-6)  # alignment of the last run
    assert len({images[0].tobytes() for images in got["drawn"].values()}) == 8  # every model draws its own picture


def look_09(got):
    assert len(got["changes"]["sparse"]) == len(got["whole"]["sparse"]) == got["model"].config.num_layers
    assert all(change.abs().max() > 0.01 for change in got["changes"]["sparse"])  # no block is silent


LOOKS = {
    "01_ista_fista": look_01,
    "02_attention_as_dictionary": look_02,
    "03_fourier_toy": look_03,
    "04_mnist_vae": look_04,
    "05_pixart": look_05,
    "06_finetune": look_06,
    "07_editing": look_07,
    "08_customization": look_08,
    "09_influence": look_09,
}


def run(script, monkeypatch, figures):
    """The variables of a lesson that has run in quick mode."""
    monkeypatch.setattr(sys, "argv", [str(script), "--quick", "--figures", str(figures)])
    return runpy.run_path(str(script))


@pytest.mark.parametrize("name", LOOKS)
def test_lesson_as_a_document(name, monkeypatch, tmp_path):
    got = run(LESSONS / f"{name}.py", monkeypatch, tmp_path)
    assert got["lesson"].passed and all(got["lesson"].passed.values())
    LOOKS[name](got)
    drawn = {file.name for file in tmp_path.iterdir()}
    assert min(file.stat().st_size for file in tmp_path.iterdir()) > 5000  # not an empty picture
    page = (LESSONS / "pages" / f"{name}.md").read_text(encoding="utf-8")
    assert drawn == set(re.findall(r"]\(\.\./figures/(.*?)\)", page))
    assert all((LESSONS / "figures" / figure).exists() for figure in drawn)


@pytest.mark.parametrize("name", LOOKS)
def test_a_page_says_what_its_script_says(name):
    script = (LESSONS / f"{name}.py").read_text(encoding="utf-8")
    page = (LESSONS / "pages" / f"{name}.md").read_text(encoding="utf-8")
    cells = re.split(r"^# %%", script, flags=re.M)[1:]
    code = [cell.strip() for cell in cells if not cell.startswith(" [markdown]")]
    told = [cell.partition("\n")[2] for cell in cells if cell.startswith(" [markdown]")]
    assert code == [block.strip() for block in re.findall(r"^```python\n(.*?)^```", page, flags=re.M | re.S)]
    place = 0
    for cell in told:
        text = re.sub(r"^# ?", "", cell, flags=re.M).strip()
        place = page.find(text.replace("](figures/", "](../figures/"), place)
        assert place >= 0, text


@pytest.mark.parametrize("name", LOOKS)
def test_a_lesson_is_short(name):
    script = (LESSONS / f"{name}.py").read_text(encoding="utf-8")
    lines = [line for line in script.splitlines() if line.strip() and not line.startswith("#")]
    assert len(lines) <= 150


def test_a_wrong_number_fails_a_lesson(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "argv", ["lesson", "--figures", str(tmp_path)])
    lesson = Lesson()
    lesson.check("atoms only: NMSE", 0.057, (0.03, 0.10), quick=(1, 2), paper="fits")
    assert capsys.readouterr().out == "✓ atoms only: NMSE 0.057 (expected 0.03 to 0.1; the paper: fits)\n"
    lesson.end()
    lesson.check("coefficients only: NMSE", 0.5, (0.9, 1))
    lesson.check("not a number", float("nan"), (0, 1))
    with pytest.raises(SystemExit, match="2 of 3 checks failed: coefficients only: NMSE, not a number"):
        lesson.end()


def test_quick_has_a_range_of_its_own(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "argv", ["lesson", "--quick", "--figures", str(tmp_path)])
    lesson = Lesson()
    lesson.check("flipped", 0.5, (0.8, 1), quick=(0.4, 0.6), form=".0%")
    assert capsys.readouterr().out == "✓ flipped 50% (expected 40% to 60%)\n"


def test_figures_that_cannot_be_a_folder_are_refused_in_one_line(monkeypatch, tmp_path, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setattr(sys, "argv", ["lesson", "--figures", str(tmp_path / "file")])
    with pytest.raises(SystemExit, match="2"):
        Lesson()
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--figures" in error and "choose another" in error


def test_in_a_notebook_the_arguments_are_those_of_the_kernel(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py", "-f", "kernel.json"])
    monkeypatch.setattr(builtins, "__IPYTHON__", True, raising=False)
    monkeypatch.setattr("lesson.RUNS", tmp_path)
    lesson = Lesson()
    assert not lesson.quick and lesson.figures == tmp_path


def test_no_lesson_is_left_out():
    assert {file.stem for file in LESSONS.glob("[0-9]*.py")} == set(LOOKS)
