"""Citations resolve: a cited section has its heading, a link leads to a file, a function named in a table exists."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import ROOT
from import_boundaries import WITHOUT_TORCH

FOLDERS = [
    "esi_ds",
    "tests",
    "examples",
    "tiny_models",
    "real_models",
    "study",
    "benchmarks",
    "launch",
    "configs",
    "ds_configs",
    "slurm",
    "docs",
]
SUFFIXES = {".py", ".md", ".yaml", ".json", ".sh", ".sbatch", ".j2"}
MAX_BYTES = 1_000_000  # beyond it: tokenizers and measured data
LIST = r"§(\d+(?:(?:,| and) §\d+)*)"  # "§1", "§1, §2", "§1 and §2"
CITATION = re.compile(rf"docs/(\w+\.md) {LIST}|\]\((\w+\.md)\) {LIST}")
LINK = re.compile(r"\]\(([^)\s#]+)(?:#[^)]*)?\)")
MODULE = re.compile(r"`([\w/]+\.py): (\w[\w.]*(?:, \w[\w.]*)*)`")  # `core/score.py: score_shard, contrast`
PATH = re.compile(rf"`((?:{'|'.join(FOLDERS)})/[\w./-]+\.\w+)`")
HISTORY = {"log.md", "CHANGELOG.md"}  # they name files of their day


def sources() -> list[Path]:
    """Text files of the repository that people write."""
    inside = (file for folder in FOLDERS for file in (ROOT / folder).rglob("*") if file.suffix in SUFFIXES)
    return sorted(file for file in [*inside, *ROOT.glob("*.md")] if file.stat().st_size < MAX_BYTES)


def pages() -> list[Path]:
    return [file for file in sources() if file.suffix == ".md" and file.name not in HISTORY]


def sections(page: str) -> set[int]:
    """Numbers of a page's headings ``## n. title``; empty where there is no such page."""
    file = ROOT / "docs" / page
    return set(map(int, re.findall(r"^## (\d+)\. ", file.read_text(), re.MULTILINE))) if file.is_file() else set()


def unresolved(text: str, page: str | None = None) -> Iterator[str]:
    """Sections cited in a text that no page has. page: the page of ``docs/`` that the text is, whose own sections it
    may cite by number alone."""
    for match in CITATION.finditer(text):
        named, numbers = match[1] or match[3], match[2] or match[4]
        for number in re.findall(r"\d+", numbers):
            if int(number) not in sections(named):
                yield f"docs/{named} has no section {number}"
    for number in re.findall(r"§(\d+)", CITATION.sub("", text)):
        if page is None:
            yield f"section {number} is cited without a page"
        elif int(number) not in sections(page):
            yield f"docs/{page} has no section {number}"


def test_every_cited_section_exists() -> None:
    problems, num_citations = [], 0
    for file in sources():
        if file == Path(__file__).resolve():
            continue
        text = file.read_text()
        num_citations += len(CITATION.findall(text))
        page = file.name if file.parent == ROOT / "docs" else None
        problems += [f"{file.relative_to(ROOT)}: {problem}" for problem in unresolved(text, page)]
    assert not problems, "\n".join(problems)
    assert num_citations > 50


@pytest.mark.parametrize(
    ("text", "page", "problem"),
    [
        ("the mean (docs/method.md §99)", None, "docs/method.md has no section 99"),
        ("the mean (docs/method.md §1, §98)", None, "docs/method.md has no section 98"),
        ("the mean (docs/method.md §1 and §97)", None, "docs/method.md has no section 97"),
        ("the mean (docs/nothing.md §1)", None, "docs/nothing.md has no section 1"),
        ("the mean (METHOD §1)", None, "section 1 is cited without a page"),
        ("see [method.md](method.md) §96", "design.md", "docs/method.md has no section 96"),
        ("as in §95", "design.md", "docs/design.md has no section 95"),
    ],
)
def test_a_wrong_citation_is_noticed(text: str, page: str | None, problem: str) -> None:
    assert list(unresolved(text, page)) == [problem]


def test_right_citations_resolve() -> None:
    assert not list(unresolved("docs/method.md §1, §2; docs/design.md §7 and §8; docs/zero3.md §12"))
    assert not list(unresolved("[method.md](method.md) §8, and §7 of this page", "design.md"))


def test_sections_are_numbered_in_order() -> None:
    for page in ("design.md", "method.md", "zero3.md"):
        headings = re.findall(r"^## (.*)", (ROOT / "docs" / page).read_text(), re.MULTILINE)
        assert [heading.split(".")[0] for heading in headings] == [str(n + 1) for n in range(len(headings))], page


def test_links_lead_to_files() -> None:
    lost = [
        f"{file.relative_to(ROOT)}: {target}"
        for file in sources()
        if file.suffix == ".md"
        for target in LINK.findall(file.read_text())
        if "://" not in target and not (file.parent / target).exists()
    ]
    assert not lost, "\n".join(lost)


