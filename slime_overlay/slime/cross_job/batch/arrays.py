"""Array leaves: what a NumPy array or a torch tensor is made of (type, shape, raw bytes), and back.

A leaf's type travels as JSON (`["numpy", "<f4"]`, `["torch", "bfloat16"]`), its bytes are C order, little or big
endian as the type says. Object dtypes, sparse and quantized tensors and array subclasses with state of their own are
refused when packing; a type or shape that does not fit its bytes is refused when reading. torch is never imported
here unless a tensor has to be made: a tensor that is given proves that it is imported already.
"""

import math
import re
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import BatchError

MAX_DIMS = 32  # NumPy 1's limit, so that every reader can make the view
ALIGNMENT = 8  # bytes; what the Arrow IPC stream itself aligns its buffers to

_SIMPLE_DTYPE = re.compile(r"[<>|][biufcSUVmM]\d{1,10}(\[\d{0,9}[A-Za-z]{1,7}\])?")
_MAX_DTYPE_DEPTH = 8

# Name of a torch dtype -> the NumPy dtype that its bytes are viewed as. NumPy has no bf16, fp8 or half complex: those
# are seen as unsigned integers of the same width.
_TORCH_DTYPES: dict[str, str] = {
    **{name: name for name in ("uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64", "bool")},
    **{name: name for name in ("float16", "float32", "float64", "complex64", "complex128")},
    "bfloat16": "uint16",
    "complex32": "uint32",
    "float8_e4m3fn": "uint8",
    "float8_e4m3fnuz": "uint8",
    "float8_e5m2": "uint8",
    "float8_e5m2fnuz": "uint8",
    "float8_e8m0fnu": "uint8",
    "float4_e2m1fn_x2": "uint8",
}


class Unsupported(Exception):
    """A value that no column type can hold. `path` grows from the inside out while it travels up a tree."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.path: list[str] = []


@dataclass(frozen=True)
class LeafType:
    """`token` is what is written (a dtype string, fields, a torch dtype's name), `dtype` how the bytes are seen."""

    library: str
    token: Any
    dtype: np.dtype[Any]

    def to_json(self) -> list[Any]:
        return [self.library, self.token]

    @staticmethod
    def from_json(value: object) -> "LeafType":
        """Raises BatchError for anything but a type that `leaf_type` could have written."""
        if isinstance(value, list) and len(value) == 2:
            library, token = value
            if library == "torch" and isinstance(token, str) and token in _TORCH_DTYPES:
                return LeafType(library, token, np.dtype(_TORCH_DTYPES[token]))
            if library == "numpy":
                dtype = _dtype_from_token(token, _MAX_DTYPE_DEPTH)
                if dtype.itemsize > 0 and not dtype.hasobject:
                    return LeafType(library, _frozen(token), dtype)
        raise BatchError(f"unknown array type {short(value)}")


@dataclass(frozen=True)
class Leaf:
    """One array or tensor that is about to be written."""

    type: LeafType
    shape: tuple[int, ...]
    value: Any

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.type.dtype.itemsize

    def write(self, out: npt.NDArray[np.uint8]) -> None:
        """Copy the elements in C order into `out`, exactly `nbytes` long; one pass, also from strided input."""
        if not out.size:
            return
        if self.type.library == "torch":
            _write_tensor(self.value, out)
        elif self.value.flags.c_contiguous:
            out[:] = self.value.reshape(-1).view(np.uint8)
        else:
            out[:] = 0  # a field-wise copy of a structured dtype leaves its padding as it was
            np.ndarray(self.shape, self.type.dtype, buffer=out.data)[...] = self.value


def is_leaf(value: object) -> bool:
    return isinstance(value, np.ndarray) or is_tensor(value)


def is_tensor(value: object) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, getattr(torch, "Tensor", ()))


def describe(value: Any) -> Leaf:
    """Type and shape of an array or tensor; reads none of its elements. Raises Unsupported."""
    leaf = Leaf(leaf_type(value), tuple(map(int, value.shape)), value)
    if len(leaf.shape) > MAX_DIMS:
        raise Unsupported(f"an array of {len(leaf.shape)} dimensions: at most {MAX_DIMS} are supported")
    return leaf


def leaf_type(value: Any) -> LeafType:
    if isinstance(value, np.ndarray):
        return _numpy_type(value)
    torch = sys.modules["torch"]
    if type(value) not in (torch.Tensor, torch.nn.Parameter):
        raise Unsupported(f"tensor subclass {type_name(value)}: turn it into a plain torch.Tensor first")
    if value.layout is not torch.strided or value.is_nested:
        raise Unsupported(f"a tensor of layout {value.layout}: call .to_dense() first")
    if value.is_quantized:
        raise Unsupported("a quantized tensor: call .dequantize() or .int_repr() first")
    if value.device.type == "meta":
        raise Unsupported("a meta tensor: it has no data")
    name = str(value.dtype).removeprefix("torch.")
    if name not in _TORCH_DTYPES:
        raise Unsupported(f"a tensor of dtype {value.dtype}: .view() it as a supported one first")
    return LeafType("torch", name, np.dtype(_TORCH_DTYPES[name]))


