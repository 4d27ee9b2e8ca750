"""What the engine supervisor raises on purpose."""

from ft_launcher.errors import FtLauncherError

__all__ = ["EngineCapacityError", "EngineError"]


class EngineError(FtLauncherError):
    """An engine or the supervisor cannot do what was asked; the text is one sentence for a person."""


class EngineCapacityError(EngineError):
    """Too few engines are left, as the others have used up their restarts."""
