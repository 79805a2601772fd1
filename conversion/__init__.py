"""Checkpoints in and out: retrofits existing checkpoints with Attention Residuals, losslessly.

>>> from attnres.conversion import convert
>>> report = convert("Qwen/Qwen3-0.6B", "Qwen3-0.6B-AttnRes", num_blocks=8)
"""

from .converter import ConversionReport, convert
from .errors import ConversionError, VerificationError
from .verification import Verification

__all__ = ["ConversionError", "ConversionReport", "Verification", "VerificationError", "convert"]
