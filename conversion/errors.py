"""The errors of a conversion."""

from __future__ import annotations

from ..configuration_attnres import AttnResError


class ConversionError(AttnResError):
    """A checkpoint cannot be converted as asked; nothing was written."""


class VerificationError(AttnResError):
    """The converted checkpoint computes something else than its source; it was not delivered."""
