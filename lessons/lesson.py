"""How a lesson is built, and the few things that every lesson needs.

A lesson is one file, `NN_name.py`, of cells: `# %% [markdown]` cells tell the story, `# %%` cells run. Nothing is in
a `main()`, so in VS Code or Jupyter a cell can be run, changed and run again; `python lessons/NN_name.py` runs all.
`python lessons/render.py NN` runs them too and writes the page `lessons/pages/NN_name.md` with output and figures.

The order is always the same: the question and the picture that answers it; the words one needs, each explained where it
first comes; the derivation; the naive lines beside the library's call; a prediction; the check; where it stops being
true; exercises with the answers folded away. At most 150 lines of code: a cell does one thing, a figure that takes more
than a few lines is a function in `draw.py`, and what others could use is in the library.

    from lesson import Lesson

    lesson = Lesson()                                                    # reads --quick and --figures
    steps = 80 if lesson.quick else 800
    lesson.table(("method", "steps"), [("ISTA", 900), ("FISTA", 90)])    # for more than three numbers
    lesson.check("atoms only: NMSE", error, (0.03, 0.10), quick=(0.03, 0.3), paper="fits")
    lesson.show(draw.valley(...), "01_valley", "two paths in a narrow valley")
    lesson.end()                                                         # the last cell: status 1 if a check failed

Each number that the prose states has its check beside it. In prose write `figures/01_valley.png` for a picture, `$…$`
for a formula, and no backslash before punctuation inside it, which GitHub would drop (`\\lVert` instead of `\\|`).
"""

import argparse
import builtins
import sys
from pathlib import Path

import matplotlib.pyplot as plt

RUNS = Path(__file__).parent.parent / "runs" / "lessons"


class Lesson:
    def __init__(self):
        parser = argparse.ArgumentParser(usage=argparse.SUPPRESS)  # errors of one line
        parser.add_argument("--quick", action="store_true", help="less training, for a check that everything runs")
        parser.add_argument("--figures", type=Path, default=RUNS, help="folder for the pictures (runs/lessons)")
        self.notebook = hasattr(builtins, "__IPYTHON__")  # there sys.argv is the kernel's own
        arguments = parser.parse_args([] if self.notebook else None)
        self.quick, self.figures = arguments.quick, arguments.figures
        self.passed = {}  # name of a check -> whether its number was in the range
        try:
            self.figures.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            parser.error(f"--figures {self.figures} cannot be a folder ({error.strerror}); choose another")

    def check(self, name, value, expected, *, quick=None, paper=None, form=".3g"):
        """Print ✓ or ✗, the value and its range (low, high). `quick` is the range for --quick."""
        low, high = quick if self.quick and quick else expected
        self.passed[name] = passed = bool(low <= value <= high)
        span = f"{low:{form}}" if low == high else f"{low:{form}} to {high:{form}}"
        reference = f"; the paper: {paper}" if paper else ""
        print(f"{'✓' if passed else '✗'} {name} {value:{form}} (expected {span}{reference})")

    def table(self, headings, rows):
        """Print columns under headings: the first to the left, the others to the right; floats with three digits."""
        text = [[f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row] for row in (headings, *rows)]
        widths = [max(map(len, column)) for column in zip(*text)]
        text.insert(1, ["─" * width for width in widths])
        for first, *others in text:
            cells = (f"{cell:>{width}}" for cell, width in zip(others, widths[1:]))
            print(f"{first:<{widths[0]}}  ", "   ".join(cells))

    def show(self, figure, name, description):
        """Save a figure as NAME.png; a notebook shows it too, and a page gives the description to who can't see it."""
        file = self.figures / f"{name}.png"
        figure.savefig(file, dpi=120)
        plt.close(figure)
        if self.notebook:
            from IPython.display import display

            data = {"image/png": file.read_bytes(), "text/plain": description}
            display(data, raw=True, metadata={"filename": file.name})

    def end(self):
        failed = [name for name, passed in self.passed.items() if not passed]
        if failed:
            sys.exit(f"{len(failed)} of {len(self.passed)} checks failed: {', '.join(failed)}")
        print(f"all {len(self.passed)} checks passed")
