"""Imports torch with the warnings of its C++ side off, unless the user has chosen: it has 20 lines for a lost host.

Each is said by the launcher in one, with what to do about it. To be imported before anything else imports torch.
"""

import os

_NAME = "TORCH_CPP_LOG_LEVEL"  # read once, when torch is loaded; workers shall not inherit it

if _NAME in os.environ:
    import torch
else:
    os.environ[_NAME] = "FATAL"
    try:
        import torch  # noqa: F401
    finally:
        del os.environ[_NAME]
