"""The Python of the README runs as it stands."""

from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_python_of_the_readme_runs(tmp_path, monkeypatch):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    code = text.split("```python\n")[1].split("```")[0]
    assert "range(100)" in code
    for folder in ("weights", "lessons"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    monkeypatch.chdir(tmp_path)
    exec(compile(code.replace("range(100)", "range(2)"), "README.md", "exec"), {})
    assert (tmp_path / "robot.png").stat().st_size > 1000
