"""The plain types that everything about pictures and space is said in."""

import numpy as np
from numpy.typing import NDArray

Point = tuple[float, float]  # x to the right, y down: pixels, whole numbers on pixel edges
Polygon = tuple[Point, ...]
Box = tuple[float, float, float, float]  # x0, y0, x1, y1: upright, exclusive at its end

Floats = NDArray[np.float64]  # what is computed with
Floats32 = NDArray[np.float32]  # what networks read and say
