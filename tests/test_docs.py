"""Links of the documents lead somewhere, and the index of docs/ has every page."""

import json
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_FENCED = re.compile(r"^```.*?^```", re.M | re.S)


def anchors(text):
  """Returns the anchors that a code host gives to a page's headings."""
  headings = re.findall(r"^#+ (.*)$", _FENCED.sub("", text), re.M)
  return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def check_links(text, page):
  for link in _LINK.findall(text):
    if re.match(r"https?:", link):
      continue
    target, _, anchor = link.partition("#")
    path = page.parent / target if target else page
    assert path.exists(), f"{page.relative_to(ROOT)} links to {link}, which is not there"
    if anchor:
      assert anchor in anchors(path.read_text()), f"{page.relative_to(ROOT)}: no heading {link}"


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_links_of_a_page(page):
  check_links(_FENCED.sub("", page.read_text()), page)


def test_links_of_the_notebook():
  page = ROOT / "examples" / "tour.ipynb"
  cells = json.loads(page.read_text())["cells"]
  text = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]
  assert _LINK.search("\n".join(text))
  check_links("\n".join(text), page)


def test_the_index_has_every_page():
  index = ROOT / "docs" / "README.md"
  rows = re.findall(r"^\| \[(.+)\]\(\1\) \| .+\? \|$", index.read_text(), re.M)
  assert sorted(rows) == sorted(page.name for page in index.parent.glob("*.md") if page != index)
