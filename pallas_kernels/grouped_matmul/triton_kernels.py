"""The kernel of ``triton``; ``packing`` has the order of the weights."""

import triton
import triton.language as tl


@triton.jit
def _grouped_matmul_kernel(
    x,  # [num_rows, D_IN]
    packed,  # [blocks of inputs, D_OUT, 8]
    scale,  # [D_IN / GROUP, D_OUT]
    zero,  # as scale, or None
    num_rows,
    sums,  # [splits, num_rows, D_OUT]
    D_IN: tl.constexpr,
    D_OUT: tl.constexpr,
    GROUP: tl.constexpr,
    TOKENS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    BITS: tl.constexpr,
    BLOCKS: tl.constexpr,
    TILES: tl.constexpr,
    EACH: tl.constexpr,
):
    """One program does some rows and outputs over ``EACH`` of the ``TILES`` tiles of ``BLOCKS`` blocks of inputs."""
    SIXTEENS: tl.constexpr = 16 // BITS  # of inputs, in a block
    BLOCK: tl.constexpr = 16 * SIXTEENS
    INPUTS: tl.constexpr = BLOCK * BLOCKS
    # Sixteens of a block that share a scale.
    SHARED: tl.constexpr = SIXTEENS if GROUP == D_IN or GROUP % INPUTS == 0 else (2 if GROUP % 32 == 0 else 1)
    MASKED: tl.constexpr = D_IN % INPUTS != 0
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    column = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    split = tl.program_id(2)
    is_row = token < num_rows
    # Past the last output the last one is computed again, and dropped.
    stored = tl.minimum(column, D_OUT - 1) if D_OUT % OUTPUTS else column
    word = tl.arange(0, 8 * BLOCKS)
    pair = tl.arange(0, 16 * BLOCKS)
    x_at = x + tl.minimum(token, num_rows - 1)[None, :] * D_IN + (pair // 16 * BLOCK + pair % 16)[:, None]
    words_at = packed + (word // 8 * (D_OUT * 8) + word % 8)[None, :] + stored[:, None] * 8
    total = tl.zeros([OUTPUTS, TOKENS], tl.float32)
    for tile in range(split * EACH, tl.minimum(split * EACH + EACH, TILES)):
        first = tile * INPUTS
        words_here = words_at + tl.cast(tile, tl.int64) * (BLOCKS * D_OUT * 8)
        if MASKED:
            # Whatever weights stand there are multiplied by zeros.
            words = tl.load(words_here, mask=(first + word // 8 * BLOCK < D_IN)[None, :], other=0)
        else:
            words = tl.load(words_here)
        for begin in tl.static_range(0, SIXTEENS, SHARED):
            at = (first + 16 * begin) // GROUP * D_OUT + stored
            offset = tl.load(zero + at).to(tl.int32) if zero is not None else None
            part = tl.zeros([OUTPUTS, TOKENS], tl.float32)
            for j in tl.static_range(begin, begin + SHARED):
                mask = is_row[None, :]
                if MASKED:
                    mask = mask & (first + pair // 16 * BLOCK < D_IN)[:, None]
                values = tl.load(x_at + first + 16 * j, mask=mask, other=0.0)
                weights = _unpacked(words, offset, j, BITS, values.dtype)
                part = tl.dot(weights, values, part, input_precision="ieee")
            total += part * tl.load(scale + at)[:, None]
    out = sums + (tl.cast(split, tl.int64) * num_rows + token)[None, :] * D_OUT + column[:, None]
    mask = is_row[None, :]
    if D_OUT % OUTPUTS:
        mask = mask & (column < D_OUT)[:, None]
    tl.store(out, total.to(sums.dtype.element_ty), mask=mask)


@triton.jit
def _unpacked(words, zero, J: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr):
    """Returns the weights of 16 inputs of each block, less their zeros: ``[outputs, 16 * blocks]``, exact in DTYPE."""
    if tl.float32 == DTYPE:
        MASK: tl.constexpr = 2**BITS - 1
        HALF: tl.constexpr = 2 ** (BITS - 1)
        offset = HALF if zero is None else HALF + zero[:, None]
        shifted = words >> (BITS * J)
        weights = _paired((shifted & MASK) - offset, ((shifted >> 16) & MASK) - offset).to(DTYPE)
    else:
        # Four bits below an exponent of which they are the last whole ones: 128 + n in bfloat16, 1024 + n in float16.
        # Two numbers in one operation; a conversion would be one for each, at a quarter of the speed.
        LEAST: tl.constexpr = 128 if tl.bfloat16 == DTYPE else 1024
        EXPONENT: tl.constexpr = 0x4300 if tl.bfloat16 == DTYPE else 0x6400
        low = (words >> (BITS * J)) & 0x000F000F
        if BITS == 8:
            high = (words >> (BITS * J + 4)) & 0x000F000F
            weights = (_halves(high + EXPONENT * 0x00010001, DTYPE) - (LEAST + 8)) * 16
            weights += _halves(low + EXPONENT * 0x00010001, DTYPE) - LEAST
            if zero is not None:
                weights -= zero.to(DTYPE)[:, None]
        elif zero is None:
            weights = _halves(low + EXPONENT * 0x00010001, DTYPE) - (LEAST + 8)
        else:
            # Subtracted while the numbers are integers, from 56, so that no difference is below 0 or above the 127 that
            # bfloat16 has room for.
            added = (EXPONENT + 56 - zero) * 0x00010001
            weights = _halves(low + added[:, None], DTYPE) - (LEAST + 56 + 8)
    return weights


@triton.jit
def _halves(words, DTYPE: tl.constexpr):
    """Returns the two numbers of each word, the lower half first, side by side."""
    return _paired(words.to(tl.int16).to(DTYPE, bitcast=True), (words >> 16).to(tl.int16).to(DTYPE, bitcast=True))


@triton.jit
def _paired(low, high):
    """Columns of two blocks in turn: ``[n, 2 * m]``."""
    return tl.reshape(tl.join(low, high), [low.shape[0], 2 * low.shape[1]])
