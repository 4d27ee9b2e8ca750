"""What dumps of rollouts raise on purpose."""

from ft_launcher.errors import FtLauncherError

__all__ = ["DumpError"]


class DumpError(FtLauncherError):
    """A dump cannot be written or read; the text is one sentence for a person."""
