"""Progress of a run: one line on the terminal now and then, and a plot of the loss."""

import sys
import time
from collections.abc import Sequence
from pathlib import Path


class ProgressLine:
    """Prints at most every ``interval_s`` seconds: share done, step, rate, smoothed loss."""

    def __init__(self, title: str, interval_s: float = 15.0) -> None:
        self.title, self.interval_s = title, interval_s
        self.loss: float | None = None
        self._last = time.monotonic()
        self._samples = 0

    def update(self, fraction: float, step: int, loss: float, samples: int) -> float | None:
        """Count one update; returns the smoothed loss when a line was printed."""
        self.loss = loss if self.loss is None else 0.98 * self.loss + 0.02 * loss
        self._samples += samples
        passed = time.monotonic() - self._last
        if passed < self.interval_s:
            return None
        print(
            f"{self.title} {fraction:6.1%}  step {step}  loss {self.loss:.4f}  "
            f"{self._samples / passed:.0f} samples/s",
            file=sys.stderr,
            flush=True,
        )
        self._last, self._samples = time.monotonic(), 0
        return self.loss


def plot_losses(losses: Sequence[tuple[int, float]], title: str, path: Path) -> None:
    """Write the loss curve as PNG; both axes logarithmic."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.loglog([step for step, _ in losses], [loss for _, loss in losses])
    axes.set(title=title, xlabel="update", ylabel="loss (smoothed)")
    axes.grid(visible=True, which="both", alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
