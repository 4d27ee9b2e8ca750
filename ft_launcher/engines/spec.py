"""What an engine is: a command that starts one here, or the URL of one that somebody else runs."""

from collections.abc import Mapping, Sequence

import msgspec
from msgspec import Struct

from ft_launcher.errors import UsageError

__all__ = ["EngineSpec"]


class EngineSpec(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One engine. Either `command`, in which `{port}` stands for its port, or `url`."""

    name: str
    command: Sequence[str] = ()
    url: str = ""
    port: int = 0
    """0: a free one, chosen anew for every start."""
    host: str = "127.0.0.1"
    """At which it is asked."""
    env: Mapping[str, str] = msgspec.field(default_factory=dict)
    """Added to the supervisor's own environment; `{port}` as in the command."""
    cwd: str | None = None

    def check(self) -> None:
        """Raise UsageError for what cannot be meant."""
        # It stands in log lines and in names of files.
        if not 0 < len(self.name) <= 64 or not self.name.isprintable() or "/" in self.name:
            raise UsageError(f"engine {self.name!r}: its name must be 1 to 64 printable characters without a slash")
        if bool(self.command) == bool(self.url):
            raise UsageError(f"engine {self.name!r}: give either command or url")
        if self.url and not self.url.startswith(("http://", "https://")):
            raise UsageError(f"engine {self.name!r}: url is {self.url!r}; it must begin with http:// or https://")
        if not 0 <= self.port < 65536:
            raise UsageError(f"engine {self.name!r}: port is {self.port}; it must be 0 to 65535")

    def address(self, port: int) -> str:
        """Give the URL that it has with this port."""
        return self.url.rstrip("/") or f"http://{self.host}:{port}"

    def filled(self, text: str, port: int) -> str:
        """Put the port where `{port}` stands; other braces (JSON in a flag) stay."""
        return text.replace("{port}", str(port))
