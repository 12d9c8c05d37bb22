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
def page(pve, tables, tmp_path):
    path = tmp_path / "page.html"
    pve.json(*tables, "--report", path, status=1)
    return path


def test_page_shows_shares_and_counts(page):
    text = page.read_text(encoding="utf-8")
    shares = [(int(count), float(share)) for share, count in re.findall(r'--share: ([\d.]+)">(\d+)<', text)]
    of_all, of_a_rank = ([(count, round(count / rows, 3)) for count in (1, 1, 10, 900)] for rows in (4000, 1000))
    assert sorted(shares) == sorted(of_all + of_a_rank)
    bars = re.findall(
        r'<td>(\d+)</td><td><div class="bar" style="width: ([\d.]+)%">', text.rpartition("<details open>")[2]
    )
    widths = [float(width) for _, width in sorted(bars, key=lambda bar: int(bar[0]))]
    assert widths == sorted(widths)
    assert 0 < widths[0] < widths[-1] == 100
    assert re.search(r"\b(src|href)=|@import|url\(", text.replace(html.escape("<img src=x"), "")) is None


MEASURE = """<script>
addEventListener("load", () => {
  const all = (selector) => [...document.querySelectorAll(selector)];
  const facts = {
    headings: all("h1, h2").map(heading => heading.innerText),
    fits: document.documentElement.scrollWidth <= innerWidth,
    rows: all("details[open] .facts tr").length,
    fetched: performance.getEntriesByType("resource").length,
    foreign: all("img, iframe, link, object, script:not(:last-of-type)").length,
    hacked: typeof hacked,
  };
  document.body.innerHTML = "<pre></pre>";
  document.querySelector("pre").innerText = JSON.stringify(facts);
});
</script>"""


@pytest.mark.slow
def test_page_in_a_browser(page, tmp_path):
    """The page itself runs nothing; a copy without its policy is measured by a script."""
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        assert not os.environ.get("CI"), "no browser: apt-get install chromium"
        pytest.skip("no browser: apt-get install chromium")

    def shown(text):
        """The page's elements once a browser has laid it out."""
        page.write_text(text, encoding="utf-8")
        command = [found, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=700,900"]
        done = subprocess.run([*command, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=100)
        assert done.returncode == 0, done.stderr
        return done.stdout

    text = page.read_text(encoding="utf-8")
    assert "<title>pve: different</title>" in shown(
        text.replace("</body>", "<script>document.title = 'run'</script></body>")
    )
    text, removed = re.subn("<meta http-equiv.*?>\n", "", text)
    assert removed == 1
    measured = shown(text.replace("</body>", MEASURE + "</body>"))
    assert json.loads(html.unescape(re.search("<pre>(.*)</pre>", measured, re.S)[1])) == {
        "headings": [
            "DIFFERENT: 5 of 5 comparisons",
            "Result by rank",
            "Rank by kind of difference",
            "Rows that differ",
            "Kinds of difference",
        ],
        "fits": True,
        "rows": 1 + 5 + 1 + 5 + 1,  # at most five of each kind
        "fetched": 0,
        "foreign": 0,
        "hacked": "undefined",
    }


def test_markdown_escapes_names(pve, tables):
    lines = pve(*tables, "--markdown", status=1).splitlines()
    assert lines[0] == "**DIFFERENT: 5 of 5 comparisons**"
    for table in ("rank", "sides"):
        start = next(i for i, line in enumerate(lines) if line.startswith(f"| {table} |"))
        rows = [re.split(r"(?<!\\)\|", line) for line in lines[start:] if line.startswith("|")]
        assert len({len(row) for row in rows[:6]}) == 1
    assert r"emb\|\<img src=x onerror='hacked=1'\>\`\*\&" + '"' in "\n".join(lines)
    assert "| all | 0 - 3999 | 4000 of 4000 | differ: table 912 |" in lines
    assert "\x1b" not in "\n".join(lines)


def test_bad_page_is_refused_before_any_work(pve, tables, tmp_path):
    for path, match in (("page.txt", "--report must name a file that ends in .html"), ("no/page.html", "folder")):
        pve.refused(match, *tables, "--report", tmp_path / path)
