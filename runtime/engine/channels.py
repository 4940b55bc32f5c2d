"""Changes of the channels of a weight, which calibration for int8 makes and LoRA matrices follow.

A change acts along one axis of a weight W (N, K). So it acts in the same way on the factor of W's update B A that has
that axis: along K on A (r, K), and along N on B (N, r).
"""

from __future__ import annotations

from typing import Literal

import numpy as np

Kind = Literal["rotated", "scaled", "permuted"]


def changed(array: np.ndarray, axis: int, kind: Kind, numbers: np.ndarray) -> np.ndarray:
    """Changes the channels along an axis of an array.

    Args:
        array: A weight, or the factor of its update with that axis.
        axis: The axis.
        kind: "rotated": heads of D channels are multiplied by one rotation. "scaled": channels are multiplied.
            "permuted": channels are put in another order.
        numbers: D, (1,); the factors; or the places of the channels before, one number per channel.
    """
    if kind == "permuted":
        return np.take(array, numbers.astype(np.int64), axis)
    last = np.moveaxis(array, axis, -1)
    if kind == "scaled":
        result = last * numbers
    else:
        matrix = rotation(int(numbers[0]))
        result = (last.reshape(*last.shape[:-1], -1, len(matrix)) @ matrix).reshape(last.shape)
    return np.asarray(np.moveaxis(result, -1, axis), np.float32)


def rotation(size: int) -> np.ndarray:
    """Returns an orthogonal matrix (D, D) whose columns mix all channels as evenly as possible.

    It is a Hadamard matrix if D is a power of two, otherwise the discrete cosine transform.
    """
    if size & (size - 1) == 0:
        signs = np.ones((1, 1))
        while len(signs) < size:
            signs = np.block([[signs, signs], [signs, -signs]])
        return np.asarray(signs / np.sqrt(size))
    angles = np.pi / size * (np.arange(size)[:, None] + 0.5) * np.arange(size)
    cosines = np.cos(angles) * np.sqrt(2 / size)
    cosines[:, 0] = np.sqrt(1 / size)
    return np.asarray(cosines)
