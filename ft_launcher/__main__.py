"""The command ft_launcher, and python -m ft_launcher: what must come before torch is loaded, which takes a second."""

import os
import signal

# What a scheduler says may come at any time. Only the launcher knows what it means, and lets it through (signals.py).
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2})

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
