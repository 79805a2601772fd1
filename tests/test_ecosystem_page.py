"""docs/ecosystem.md says what the tests say."""

from __future__ import annotations

import ecosystem


def test_the_page_is_not_stale() -> None:
    text = ecosystem.PAGE.read_text(encoding="utf-8")
    assert ecosystem.page(text) == text, "make it anew: python tests/ecosystem.py"
