"""docs/files.md names every Python file outside of tests/, every folder and helper of tests/, and every page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from conftest import ROOT

NOT_OURS = {"tests", "runs", "build"}  # beside hidden folders


def entries(page: str) -> dict[str, str]:
    """File or folder of the page's list → what its entry says, names of further files of that folder included."""
    found = {}
    for entry in re.findall(r"^\S.*(?:\n +.*)*", page.partition("```\n")[2].partition("```")[0], re.MULTILINE):
        keys, _, text = re.sub(r"\s*\n\s*", " ", entry.replace("  ", "\t", 1)).partition("\t")
        folder = ""
        for key in keys.replace(",", " ").split():
            folder = key.rpartition("/")[0] or folder  # esi_ds/recipes.py slurm.py
            found[key if "/" in key or not folder else f"{folder}/{key}"] = text
    return found


def missing(files: list[str], page: str) -> list[str]:
    """Files that neither have an entry nor are named, with or without .py, in that of their folder."""
    listed = entries(page)
    lost = []
    for file in files:
        path = Path(file)
        folders = [f"{folder}/" for folder in path.parents]  # the nearest first
        text = next((listed[folder] for folder in folders if folder in listed), "")
        if file not in listed and not re.search(rf"(?<![\w./-]){path.stem}(?![\w/])", text):
            lost.append(file)
    return lost


def python_files() -> list[str]:
    """Those of the repository that are more than a package's docstring."""
    paths = [file.relative_to(ROOT) for file in ROOT.rglob("*.py")]
    own = [path for path in paths if path.parts[0] not in NOT_OURS and not path.parts[0].startswith(".")]
    return sorted(map(str, (path for path in own if path.name != "__init__.py")))


def test_every_python_file_is_named() -> None:
    files = python_files()
    assert len(files) > 250
    assert not missing(files, (ROOT / "docs/files.md").read_text())


def test_every_entry_is_there() -> None:
    gone = [name for name in entries((ROOT / "docs/files.md").read_text()) if not (ROOT / name).exists()]
    assert not gone


def test_every_folder_of_the_tests_is_named() -> None:
    tests = entries((ROOT / "docs/files.md").read_text())["tests/"]
    folders = {folder.name for folder in (ROOT / "tests").glob("[!_.]*") if list(folder.glob("[!_.]*"))}
    assert folders and folders <= set(re.findall(r"(\w+)/", tests))


def test_every_helper_of_the_tests_and_every_page_is_named() -> None:
    """README.md links the pages, too."""
    listed = entries((ROOT / "docs/files.md").read_text())
    helpers = {file.stem for file in (ROOT / "tests").glob("*.py")}
    pages = {file.stem for file in (ROOT / "docs").glob("*.md")}
    assert len(helpers) > 10 and helpers <= set(re.findall(r"\w+", listed["tests/"]))
    assert len(pages) > 20 and pages <= set(re.findall(r"\w+", listed["docs/"]))
    assert pages <= set(re.findall(r"\]\(docs/(\w+)\.md\)", (ROOT / "README.md").read_text()))


@pytest.mark.parametrize("lost", ["a/other.py", "a/b/one.py", "b/one.py", "setup.py"])
def test_a_file_that_the_page_lacks_is_noticed(lost: str) -> None:
    listed = "a/    one: what it does;\n      two (what it does), not/other\na/b/  three\nc/x.py y.py  four\n"
    page = f"# Files\n\n```\n{listed}```\n"
    files = ["a/one.py", "a/two.py", "a/b/three.py", "c/x.py", "c/y.py", "c/d/x.py"]
    assert missing([*files, lost], page) == ["c/d/x.py", lost]