def test_named_files_exist() -> None:
    lost = [
        f"{page.relative_to(ROOT)}: {path}"
        for page in pages()
        for path in PATH.findall(page.read_text())
        if not (ROOT / path).exists()
    ]
    assert not lost, "\n".join(lost)


def test_the_readme_is_a_page_for_newcomers() -> None:
    """What grows belongs into docs/."""
    text = (ROOT / "README.md").read_text()
    assert len(text.encode()) <= 11_000 and len(text.splitlines()) <= 180


def test_named_functions_exist() -> None:
    """In the tables of docs/method.md and docs/design.md, whose paths are relative to the package."""
    problems, num_names = [], 0
    for page in ("method.md", "design.md"):
        for path, names in MODULE.findall((ROOT / "docs" / page).read_text()):
            file = next((top / path for top in (ROOT / "esi_ds", ROOT) if (top / path).is_file()), None)
            if file is None:
                problems.append(f"docs/{page}: {path} is not a file")
                continue
            for name in re.split(r"[., ]+", names):
                num_names += 1
                if not re.search(rf"^ *(?:def|class) {name}\b|^{name}\b", file.read_text(), re.MULTILINE):
                    problems.append(f"docs/{page}: {path} does not define {name}")
    assert not problems, "\n".join(problems)
    assert num_names > 50


def test_every_row_of_the_method_names_a_function() -> None:
    """The last cell of a table's row, where it cites a module: only then does the test above see it renamed."""
    rows = [line for line in (ROOT / "docs/method.md").read_text().splitlines() if line.startswith("| ")]
    cells = [row.rstrip("| ").rpartition(" | ")[2] for row in rows]
    cited = [module for cell in cells for module in re.findall(r"`[\w/]+\.py[^`]*`", cell)]
    assert len(cited) > 50
    assert not [module for module in cited if not MODULE.fullmatch(module)]


def test_the_layout_names_every_module() -> None:
    """Of the package and of what its stages share, in docs/design.md §2."""
    section = (ROOT / "docs/design.md").read_text().partition("\n## 2. ")[2].partition("\n## 3. ")[0]
    layout = section.partition("```\n")[2].partition("```")[0]
    words = set(re.findall(r"\w+", layout))
    paths = [path for folder in ("esi_ds", "esi_ds/stages") for path in (ROOT / folder).iterdir()]
    modules = {path.stem for path in paths if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert len(modules) > 40
    assert not modules - words - {"__init__"}
    (listed,) = re.findall(r"without circles\.\n(.*?) import no torch", section, re.DOTALL)
    assert set(re.findall(r"`(\w+)`", listed)) == WITHOUT_TORCH


SHORT = {  # docs/zero3.md's names for DeepSpeed's files
    "z3": "runtime/zero/stage3.py",
    "pp": "runtime/zero/partition_parameters.py",
    "eng": "runtime/engine.py",
}
FACT = re.compile(
    r"(?:`(?P<code>[^`\n]+)` )?\(?`?(?P<file>\b(?:z3|pp|eng)|[\w/]+\.py):(?P<first>\d+)(?:-(?P<last>\d+))?"
)


@pytest.mark.parametrize(
    ("package", "release", "prefix"), [("deepspeed", "0.19.8", ""), ("transformers", "5.23", "tf/")]
)
def test_the_facts_about_libraries_name_their_lines(package: str, release: str, prefix: str) -> None:
    """Each ``file:line`` of docs/zero3.md is a line of the release that it cites, and a name in front of the line of a
    definition is within three lines of it."""
    if not f"{version(package)}.".startswith(f"{release}."):
        pytest.skip(f"docs/zero3.md cites {package} {release}")
    spec = find_spec(package)
    assert spec is not None and spec.origin is not None
    problems, num_facts = [], 0
    for fact in FACT.finditer((ROOT / "docs/zero3.md").read_text()):
        path = SHORT.get(fact["file"], fact["file"])
        if path.startswith("tf/") != bool(prefix):
            continue
        num_facts += 1
        file = Path(spec.origin).parent / path.removeprefix(prefix)
        lines = file.read_text().splitlines() if file.is_file() else []
        first, last = int(fact["first"]), int(fact["last"] or fact["first"])
        if not first <= last <= len(lines):
            problems.append(f"{fact[0]}: no such line")
        function = re.fullmatch(r"(?:\w+\.)*(\w+)(?:\(.*\))?", fact["code"] or "")
        name = function[1] if function else ""
        defined = [n for n, line in enumerate(lines, 1) if name and re.match(rf"\s*(def|class) {name}\b", line)]
        if defined and not any(n - 3 <= last and first <= n + 3 for n in defined):
            problems.append(f"{fact[0]}: {name} is at line {defined[0]}")
    assert not problems, "\n".join(problems)
    assert num_facts >= 4
