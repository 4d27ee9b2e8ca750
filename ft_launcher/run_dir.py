"""The private directory of one launcher: where it may stand, how sockets are bound in it, and how it goes away."""

import os
import shutil
import socket
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path

from ft_launcher.errors import FtLauncherError

__all__ = ["RunDir", "find_sockets"]

_PREFIX = "ft_launcher_"


class RunDir:
    """A fresh directory that only this user can enter. Sockets are bound through its descriptor.

    A socket's address has room for 107 bytes, whatever TMPDIR says; and nobody can exchange a directory that is held.
    """

    def __init__(self, environ: Mapping[str, str]) -> None:
        """Create it in the first of the usual places that allows it.

        Raises FtLauncherError, naming all places tried, when none does.
        """
        tried = []
        for place in _places(environ):
            try:
                self.path = tempfile.mkdtemp(prefix=_PREFIX, dir=place)
            except OSError as error:
                tried.append(f"{place} ({error.strerror})")
                continue
            self._fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            found = os.fstat(self._fd)
            if found.st_uid == os.getuid() and stat.S_IMODE(found.st_mode) == stat.S_IRWXU:
                return
            os.close(self._fd)
            tried.append(f"{place} (not private)")
        raise FtLauncherError(f"no place for the launcher's sockets: tried {', '.join(tried)}")

    def listen(self, name: str) -> socket.socket:
        """Bind and give a listening SOCK_SEQPACKET socket `name` in the directory."""
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        listener.bind(f"/proc/self/fd/{self._fd}/{name}")
        os.chmod(name, stat.S_IRUSR | stat.S_IWUSR, dir_fd=self._fd)
        listener.listen(64)
        return listener

    def socket_path(self, name: str) -> str:
        """Give the path under which a rank finds socket `name`."""
        return os.path.join(self.path, name)  # noqa: PTH118 - a str for the environment

    def has(self, name: str) -> bool:
        """Say whether `name` can still be found by its path: cleaners and logouts remove such directories."""
        try:
            by_path, held = Path(self.path).stat(), os.fstat(self._fd)
            os.stat(name, dir_fd=self._fd)
        except OSError:
            return False
        return (by_path.st_dev, by_path.st_ino) == (held.st_dev, held.st_ino)

    def remove(self) -> None:
        """Remove the directory with all that is in it."""
        os.close(self._fd)
        shutil.rmtree(self.path, ignore_errors=True)


def find_sockets(name: str, environ: Mapping[str, str]) -> list[Path]:
    """Give the sockets of this name in all such directories of this user, dead ones too."""
    found: dict[tuple[int, int], Path] = {}
    for place in _places(environ):
        try:
            for path in Path(place).glob(f"{_PREFIX}*/{name}"):
                status = path.lstat()
                if stat.S_ISSOCK(status.st_mode) and status.st_uid == os.getuid():
                    found.setdefault((status.st_dev, status.st_ino), path)
        except OSError:  # not ours to look into, or it went away meanwhile
            continue
    return sorted(found.values())


def _places(environ: Mapping[str, str]) -> list[str]:
    own = [f"/run/user/{os.getuid()}", "/dev/shm", tempfile.gettempdir(), os.getcwd()]  # noqa: S108, PTH109
    return [place for place in (environ.get("XDG_RUNTIME_DIR"), *own) if place]
