"""The error that every refusal of a checkpoint is."""

from __future__ import annotations

from ..configuration_attnres import AttnResError


class ConversionError(AttnResError):
    """A checkpoint cannot be converted as asked; nothing was written."""