def view(type_: LeafType, shape: Sequence[Any], raw: npt.NDArray[np.uint8]) -> npt.NDArray[Any]:
    """The array of that type and shape at the start of `raw`, not copied. Raises BatchError if it does not fit."""
    if len(shape) > MAX_DIMS or any(type(size) is not int or size < 0 for size in shape):
        raise BatchError(f"impossible array shape {short(list(shape))}")
    nbytes = math.prod(shape) * type_.dtype.itemsize
    if nbytes > raw.size:
        raise BatchError(f"an array of shape {short(list(shape))} needs {nbytes} bytes, the buffer has {raw.size}")
    try:
        array: npt.NDArray[Any] = np.ndarray(tuple(shape), type_.dtype, buffer=raw.data if nbytes else b"")
    except (ValueError, TypeError, OverflowError, MemoryError) as error:
        raise BatchError(f"impossible array shape {short(list(shape))}: {error}") from None
    array.flags.writeable = False
    return array


def restore(type_: LeafType, array: npt.NDArray[Any]) -> Any:
    """What was packed: the array itself, or a torch.Tensor that shares its memory (imports torch)."""
    return array if type_.library == "numpy" else _tensor_over(_torch(), array, type_.token)


def _numpy_type(array: npt.NDArray[Any]) -> LeafType:
    if type(array) not in (np.ndarray, np.memmap):
        raise Unsupported(f"array subclass {type_name(array)}: turn it into a plain one with np.array(x)")
    return _numpy_leaf_type(array.dtype)


@lru_cache(maxsize=256)
def _numpy_leaf_type(dtype: np.dtype[Any]) -> LeafType:
    if dtype.hasobject or dtype.kind not in "biufcSUVmM" or dtype.itemsize <= 0:
        raise Unsupported(f"an array of dtype {dtype!s}: use a dtype of fixed-width items (for text, 'U' or 'S')")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # NumPy tells that a dtype's free-form metadata is not kept
            token = np.lib.format.dtype_to_descr(dtype)
        if _dtype_from_token(token, _MAX_DTYPE_DEPTH) == dtype:
            return LeafType("numpy", _frozen(token), dtype)
    except (ValueError, TypeError, BatchError):
        pass
    raise Unsupported(f"an array of dtype {dtype!s}, which NumPy cannot write down: .view() it as a plain dtype first")


def _dtype_from_token(token: Any, depth: int) -> np.dtype[Any]:
    """The dtype behind a string such as '<f4', or behind a list of fields [name, token] or [name, token, shape]."""
    if not depth:
        raise BatchError("array dtype nested too deep")
    try:
        if isinstance(token, str) and _SIMPLE_DTYPE.fullmatch(token):
            return np.dtype(token)
        if isinstance(token, (list, tuple)) and token:
            return np.lib.format.descr_to_dtype([_field(field, depth - 1) for field in token])
    except (ValueError, TypeError, KeyError, IndexError, OverflowError, MemoryError):
        pass
    raise BatchError(f"unknown array dtype {short(token)}")


def _frozen(token: Any) -> Any:
    return tuple(map(_frozen, token)) if isinstance(token, (list, tuple)) else token


def _field(field: Any, depth: int) -> tuple[Any, ...]:
    name, token, *shape = field
    name = tuple(name) if isinstance(name, list) else name  # (title, name)
    inner = token if isinstance(token, str) else [_field(part, depth - 1) for part in token]
    _dtype_from_token(token, depth)  # for its checks only: descr_to_dtype skips padding fields where it meets them
    return (name, inner, *map(tuple, shape))


def _write_tensor(value: Any, out: npt.NDArray[np.uint8]) -> None:
    torch = sys.modules["torch"]
    source = value.detach().resolve_conj().resolve_neg()
    if source.device.type == "cpu" and source.is_contiguous():
        # Not torch's copy_: its thread pool costs seconds for many small rows while others use the cores.
        out[:] = source.reshape(-1).view(torch.uint8).numpy()
    else:
        target = torch.from_numpy(out).view(source.dtype).reshape(source.shape)
        target.copy_(source)  # strided or from a device: still one copy


def _tensor_over(torch: ModuleType, array: npt.NDArray[Any], name: str) -> Any:
    dtype = getattr(torch, name, None)
    if dtype is None:
        raise BatchError(f"this torch ({torch.__version__}) has no dtype {name}; numpy_at() gives the raw elements")
    if not array.size:
        return torch.empty(array.shape, dtype=dtype, device="cpu")  # whatever the default device
    raw = array.reshape(-1).view(np.uint8)
    # One storage per row, of the row's size: pickling a tensor writes its whole storage.
    if torch.is_warn_always_enabled():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.from_numpy(raw).view(dtype).reshape(array.shape)
    return torch.from_numpy(raw).view(dtype).reshape(array.shape)


_torch_ready: ModuleType | None = None


def _torch() -> ModuleType:
    """torch, after its once-per-process warning about non-writable NumPy arrays has been spent out of sight.

    Read-only memory is the normal case here, and the tensors are documented as not to be written to.
    """
    global _torch_ready
    if _torch_ready is None:
        try:
            import torch
        except ImportError as error:
            raise BatchError(f"a tensor needs torch: {error}; numpy_at() reads without it") from error
        probe = np.zeros(1, np.uint8)
        probe.flags.writeable = False
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.from_numpy(probe)
        _torch_ready = torch
    return _torch_ready


def type_name(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."
