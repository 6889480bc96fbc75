"""README and docs: every example runs as it stands, every link leads somewhere."""

from __future__ import annotations

import re
import shlex
import sys
import types
from pathlib import Path

import pytest

from fused_dni.cli.command import read
from fused_dni.cli.program import _parse
from fused_dni.report import ReportError

pytestmark = pytest.mark.slow(60)

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(page: Path) -> list[str]:
    """The page's Python, block by block."""
    return re.findall(r"```python\n(.*?)```", text_of(page), flags=re.DOTALL)


def examples() -> list[tuple[str, int]]:
    """Pages for users, by name; CONTRIBUTING.md has pieces of files."""
    pages = [README, *(page for page in PAGES if page.parent != ROOT)]
    return [(str(p.relative_to(ROOT)), n) for p in pages for n in range(len(blocks(p)))]


#: What the last line that an example prints must be below.
BELOW = {("README.md", 0): 0.2, ("README.md", 2): 0.2, ("docs/drop-ins.md", 0): 0.2}


@pytest.mark.parametrize(("page", "number"), examples())
def test_example_runs(page, number, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main = types.ModuleType("__main__")  # where a class of the example can be found by its name
    monkeypatch.setitem(sys.modules, "__main__", main)
    code = blocks(ROOT / page)[number]
    exec(compile(code, f"{page}, example {number}", "exec"), main.__dict__)
    if (page, number) in BELOW:
        assert float(capsys.readouterr().out) < BELOW[page, number]
    if page == "README.md" and number == 1:
        assert main.loss.item() < 0.2
        assert "'cosine'" in capsys.readouterr().out


def test_there_is_an_example_for_each_drop_in():
    code = "\n".join(blocks(ROOT / "docs" / "drop-ins.md"))
    for name in ("FusedDNILinear", "Decoupled(", "DecoupledSequential", "FusedDNILSTM", "revert"):
        assert name in code


def test_the_readme_can_be_read_in_two_minutes():
    assert len(text_of(README).splitlines()) <= 150
    assert len(blocks(README)) == 3


def anchors(page: Path) -> set[str]:
    """What can stand behind # in a link to a page, as GitHub makes it of headings."""
    text = re.sub(r"```.*?```", "", text_of(page), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    plain = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading) for heading in headings]
    return {re.sub(r"[^\w\- ]", "", line.lower()).strip().replace(" ", "-") for line in plain}


def dead(page: Path) -> list[str]:
    """The page's links to files or headings that there are not."""
    found = []
    text = re.sub(r"```.*?```|`[^`\n]+`", "", text_of(page), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            found.append(link)
    return found


def wrong(text: str) -> list[str]:
    """The commands of a page, in code of either form, that are none or have an option or a value
    that there is not. Arguments may be missing: many stand there for their name alone."""
    fences = re.findall(r"^```.*?^```", text, flags=re.DOTALL | re.MULTILINE)
    rest = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    said = [line for block in fences for line in block.splitlines()]
    said += [line for line in rest.splitlines() if line.startswith("    ") and "`" not in line]
    said += [" ".join(code.split()) for code in re.findall(r"`([^`]*)`", rest)]
    found = []
    for line in dict.fromkeys(said):
        command = re.search(r"(?<!\S)fused-dni (.+?)(?:  |#|\.\.\.|$)", line)
        words = shlex.split(command[1]) if command else ["COMMAND"]
        if words[0] == "COMMAND":
            continue
        words = ["1" if word in ("S", "SECONDS", "T", "T2") else word for word in words]
        try:
            read(*_parse(words)).check()
        except SystemExit:
            continue  # --help
        except ReportError:
            continue  # of files that are not here
        except ValueError as error:
            if "arguments are required" not in str(error):
                found.append(f"{command[0]}: {error}")
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_are_some(page):
    assert wrong(text_of(page)) == []


def test_a_wrong_command_is_found():
    page = "`fused-dni verdict`\n\n    fused-dni map --bathces 3  # so\n\n```console\n"
    page += (
        "$ fused-dni rivals --arms fused cdni-1 stael-2\n```\n`fused-dni env\n--all` `fused-dnj`"
    )
    named = ["map --bathces 3", "rivals --arms fused cdni-1 stael-2", "env --all"]
    found = [line.partition(": ")[0].strip() for line in wrong(page)]
    assert sorted(found) == sorted(f"fused-dni {name}" for name in named)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    assert dead(page) == []


def test_a_dead_link_is_found(tmp_path):
    (tmp_path / "there.md").write_text("# A heading, *with* `code`\n")
    (tmp_path / "page.md").write_text(
        "[a](there.md) [b](there.md#a-heading-with-code) [c](gone.md) [d](there.md#gone) "
        "[e](#gone) [f](https://example.org/gone) `[g](gone.md)`\n"
    )
    assert dead(tmp_path / "page.md") == ["gone.md", "there.md#gone", "#gone"]
