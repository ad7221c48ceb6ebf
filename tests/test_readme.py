"""README: the Python example runs as printed, and the files it names are there."""

import re
from pathlib import Path

from jax_avatar.io.video import read_video

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_python_example_writes_a_video(monkeypatch, tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    for folder in ("jax_avatar", "configs"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    frames, fps, wave, rate = read_video(tmp_path / "hello.mp4")
    assert len(frames) == 178 and frames.std() > 20
    assert abs(len(wave) / rate - 178 / fps) < 0.1


def test_the_algorithms_are_where_it_says():
    rows = re.findall(r"\| \[[^]]*\]\(([^)]*)\) \| (\d+) \|", README)
    assert len(rows) >= 6
    for path, lines in rows:
        there = len((ROOT / path).read_text().splitlines())
        assert abs(there - int(lines)) <= 0.1 * there, f"{path} has {there} lines"
    for number in (1, 2, 3, 4):
        (path,) = re.findall(rf"\| Algorithm {number},[^|]*\| \[[^]]*\]\(([^)]*)\)", README)
        assert f"Algorithm {number}" in (ROOT / path).read_text().split("\n")[0]


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
            if not target.startswith(("http", "mailto")):
                assert (page.parent / target).exists(), f"{page.name}: {target}"
