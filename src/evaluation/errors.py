"""The errors of evaluation."""

from __future__ import annotations

from src.errors import SettingError, UserError


class NotApplicable(SettingError):
    """The data or the method does not have what an evaluation needs; the message says what is missing in one sentence.
    The caller decides: `make evaluate` refuses with the message, online evaluation logs it once and skips the
    evaluation from then on."""


class BadFeatures(UserError):
    """An encoder or a tower returned NaN or infinite values."""
