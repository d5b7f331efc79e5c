"""Weights in GGUF's blocks of 32: a quantised folder's own codes where a block type holds them.

    Q4_0    d (q - 8)      float16 d, codes of 4 bits
    Q4_1    d q + m        float16 d and m
    Q8_0    d q            float16 d, signed bytes

Symmetric weights of 3 and 4 bits are Q4_0 and those of 8 bits Q8_0, exactly. With zero points, 3 and 4 bits are Q4_1,
where m = -d z is rounded to float16, and 8 bits are rounded anew to Q8_0.
"""

from __future__ import annotations

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind
from numpy.typing import NDArray

from cotune.models.packed_weights import PackedWeight

BLOCK = 32
_MIDDLE_4, _MIDDLE_8 = 8, 128


def in_gguf_blocks(weight: PackedWeight) -> tuple[NDArray[np.uint8], Kind]:
    """Bytes of rows, uint8 (out, bytes), and their type; rows are a multiple of 32 long, and groups too."""
    num_out, num_in = weight.shape
    groups = np.arange(num_in // BLOCK) * BLOCK // weight.group_size
    scales = weight.scales[:, groups]
    if weight.bits == 8 and not weight.is_symmetric:
        return gguf.quants.quantize(weight.dequantised(), Kind.Q8_0), Kind.Q8_0
    codes = weight.codes.reshape(num_out, -1, BLOCK)
    heads = [_float16_bytes(scales)]
    if weight.bits == 8:
        # 0 to 255 around 128, as signed bytes.
        return _rows([*heads, codes ^ np.uint8(_MIDDLE_8)]), Kind.Q8_0
    if weight.is_symmetric:
        codes = codes + np.uint8(_MIDDLE_4 - 2 ** (weight.bits - 1))
    else:
        heads.append(_float16_bytes(-scales * weight.zeros[:, groups]))
    halves = codes[:, :, : BLOCK // 2] | codes[:, :, BLOCK // 2 :] << np.uint8(4)
    return _rows([*heads, halves]), Kind.Q4_0 if weight.is_symmetric else Kind.Q4_1


def fits_gguf_blocks(weight: PackedWeight) -> bool:
    """Whether no block of 32 crosses the border of a group, or the end of a row."""
    return weight.shape[1] % BLOCK == 0 and weight.group_size % BLOCK == 0


def _float16_bytes(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    return values.astype("<f2")[:, :, None].view(np.uint8)


def _rows(parts: list[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    blocks = np.concatenate(parts, axis=2)
    return blocks.reshape(len(blocks), -1)
