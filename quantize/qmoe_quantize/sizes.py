"""From the frame of a few rows to the bytes of a whole matrix."""

from __future__ import annotations

from qmoe_codec import read_frame_header
from qmoe_codec.layout import round_up


def grown_frame_bytes(frame: bytes, scale: float) -> int:
    """Bytes that a matrix takes in an expert's record, if `frame` holds 1 / `scale` of its rows.

    Everything but the frame's header grows with the rows; each frame has a place in the record (spec 6.2).
    """
    sections = read_frame_header(frame).section_bytes
    growing = sections["levels"] + sections["row_index"] + sections["codewords"]
    return round_up(round(sections["header"] + growing * scale) + 24, 16)
