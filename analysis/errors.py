"""What can go wrong when one looks inside a model."""

from __future__ import annotations

from ..configuration_attnres import AttnResError


class AnalysisError(AttnResError):
    """A model, a text or an argument with which there is nothing to look at."""
