"""How the places of a map are shared out among programs."""

import triton

LANES = 512  # places of a program: four a thread of 4 warps
LONGEST = 256  # of them along the dimension that lies innermost in memory


def tile(channels: int, width: int, innermost: bool) -> tuple[int, int]:
    """Channels and columns of a tile, both powers of two, of a row of a map.

    Args:
        channels: of the map.
        width: of the map.
        innermost: whether the channels lie innermost in memory, else the columns do.
    """
    first, second = (channels, width) if innermost else (width, channels)
    along = min(triton.next_power_of_2(first), LONGEST)
    across = min(triton.next_power_of_2(second), LANES // along)
    return (along, across) if innermost else (across, along)
