"""Relative links in Markdown files lead to files and headings that exist, and prose keeps the line length."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
LINE_LENGTH = 119
NOT_OURS = {"build", "dist", "node_modules", "runs"}
LINK = re.compile(r"\]\(\s*<?([^)>\s]+)>?[^)]*\)|(?:src|href)=\"([^\"]+)\"")
FENCE = re.compile(r"^\s*(```|~~~)")


def is_ours(path: Path) -> bool:
    folders = path.relative_to(ROOT).parts[:-1]
    return not any(folder.startswith(".") or folder in NOT_OURS for folder in folders)


FILES = sorted(path for path in ROOT.rglob("*.md") if is_ours(path))


def prose(path: Path) -> list[tuple[int, str]]:
    """Numbered lines outside code blocks."""
    lines, in_code = [], False
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if FENCE.match(line):
            in_code = not in_code
        elif not in_code and not line.startswith("    "):
            lines.append((number, line))
    return lines


def anchors(path: Path) -> set[str]:
    """What a link to a heading is called: lower case, words joined by hyphens, no punctuation."""
    headings = [line.lstrip("#").strip() for _, line in prose(path) if re.match(r"#+ ", line)]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_relative_links_exist():
    broken = []
    for path in FILES:
        for number, line in prose(path):
            for target in ("".join(groups) for groups in LINK.findall(re.sub(r"`[^`]*`", "", line))):
                if re.match(r"[a-z]+:", target) or target.startswith("/"):
                    continue  # an address elsewhere
                file, _, anchor = target.partition("#")
                there = path.parent / file if file else path
                if not there.exists() or (anchor and there.suffix == ".md" and anchor not in anchors(there)):
                    broken.append(f"{path.relative_to(ROOT)}:{number}: {target}")
    assert not broken, "\n".join(broken)


def test_prose_keeps_the_line_length():
    """Outside tables, code and addresses."""
    too_long = []
    for path in FILES:
        for number, line in prose(path):
            words = re.sub(r"https?://\S+", "", re.sub(r"\]\([^)]*\)", "]", line))
            if not line.lstrip().startswith("|") and len(words) > LINE_LENGTH:
                too_long.append(f"{path.relative_to(ROOT)}:{number}: {len(words)} characters")
    assert not too_long, "\n".join(too_long)
