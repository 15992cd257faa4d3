"""The Python of the README runs as it stands, with fewer steps."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SNIPPETS = (ROOT / "README.md").read_text(encoding="utf-8").split("```python\n")[1:]


@pytest.fixture(params=SNIPPETS, ids=["pipeline", "digits"])
def code(request):
    whole = request.param.split("```")[0]
    code, steps = re.subn(r"range\(100\)|steps=400", lambda found: found[0].replace("00", ""), whole)
    assert steps
    return code


def test_the_python_of_the_readme_runs(code, tmp_path, monkeypatch, capsys):
    for folder in ("weights", "lessons"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    assert (tmp_path / "robot.png").exists() or capsys.readouterr().out.startswith("before: ")
