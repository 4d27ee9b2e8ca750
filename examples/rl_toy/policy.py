"""The language model: a GRU over eight letters with 16,392 parameters, and the file in which its weights travel."""

import hashlib
import os
from pathlib import Path

import msgspec
import numpy as np
import torch
from torch import Tensor, nn

LETTERS = "abcdefgh"
_HIDDEN = 64


class Policy(nn.Module):
    """Gives the log-probabilities of the next letter."""

    def __init__(self) -> None:
        super().__init__()
        self._embedding = nn.Embedding(len(LETTERS), 16)
        self._cell = nn.GRUCell(16, _HIDDEN)
        self._head = nn.Linear(_HIDDEN, len(LETTERS))

    def begin(self, samples: int) -> Tensor:
        """Give the state before the first letter."""
        return torch.zeros(samples, _HIDDEN)

    def forward(self, letters: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """letters: one of each sample. Gives (samples, 8) log-probabilities of the next, and the new state."""
        state = self._cell(self._embedding(letters), state)
        return self._head(state).log_softmax(-1), state


class _Weights(msgspec.Struct, frozen=True):
    version: str
    sha256: str  # of the values
    values: bytes  # float32, in the order of Policy.parameters()


def digest(policy: Policy) -> str:
    """Give the SHA-256 of the parameters' bits."""
    return hashlib.sha256(_values(policy)).hexdigest()


def write_weights(path: Path, version: str, policy: Policy) -> None:
    """Save so that under `path` stands all of it or nothing."""
    values = _values(policy)
    weights = _Weights(version, hashlib.sha256(values).hexdigest(), values)
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        file.write(msgspec.msgpack.encode(weights))
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def read_weights(path: Path, version: str) -> Policy:
    """Load the weights of this version. OSError, ValueError: they are not there, or not whole."""
    weights = msgspec.msgpack.decode(path.read_bytes(), type=_Weights)
    if weights.version != version:
        raise ValueError(f"{path} has version {weights.version!r}, not {version!r}")
    if hashlib.sha256(weights.values).hexdigest() != weights.sha256:
        raise ValueError(f"{path}: the checksum is wrong")
    policy = Policy()
    vector = torch.from_numpy(np.frombuffer(weights.values, dtype=np.float32).copy())
    nn.utils.vector_to_parameters(vector, policy.parameters())
    return policy


def _values(policy: Policy) -> bytes:
    return nn.utils.parameters_to_vector(policy.parameters()).detach().numpy().tobytes()
