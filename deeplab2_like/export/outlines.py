"""Outlines of masks as polygons along the edges of their pixels."""

import cv2
import numpy as np

Ring = list[tuple[int, int]]


def find_outlines(mask: np.ndarray) -> list[list[Ring]]:
    """Traces the outlines of a mask.

    A ring runs along the edges of pixels, so the area inside it is the number of pixels exactly. Pixel (y, x) covers
    x..x + 1 and y..y + 1. Pixels that touch at a corner only belong to different polygons, so no ring touches itself
    from inside.

    Args:
        mask: bool [H, W].

    Returns:
        A polygon for each connected region, in the order of their first pixels row by row: its outer ring and then
        those of its holes, each a list of corners (x, y) of which the last one repeats the first.
    """
    padded = np.pad(mask, 1).astype(np.int8)  # [H + 2, W + 2]
    # Of the four pixels around a point: 0 if no edge turns there, +-1 at a corner, +-2 where two regions touch.
    turns = padded[:-1, :-1] - padded[:-1, 1:] - padded[1:, :-1] + padded[1:, 1:]  # [H + 1, W + 1]
    y, x = turns.nonzero()
    turn = turns[y, x].astype(np.int64)
    # A point where two regions touch is two corners: of the left and the right edge, in this order.
    y, x, turn = (np.repeat(values, np.abs(turn)) for values in (y, x, turn))
    if not y.size:
        return []
    is_double = np.abs(turn) == 2
    is_right = np.zeros(y.size, bool)
    is_right[1:] = is_double[1:] & (y[1:] == y[:-1]) & (x[1:] == x[:-1])
    # Its left edge meets the upper one if the pixel at the upper left is set, else the lower one.
    is_lower = is_double & (is_right == (turn > 0))
    order = np.lexsort((is_lower, y, x))  # Down the columns.
    # In each row and in each column, corners 1 and 2, 3 and 4 and so on are the ends of an edge.
    across = (np.arange(y.size) ^ 1).tolist()
    along = np.empty(y.size, np.int64)
    along[order[::2]], along[order[1::2]] = order[1::2], order[::2]
    return _assemble(mask, y.tolist(), x.tolist(), turn.tolist(), across, along.tolist())


def _assemble(
    mask: np.ndarray, y: list[int], x: list[int], turn: list[int], across: list[int], along: list[int]
) -> list[list[Ring]]:
    """Follows the edges from corner to corner, and groups the rings by region; see `find_outlines`.

    Args:
        mask: bool [H, W].
        y: Position of each corner, row by row.
        x: Likewise.
        turn: Sign of each corner: the first one of a ring is positive for an outer ring and negative for a hole.
        across: The other end of the horizontal edge at each corner.
        along: The other end of its vertical edge.
    """
    _, regions = cv2.connectedComponents(mask.astype(np.uint8), connectivity=4)
    polygons: dict[int, list[Ring]] = {}
    is_done = [False] * len(y)
    for first in range(len(y)):
        if is_done[first]:
            continue
        ring = []
        corner = first
        while not is_done[corner]:
            other = across[corner]
            is_done[corner] = is_done[other] = True
            ring += [(x[corner], y[corner]), (x[other], y[other])]
            corner = along[other]
        ring.append(ring[0])
        # The first corner is the upper left one: of the region's first pixel, or of a hole below one of its pixels.
        is_hole = turn[first] < 0
        row = y[first] - 1 if is_hole else y[first]
        # Holes run in the other direction, as GeoJSON asks for.
        polygons.setdefault(int(regions[row, x[first]]), []).append(ring[::-1] if is_hole else ring)
    return list(polygons.values())
