from __future__ import annotations

from pathlib import Path

from shoal.cli.flag_reference import markdown

DOCUMENT = Path(__file__).parents[2] / "docs" / "flags.md"


def test_the_document_is_current():
    assert DOCUMENT.read_text(encoding="utf-8") == markdown(), (
        "docs/flags.md is behind the options: run .venv/bin/python -m shoal.cli.flag_reference > docs/flags.md"
    )
