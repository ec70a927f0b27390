"""The vocabulary of documentation, comments and messages: the field's terms, and no other words for the same thing."""

from __future__ import annotations

import io
import re
import tokenize

import pytest
from conftest import ROOT

INSTEAD = {
    r"pictures?|photos?|photographs?": "image",
    r"films?": "video",
    r"enlarg(e[sd]?|ing)": "upsample",
    r"cut at": "threshold at",
    r"running averages?": "EMA",
    r"parts? of (a|the) batch": "micro-batch",
    r"starts? anew|anew": "is initialised, again",
    r"what fits": "matching weights",
    r"waits? for the device": "synchronises with the device",
    r"mend(s|ed|ing)?": "fix",
    r"judg(e[sd]?|ing)": "score",
    r"tells?|told": "report",
    r"look(s|ed|ing)? at": "inspect",
    r"knows? people": "detects people",
}
SKIPPED = ("tests/fixtures/", "tests/test_language.py")
FILES = sorted(
    path
    for pattern in ("*.md", "*.py")
    for path in ROOT.rglob(pattern)
    if not path.relative_to(ROOT).as_posix().startswith(SKIPPED)
    and not any(part.startswith(".") or part in ("runs", "results") for part in path.relative_to(ROOT).parts)
)


def prose(path):
    """Yield the line number and the text of everything that is written for people."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        yield from enumerate(text.splitlines(), 1)
        return
    kinds = {tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)}
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in kinds:
            yield token.start[0], token.string


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_words(path):
    found = [
        f"line {line}: {match[0]!r}, write {better!r}"
        for line, text in prose(path)
        for word, better in INSTEAD.items()
        for match in re.finditer(rf"\b({word})\b(?!\.\w)", text, re.IGNORECASE)
    ]
    assert found == []


def test_the_check_finds_words(tmp_path):
    path = tmp_path / "x.py"
    path.write_text('"""A picture."""\nx = 1  # it is mended\nraise ValueError("look at it")\n')
    with pytest.raises(AssertionError, match="picture"):
        test_words(path)
