"""What every part of the house may raise."""


class SettingError(ValueError):
    """A value that somebody chose cannot be; the message names its key. Ends a command with exit code 2, no trace."""
