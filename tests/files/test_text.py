"""Text files as editors save them."""

import pytest

from qarvd_diffusers.files.text import parse_prompts, read_text
from qarvd_diffusers.pipelines.pipeline_arvd import clean_prompt

LINES = "# comment\r\na red circle\r\n\u200ba blue\u200b square\r\n"
PROMPTS = ("a red circle", "a blue square")


@pytest.mark.parametrize("encoding", ("utf-8", "utf-8-sig"))
def test_prompts_are_the_same_with_and_without_marks(tmp_path, encoding):
    path = tmp_path / "prompts.txt"
    path.write_bytes(LINES.encode(encoding))
    assert parse_prompts(read_text(path).splitlines(), str(path)) == PROMPTS
    assert parse_prompts(("\ufeff# comment", "\ufeffa red circle", "a blue square"), "a node") == PROMPTS
    assert clean_prompt("\ufeffa  red\u200b circle") == PROMPTS[0]


@pytest.mark.parametrize(
    ("encoding", "found"),
    (
        ("utf-16", "UTF-16, expected UTF-8"),
        ("utf-32", "UTF-32, expected UTF-8"),
        ("utf-16-le", "UTF-16 without a byte order mark"),
        ("latin-1", r"not UTF-8 \(byte 5 is 0xe9"),
    ),
)
def test_another_encoding_is_named_with_the_file_and_the_remedy(tmp_path, encoding, found):
    path = tmp_path / "prompts.txt"
    path.write_bytes("a café\n".encode(encoding))
    with pytest.raises(ValueError, match=rf"prompts\.txt is .*{found}.*save it as UTF-8"):
        read_text(path)
