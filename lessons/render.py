"""Run lessons in full and write their pages: python lessons/render.py [01 02 …]

Needs `pip install -e ".[lessons]"`. Prose, formulas, code, printed output and figures go one below the other into
lessons/pages/NN_name.md and lessons/figures/. A lesson with a failed check leaves its page as it was.
"""

import argparse
from pathlib import Path

import jupytext
from nbclient import NotebookClient
from nbconvert import MarkdownExporter

from sparsecode import replacing

LESSONS = Path(__file__).parent
TEMPLATE = """
{%- extends "markdown/index.md.j2" -%}
{%- block data_png -%}
![{{ output.data["text/plain"] }}]({{ output.metadata.filenames["image/png"] }})
{%- endblock -%}
{%- block stream -%}
{%- if output.name == "stdout" -%}{{ super() }}{%- endif -%}
{%- endblock -%}
"""  # nbconvert's own would describe every picture as "png", and show what belongs to a terminal


def render(script):
    notebook = jupytext.read(script)
    NotebookClient(notebook, timeout=None, kernel_name="python3", resources={"metadata": {"path": LESSONS}}).execute()
    exporter = MarkdownExporter(raw_template=TEMPLATE)
    body, resources = exporter.from_notebook_node(notebook, resources={"output_files_dir": "../figures"})
    for name, data in resources["outputs"].items():
        with replacing(LESSONS / "pages" / name) as temporary:
            temporary.write_bytes(data)
    with replacing(LESSONS / "pages" / f"{script.stem}.md") as temporary:
        temporary.write_text(body.replace("](figures/", "](../figures/"), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__.splitlines()[0])
    scripts = {script.name[:2]: script for script in sorted(LESSONS.glob("[0-9]*.py"))}
    parser.add_argument("lessons", nargs="*", metavar="NN", help=f"all if none is given; of {' '.join(scripts)}")
    wanted = parser.parse_args().lessons
    if unknown := set(wanted) - set(scripts):
        parser.error(f"there is no lesson {min(unknown)}; choose from {' '.join(scripts)}")
    for number in wanted or scripts:
        print(scripts[number].name)
        render(scripts[number])
