"""The command ft_launcher, and python -m ft_launcher: what must come before torch is loaded, which takes a second."""

import os
import signal

# A scheduler's warning may come at any time, and is not meant to end the launcher.
for number in (signal.SIGUSR1, signal.SIGUSR2):
    if signal.getsignal(number) == signal.SIG_DFL:
        signal.signal(number, signal.SIG_IGN)

# SIGTERM is: but how, and with what exit code, only the launcher knows, who lets it through (signals.py).
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

# Torch's C++ side has 20 lines for a lost host; the launcher has one, with what to do about it. Torch reads this once,
# when it is loaded; the workers shall not inherit it.
LEVEL = "TORCH_CPP_LOG_LEVEL"
is_quiet = LEVEL not in os.environ
if is_quiet:
    os.environ[LEVEL] = "FATAL"
from ft_launcher.launcher import main  # noqa: E402

if is_quiet:
    del os.environ[LEVEL]

if __name__ == "__main__":
    main()
