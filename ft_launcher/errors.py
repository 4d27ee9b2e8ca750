"""The errors that ft_launcher raises on purpose, each with the exit code that it leads to."""

__all__ = ["FtLauncherError", "RankMonitorClientError", "UsageError"]


class FtLauncherError(Exception):
    """Base of all errors raised on purpose; the text is one sentence for a person."""

    exit_code = 1


class UsageError(FtLauncherError):
    """The user can mend it: a flag, a key or a file. Nothing was started."""

    exit_code = 2


class RankMonitorClientError(FtLauncherError):
    """The rank used `RankMonitorClient` in a way that cannot be meant (a section opened twice, say)."""
