"""A report's page: what its markup says, and what a browser makes of it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from fused_dni.report import Figure, Heading, Table, Text
from fused_dni.report.html import as_html

FACTS = {"device": "a processor", "gpu": None, "commit": "0" * 200, "command": "fused-dni " * 40}
BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
browser = pytest.mark.skipif(
    BROWSER is None, reason="needs chromium, chromium-browser or google-chrome on PATH"
)

# Put at the end of a copy of the page; its findings come out as the page's title.
MEASURE = """<script>
const of = (where, what) => getComputedStyle(document.querySelector(where))[what];
document.title = JSON.stringify({
  overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
  tables: [...document.querySelectorAll("table")].map((t) => t.rows.length),
  scripts: document.scripts.length, drawn: document.querySelector("svg").clientWidth,
  text: of("body", "color"), page: of("body", "backgroundColor"), tick: of("svg text", "fill"),
  header: of("th", "position"), lead: parseFloat(of("p.lead", "fontSize")),
  number: of("td.number", "textAlign"),
});
</script>"""


def _draw(figure):
    axes = figure.subplots()
    axes.plot([0, 1], [1, 2])


def _blocks() -> list:
    wide = [f"column {i}" for i in range(20)]
    return [
        Heading("Verdict: " + "unbroken" * 30, 1),
        Text("DNI is **slower** by 12 % than `fused`.", lead=True),
        Table(["row", "time", "why"], [["a", "1.46 ms", "x" * 60], ["b", "-", "y"]], "Caption."),
        Heading("Details & <script>alert(1)</script>"),
        Text("<img src=x onerror=alert(1)>"),
        Table(wide, [wide]),
        Figure("one", _draw, 'A "figure".', (12, 3)),
        Figure("two", _draw, "Another.", (3, 2)),
    ]


def _links(page: str) -> list[str]:
    """Whatever an element of the page refers to."""
    found = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attributes):
            names = ("src", "href", "xlink:href", "action", "data", "poster")
            found.extend(value for name, value in attributes if name in names)

    Reader().feed(page)
    assert found  # plots refer to parts of themselves
    return found


def test_markup():
    made = as_html(_blocks(), FACTS)
    assert "<p class=lead>DNI is <strong>slower</strong> by 12\N{NO-BREAK SPACE}% than" in made
    assert made.count("class=lead") == 1 and "<code>fused</code>" in made
    assert "<td class=number>1.46\N{NO-BREAK SPACE}ms</td>" in made
    assert "<th class=number>time</th><th class=prose>why</th>" in made
    assert 'aria-label="A &quot;figure&quot;."' in made
    assert "<dt>gpu</dt>" not in made and "<dt>device</dt><dd>a processor</dd>" in made


def test_what_is_given_is_escaped_and_nothing_is_loaded():
    made = as_html(_blocks(), {"<b>": "</dl><b>"})
    assert "<script" not in made and "<img" not in made and "<b>" not in made
    assert "Details &amp; &lt;script&gt;" in made
    assert all(link.startswith("#") for link in _links(made))
    assert "@import" not in made and re.findall(r"url\((?!#)", made) == []


def test_every_id_is_one_elements():
    made = as_html(_blocks(), FACTS)
    ids = re.findall(r'\bid="([^"]+)"', made)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:url\(#|href="#)([^")]+)', made)) <= set(ids)


def test_a_page_without_tables_figures_or_facts():
    made = as_html([Text("nothing")], {})
    assert "<title>fused_dni</title>" in made and "<p>nothing</p>" in made


def test_an_empty_table():
    assert "<th>a</th><th>b</th>" in as_html([Table(["a", "b"], [])], {})


def _browse(page, folder, *options: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [
            BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            "--no-first-run", f"--user-data-dir={folder}", "--enable-logging=stderr",
            "--dump-dom", *options, page.as_uri(),
        ],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done


@browser
def test_a_browser_finds_nothing_to_complain_about(tmp_path):
    page = tmp_path / "page.html"
    page.write_text(as_html(_blocks(), FACTS))
    done = _browse(page, tmp_path / "profile")
    assert "CONSOLE" not in done.stderr
    assert done.stdout.count("</table>") == 2 and done.stdout.count("</svg>") == 2


@browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_shows_all_of_it_on_a_narrow_window(tmp_path, scheme):
    page = tmp_path / "page.html"
    plain = re.sub(r"<meta http-equiv=[^\n]*\n", "", as_html(_blocks(), FACTS))  # lets MEASURE run
    page.write_text(plain.replace("</body>", f"{MEASURE}\n</body>"))
    asked = f"--blink-settings=preferredColorScheme={int(scheme == 'light')}"
    done = _browse(page, tmp_path / "profile", "--window-size=500,900", asked)
    found = json.loads(re.search(r"<title>(.*?)</title>", done.stdout)[1])
    assert found["overflow"] == 0 and 0 < found["drawn"] < 500
    assert found["tables"] == [3, 2] and found["scripts"] == 1
    assert found["header"] == "sticky" and found["number"] == "right" and found["lead"] > 18
    text, paper = (sum(map(int, re.findall(r"\d+", found[k])[:3])) for k in ("text", "page"))
    assert (text < 200 < 700 < paper) if scheme == "light" else (paper < 200 < 600 < text)
    assert found["tick"] == found["text"]
