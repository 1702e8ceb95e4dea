"""The partition of a map's places among programs."""

import triton
import triton.language as tl

LANES = 512  # places of a program: four a thread of 4 warps
LONGEST = 256  # of them along the dimension that lies innermost in memory


def tile(channels: int, width: int, innermost: bool) -> tuple[int, int]:
    """Returns the channels and columns of a tile, both powers of two, of a row of a map.

    Args:
        channels: of the map.
        width: of the map.
        innermost: whether the channels lie innermost in memory, else the columns do.
    """
    first, second = (channels, width) if innermost else (width, channels)
    inner = min(triton.next_power_of_2(first), LONGEST)
    outer = min(triton.next_power_of_2(second), LANES // inner)
    return (inner, outer) if innermost else (outer, inner)


@triton.jit
def places(channels, height, width, c_tiles, x_tiles, BLOCK_C: tl.constexpr, BLOCK_X: tl.constexpr):
    """Returns this program's tile of a map `[N, channels, height, width]` with c_tiles * x_tiles programs a row.

    Returns:
        Image and row; channels `[BLOCK_C]` and columns `[BLOCK_X]`; and which of these places there are.
    """
    program = tl.program_id(0).to(tl.int64)
    o_channel = program % c_tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    program = program // c_tiles
    o_x = program % x_tiles * BLOCK_X + tl.arange(0, BLOCK_X)
    program = program // x_tiles
    m_place = (o_channel < channels)[:, None] & (o_x < width)[None, :]
    return program // height, program % height, o_channel, o_x, m_place
