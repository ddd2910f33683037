"""Files of prompts."""

import pytest

from freqformer.config import ConfigError
from freqformer.prompts import read_prompts, without_blank


def test_one_prompt_in_each_line(tmp_path):
  path = tmp_path / "prompts.txt"
  path.write_bytes("\ufeffa cat\r\n\r\n  #1, a dog  \n \n\u732b".encode())
  assert without_blank(read_prompts(path)) == ["a cat", "#1, a dog", "\u732b"]


def test_files_without_prompts(tmp_path):
  path = tmp_path / "prompts.txt"
  path.write_text(" \n\n")
  with pytest.raises(ConfigError, match="there is no text among them"):
    without_blank(read_prompts(path))
  path.write_bytes("sch\u00f6n".encode("latin-1"))
  with pytest.raises(ConfigError, match="prompts.txt is not in UTF-8"):
    read_prompts(path)
