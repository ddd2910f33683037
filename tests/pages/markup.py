"""Checks a page as a browser would read it: balanced tags, nothing from elsewhere, media decode."""

import base64
import html.parser
import io
import re

import av
from PIL import Image

# Elements that have no end tag.
_VOID = {"meta", "img", "br", "link", "input"}


class _Reader(html.parser.HTMLParser):
  """Collects what is wrong with the tags, titles of sections, and everything that is loaded."""

  def __init__(self):
    super().__init__()
    self.open = []
    self.wrong = []
    self.titles = []
    self.loaded = []

  def handle_starttag(self, tag, attributes):
    if tag not in _VOID:
      self.open.append(tag)
    self.wrong += [f"<{tag}>"] * (tag in ("script", "link", "iframe"))
    self.loaded += [value for name, value in attributes if name in ("src", "href", "poster")]

  def handle_endtag(self, tag):
    if not self.open or self.open.pop() != tag:
      self.wrong.append(f"</{tag}>")

  def handle_data(self, data):
    if self.open and self.open[-1] == "h2":
      self.titles.append(data)


def sections(page: str) -> list[str]:
  """Returns the titles of a page's sections; what a browser would stumble over is an error."""
  reader = _Reader()
  reader.feed(page)
  reader.close()
  assert not reader.wrong and not reader.open, (reader.wrong, reader.open)
  style = re.search("<style>(.*?)</style>", page, re.DOTALL).group(1)
  assert "url(" not in style and "@import" not in style
  for source in reader.loaded:
    kind, _, data = source.partition(";base64,")
    data = io.BytesIO(base64.b64decode(data, validate=True))
    if kind == "data:image/png":
      Image.open(data).load()
    else:
      assert kind == "data:video/mp4", source[:40]
      with av.open(data) as container:
        assert sum(1 for _ in container.decode(video=0)) > 1
  return reader.titles
