"""``make docs``: no warning, every public name, no dead link, and pages that a browser can show."""

from __future__ import annotations

import html.parser
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest

import fused_dni as fd

for _name in ("sphinx", "myst_parser", "furo"):
    pytest.importorskip(_name, reason=f"{_name} is missing: pip install fused-dni[docs]")

pytestmark = pytest.mark.slow(40)
ROOT = Path(__file__).resolve().parents[2]
BROWSER = next(filter(shutil.which, ("chromium", "chromium-browser", "google-chrome")), None)


def built(source: Path, to: Path) -> subprocess.CompletedProcess[str]:
    """As the Makefile does."""
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html"]
    return subprocess.run(
        [*command, source, to], cwd=ROOT, capture_output=True, text=True, timeout=400
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("docs") / "html"
    done = built(ROOT / "docs", folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_the_makefile_builds_it_the_same_way():
    recipe = re.search(r"\ndocs:.*\n(?:\t.*\n)+", (ROOT / "Makefile").read_text())
    assert "-m sphinx -q -W --keep-going -b html docs build/docs" in recipe[0]


def test_a_dead_reference_is_a_failure(tmp_path):
    source = tmp_path / "docs"
    source.mkdir()
    shutil.copy(ROOT / "docs" / "conf.py", source)
    (source / "static").mkdir()
    (source / "static" / "site.css").touch()
    (source / "index.md").write_text("# A page\n\n[a link](gone.md) {py:func}`fused_dni.gone`\n")
    done = built(source, tmp_path / "html")
    assert done.returncode != 0
    assert "gone.md" in done.stderr and "fused_dni.gone" in done.stderr


def test_every_public_name_is_documented(site):
    from sphinx.util.inventory import InventoryFile

    inventory = InventoryFile.loads((site / "objects.inv").read_bytes(), uri="")
    names = {name for kind in inventory.data.values() for name in kind}
    missing = {f"fused_dni.{name}" for name in fd.__all__} - names - {"fused_dni.functional"}
    assert missing == set()
    for name in fd.functional.__all__:
        assert f"fused_dni.functional.{name}" in names


class Page(html.parser.HTMLParser):
    """What a page links to, and what can be linked to in it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.ids: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        for name, value in attrs:
            if name in ("href", "src") and value and not re.match(r"[a-z]+:|//", value):
                self.links.add(unquote(value))
            elif name == "id" and value:
                self.ids.add(value)


def test_no_link_is_dead(site):
    pages = {path: Page(path) for path in site.rglob("*.html")}
    dead = []
    for path, page in pages.items():
        for link in page.links:
            name, _, anchor = link.partition("#")
            target = (path.parent / name.partition("?")[0]).resolve() if name else path
            unknown = anchor and target in pages and anchor not in pages[target].ids
            if unknown or not target.exists():
                dead.append(f"{path.name}: {link}")
    assert len(pages) > 20 and dead == []


SEEN = """<script>addEventListener("load", () => {
  const d = document.documentElement, bad = [...document.images].filter(i => !i.naturalWidth);
  d.setAttribute("data-seen", JSON.stringify({wide: d.scrollWidth - d.clientWidth,
    images: document.images.length, bad: bad.map(i => i.src), text: document.body.innerText}));
});</script>"""


def looked_at(page: Path, width: int) -> dict:
    """What a browser makes of a page."""
    copy = page.with_name(f"seen-{width}-{page.name}")
    copy.write_text(page.read_text(encoding="utf-8").replace("</head>", f"{SEEN}</head>"))
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += [f"--user-data-dir={page.parent / 'profile'}", f"--window-size={width},1500"]
    done = subprocess.run(
        [*command, copy.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    copy.unlink()
    return json.loads(html.unescape(re.search(r'data-seen="([^"]*)"', done.stdout)[1]))


browser = pytest.mark.skipif(BROWSER is None, reason="no chromium on PATH")


@browser
@pytest.mark.parametrize("width", [600, 1400])
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("index", "Does it pay?"),
        ("verdict", "“It costs accuracy”"),
        ("verdict-tables", "planted"),
        ("api/layers", "FusedDNILinear"),
    ],
)
def test_a_browser_shows_the_page(site, name, text, width):
    seen = looked_at(site / f"{name}.html", width)
    assert text in seen["text"]
    assert seen["wide"] <= 0  # wide tables are scrolled, never the page
    assert seen["bad"] == [] and (seen["images"] > 0) == (not name.startswith("api"))
    assert "`" not in seen["text"].replace("```", "")  # Markdown that was not understood


@browser
def test_a_page_that_is_broken_is_seen(tmp_path):
    page = tmp_path / "page.html"
    page.write_text(
        "<head></head><body><p style='width: 3000px'>text</p><img src='gone.svg'></body>"
    )
    seen = looked_at(page, 800)
    assert seen["wide"] > 1000 and seen["bad"][0].endswith("gone.svg") and seen["images"] == 1


def test_the_examples_of_the_pages_are_shown_in_colour(site):
    text = (site / "drop-ins.html").read_text()
    assert text.count("highlight-python") >= 6
