"""What the checkpoint manager raises on purpose."""

from ft_launcher.errors import FtLauncherError

__all__ = ["CheckpointError"]


class CheckpointError(FtLauncherError):
    """A checkpoint could not be saved or loaded; the text is one sentence for a person."""
