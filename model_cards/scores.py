"""How a score is written, in cards and in reports of evaluations alike."""

from __future__ import annotations

# Metrics that are shares between 0 and 1. They are written in percent; any other metric is written as it is.
SHARES = ("acc", "acc_bytes", "acc_norm", "em", "exact_match", "f1", "math_verify", "pass@1", "pass_at_1")


def score_text(metric: str, value: float | None, stderr: float | None = None, sign: str = "") -> str:
    """A score, or a difference of two, with its standard error.

    Args:
        metric (`str`): name of the metric, which says whether it is a share.
        value (`float`, *optional*): the score as the harness gives it; `None` is written as a dash.
        stderr (`float`, *optional*): its standard error.
        sign (`str`, *optional*): `"+"` to write the sign of positive values.
    """
    if value is None:
        return "–"
    scale, digits = (100, 1) if metric in SHARES else (1, 4)
    value = round(scale * value, digits) + 0.0  # no "-0.0"
    error = "" if stderr is None else f" ± {scale * stderr:.{digits}f}"
    return f"{value:{sign if value else ''}.{digits}f}{error}"
