"""The state of a user's functions as plain data, which `torch.load(weights_only=True)` reads without running code."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

# A NumPy array is kept as a dict with these keys, its bytes in a tensor, as `weights_only` loads no arrays.
ARRAY = {"__numpy__", "dtype", "shape"}


def pack(value: Any, name: str) -> Any:
    """`value`, made of numbers, strings, bytes, tensors, arrays, lists, tuples and dicts, as plain data.

    NumPy's scalars and objects of subclasses become objects of Python's and torch's own classes. Raises `ValueError`
    for anything else, saying where in `name` it is.
    """
    if value is None or isinstance(value, (bool, bytes, torch.dtype, torch.device)):
        return value
    if isinstance(value, torch.Tensor):
        # `weights_only` loads no subclasses of Tensor
        return value.detach().as_subclass(torch.Tensor)
    # the mask of a masked array would be lost
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufcmMSU" and not isinstance(value, np.ma.MaskedArray):
        content = torch.frombuffer(bytearray(value.tobytes()), dtype=torch.uint8) if value.size else torch.empty(0)
        return {"__numpy__": content, "dtype": value.dtype.str, "shape": list(value.shape)}
    if isinstance(value, np.generic) and not isinstance(value.item(), np.generic):
        return pack(value.item(), name)
    # `str.__str__` and not `str()`: a subclass of str, such as an enumeration, may have a `__str__` of its own
    if isinstance(value, str):
        return str.__str__(value)
    kinds: tuple[Any, ...] = (int, float, complex)
    for kind in kinds:
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, dict):
        return {pack(key, f"a key of {name}"): pack(item, f"{name}[{key!r}]") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [pack(item, f"{name}[{i}]") for i, item in enumerate(value)]
        return tuple(items) if isinstance(value, tuple) else items
    raise ValueError(
        f"{name} is of type {type(value).__module__}.{type(value).__qualname__}, which a checkpoint cannot keep: "
        "return numbers, strings, tensors, arrays, lists and dicts"
    )


def unpack(value: Any) -> Any:
    """The value that `pack` was given, except that scalars and containers are of Python's own types."""
    if isinstance(value, dict):
        if value.keys() == ARRAY:
            content = value["__numpy__"].numpy().tobytes()
            return np.frombuffer(content, dtype=np.dtype(value["dtype"])).reshape(value["shape"]).copy()
        return {key: unpack(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [unpack(item) for item in value]
        return tuple(items) if isinstance(value, tuple) else items
    return value
