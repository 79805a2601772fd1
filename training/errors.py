"""The error of training."""

from __future__ import annotations

from ..configuration_attnres import AttnResError


class TrainingError(AttnResError):
    """A training cannot be started, resumed or gone on with; what was saved before is as it was."""
