"""Plain values, tensors and numpy's arrays as bytes, and back: nothing that is read this way can run code.

MessagePack with extensions of our own. What would come back as something else without a word (a set, a dataclass) is
refused; a tuple comes back as a list, as in JSON.
"""

import sys
from typing import Any

import msgspec

from ft_launcher.rollout.errors import DumpError

__all__ = ["decode", "encode"]

_SCALARS = {int, float, str, bytes, bool, type(None)}
_TENSOR, _ARRAY, _NUMBER = 1, 2, 3  # numpy's scalars are numbers of a type of their own
_NUMPY_KINDS = "biufc"  # booleans, integers, floats and complex numbers: no objects


class _Packed(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    dtype: str
    shape: list[int]
    data: bytes


def encode(value: Any, place: str) -> bytes:
    """Give the bytes of a value. Raises DumpError, which names the `place` in it, for what a dump does not hold."""
    try:
        _check(value, place)
        return msgspec.msgpack.encode(value, enc_hook=_packed)
    except OverflowError:
        raise DumpError(f"{place} holds an integer of more than 64 bits; a dump holds none") from None
    except RecursionError:
        raise DumpError(f"{place} is nested too deeply, or holds itself") from None
    except UnicodeEncodeError:
        raise DumpError(f"{place} holds text that is not Unicode (a lone surrogate)") from None


def decode(data: bytes | memoryview) -> Any:
    """Read what `encode` gave. Raises ValueError for anything else."""
    try:
        return msgspec.msgpack.decode(data, ext_hook=_unpacked)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _check(value: Any, place: str) -> None:
    kind = type(value)
    if kind in _SCALARS:
        return
    if kind is dict:
        for key, each in value.items():
            if type(key) not in (str, int):
                raise DumpError(f"{place} has the key {key!r}; keys of a dump are text or integers")
            if type(each) not in _SCALARS:
                _check(each, f"{place}[{key!r}]")
    elif kind in (list, tuple):
        # Tokens come in lists of thousands: those are looked at as a whole.
        if not set(map(type, value)) <= _SCALARS:
            for index, each in enumerate(value):
                _check(each, f"{place}[{index}]")
    elif _is_numpy(value):
        if value.dtype.kind not in _NUMPY_KINDS:
            raise DumpError(f"{place} is a numpy array of {value.dtype}; a dump holds arrays of numbers")
    elif not _is_tensor(value):
        module = "" if kind.__module__ == "builtins" else f"{kind.__module__}."
        raise DumpError(
            f"{place} is a {module}{kind.__qualname__}; a dump holds dicts, lists, numbers, text, bytes, "
            "None, tensors and numpy arrays"
        )
    elif value.layout is not _torch().strided or value.is_quantized:
        raise DumpError(f"{place} is a sparse or quantized tensor; a dump holds dense ones")


def _torch() -> Any:
    import torch

    return torch


def _is_tensor(value: Any) -> bool:
    # Where there is a tensor, torch is loaded.
    return "torch" in sys.modules and isinstance(value, _torch().Tensor)


def _is_numpy(value: Any) -> bool:
    return type(value).__module__ == "numpy" and hasattr(value, "dtype") and hasattr(value, "tobytes")


def _packed(value: Any) -> msgspec.msgpack.Ext:
    if _is_tensor(value):
        torch = _torch()
        # A view of the bytes, and not numpy's: that has no bfloat16.
        dense = value.detach().cpu().resolve_conj().resolve_neg().contiguous()
        data = dense.reshape(-1).view(torch.uint8).numpy().tobytes()
        packed = _Packed(str(value.dtype).removeprefix("torch."), list(value.shape), data)
        return msgspec.msgpack.Ext(_TENSOR, msgspec.msgpack.encode(packed))
    packed = _Packed(value.dtype.str, list(value.shape), value.tobytes())
    code = _ARRAY if type(value).__name__ == "ndarray" else _NUMBER
    return msgspec.msgpack.Ext(code, msgspec.msgpack.encode(packed))


def _unpacked(code: int, data: memoryview) -> Any:
    if code not in (_TENSOR, _ARRAY, _NUMBER):
        raise ValueError(f"extension {code} is not known")
    packed = msgspec.msgpack.decode(data, type=_Packed)
    return _tensor(packed) if code == _TENSOR else _array(packed, is_number=code == _NUMBER)


def _tensor(packed: _Packed) -> Any:
    torch = _torch()
    dtype = getattr(torch, packed.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"this torch has no dtype {packed.dtype!r}")  # noqa: TRY004 - the file is wrong, not a call
    flat = torch.frombuffer(bytearray(packed.data), dtype=torch.uint8) if packed.data else torch.empty(0).byte()
    try:
        return flat.view(dtype).reshape(packed.shape)
    except RuntimeError:
        raise ValueError(f"a tensor of {packed.dtype} {packed.shape} has {len(packed.data)} bytes") from None


def _array(packed: _Packed, *, is_number: bool) -> Any:
    import numpy as np

    try:
        dtype = np.dtype(packed.dtype)
    except TypeError:
        raise ValueError(f"numpy has no dtype {packed.dtype!r}") from None
    if dtype.kind not in _NUMPY_KINDS:
        raise ValueError(f"an array of {dtype} is not one of numbers")
    array = np.frombuffer(bytearray(packed.data), dtype=dtype).reshape(packed.shape)
    return array[()] if is_number else array
