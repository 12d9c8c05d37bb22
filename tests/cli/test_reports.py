"""What `pve diff` and `pve compare` hand over: JSON, Markdown, and a page that a browser shows."""

import html
import json
import os
import re
import shutil
import subprocess

import numpy as np
import pytest
from table_files import save

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
HOSTILE = "emb|<img src=x onerror='hacked=1'>`*&\"\x1b[2J"


@pytest.fixture
def tables(tmp_path, rng):
    """Two tables that differ in many ways, the second with a tensor of a hostile name; the arguments to compare them."""
    left = rng.standard_normal((4000, 32)).astype(np.float32)
    right = left.copy()
    right[100:1000] = left[101:1001]
    right[1500] = 0
    right[2000:2010] = np.nextafter(left[2000:2010], np.float32(9))
    right[3000, 0] = np.nan
    paths = [tmp_path / name for name in ("left.safetensors", "<b>right.safetensors")]
    for path, name, table in zip(paths, ("wte.weight", HOSTILE), (left, right), strict=True):
        save(path, {name: table})
    return ["diff", *paths, "--world-size", "4"]


@pytest.fixture
def browser():
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        assert not os.environ.get("CI"), "no browser: apt-get install chromium"
        pytest.skip("no browser: apt-get install chromium")

    def show(path, *options):
        """The page's elements once a browser has laid it out."""
        command = [found, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=700,900", *options]
        done = subprocess.run([*command, "--dump-dom", path.as_uri()], capture_output=True, text=True, timeout=100)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return show


MEASURE = """<script>
function luminance(colour) {
  const canvas = new OffscreenCanvas(1, 1).getContext("2d");
  canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
  const light = [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3).map(c => c / 255)
    .map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
  return 0.2126 * light[0] + 0.7152 * light[1] + 0.0722 * light[2];
}
function contrast(element, under) {
  const ends = [getComputedStyle(element).color, getComputedStyle(under).backgroundColor].map(luminance).sort();
  return (ends[1] + 0.05) / (ends[0] + 0.05);
}
addEventListener("load", () => {
  const all = (selector) => [...document.querySelectorAll(selector)];
  const facts = {
    headings: all("h1, h2").map(heading => heading.innerText),
    fits: document.documentElement.scrollWidth <= innerWidth,
    shares: all(".map td.hot").map(cell => [+cell.innerText, luminance(getComputedStyle(cell).backgroundColor)]),
    bars: all(".bar").map(bar => [+bar.closest("tr").children[1].innerText, bar.getBoundingClientRect().width]),
    contrast: Math.min(...all("td.hot").map(cell => contrast(cell, cell)),
      ...all("h1, h2, p, td:not(.hot), dt").map(element => contrast(element, document.body))),
    paper: luminance(getComputedStyle(document.body).backgroundColor),
    rows: all("details[open] tr").length,
    fetched: performance.getEntriesByType("resource").length,
    foreign: all("img, iframe, link, object, script:not(:last-of-type)").length,
    hacked: typeof hacked,
  };
  document.body.innerHTML = "<pre></pre>";
  document.querySelector("pre").innerText = JSON.stringify(facts);
});
</script>"""


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["dark", "light"])
def test_page_in_a_browser(pve, tables, tmp_path, browser, scheme):
    page = tmp_path / "page.html"
    pve.json(*tables, "--report", page, status=1)
    # The page itself runs nothing; a copy without its policy is measured by a script.
    text, removed = re.subn("<meta http-equiv.*?>\n", "", page.read_text(encoding="utf-8"))
    assert removed == 1
    (tmp_path / "copy.html").write_text(text.replace("</body>", MEASURE + "</body>"), encoding="utf-8")
    shown = browser(tmp_path / "copy.html", f"--blink-settings=preferredColorScheme={['dark', 'light'].index(scheme)}")
    facts = json.loads(html.unescape(re.search("<pre>(.*)</pre>", shown, re.S)[1]))
    assert facts["headings"] == [
        "DIFFERENT: 5 of 5 comparisons",
        "The sides",
        "Rank by kind of difference",
        "Rows that differ",
        "Distances of the elements that differ",
        "Kinds of difference",
    ]
    assert (facts["fits"], facts["fetched"], facts["foreign"], facts["hacked"]) == (True, 0, 0, "undefined")
    assert (facts["paper"] > 0.5) == (scheme == "light")
    assert facts["contrast"] >= 4.5  # what WCAG asks of text
    rows, light = zip(*facts["shares"], strict=True)
    assert sorted(rows) == [1, 1, 1, 1, 10, 10, 900, 900]
    assert abs(light[rows.index(900)] - facts["paper"]) > abs(light[rows.index(10)] - facts["paper"])
    counts, widths = zip(*facts["bars"], strict=True)
    assert max(widths) == widths[counts.index(max(counts))] > 100
    assert min(widths) >= 2
    assert facts["rows"] == 1 + 5 + 1 + 5 + 1  # at most five of each kind


@pytest.mark.slow
def test_page_runs_no_script(pve, tables, tmp_path, browser):
    page = tmp_path / "page.html"
    pve.json(*tables, "--report", page, status=1)
    text = page.read_text(encoding="utf-8")
    assert re.search(r"\b(src|href)=|@import|url\(", text.replace(html.escape("<img src=x"), "")) is None
    page.write_text(text.replace("</body>", "<script>document.title = 'run'</script></body>"), encoding="utf-8")
    assert "<title>pve: different</title>" in browser(page)


def test_markdown_escapes_names(pve, tables):
    lines = pve(*tables, "--markdown", status=1).splitlines()
    assert lines[0] == "**DIFFERENT: 5 of 5 comparisons**"
    for table in ("rank", "sides"):
        start = next(i for i, line in enumerate(lines) if line.startswith(f"| {table} |"))
        rows = [re.split(r"(?<!\\)\|", line) for line in lines[start:] if line.startswith("|")]
        assert len({len(row) for row in rows[:6]}) == 1
    assert r"emb\|\<img src=x onerror='hacked=1'\>\`\*\&" + '"' in "\n".join(lines)
    assert "| all | 0 - 3999 | differ: table 912 |" in lines
    assert "\x1b" not in "\n".join(lines)


def test_bad_page_is_refused_before_any_work(pve, tables, tmp_path):
    for path, match in (("page.txt", "--report must name a file that ends in .html"), ("no/page.html", "folder")):
        pve.refused(match, *tables, "--report", tmp_path / path)
