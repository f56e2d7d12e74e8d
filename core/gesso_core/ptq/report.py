"""What quantization cost: the error of every layer beside that of plain rounding, and the bytes."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from math import exp, log
from pathlib import Path
from typing import Any, Final

from gesso_core.errors import ConfigError, WeightsError
from gesso_core.safe_files import read_json

REPORT_FILE: Final = "quantization_report.json"
# A layer may be exact (all of it in 16 bit); the mean of logarithms needs a floor.
SMALLEST: Final = 1e-9


@dataclass(frozen=True, kw_only=True)
class LayerError:
    """One layer. Errors are ‖y − y₁₆‖ / ‖y₁₆‖ of its outputs on tokens that it was not fitted to.

    ``error`` as quantized; ``naive`` with weights and inputs rounded in the same formats, without
    smoothing, branch or GPTQ. ``alpha``, ``beta``: exponents of the smoothing that was chosen.
    ``largest_input``: over all tokens of the calibration.
    """

    name: str
    weight: str
    activation: str
    in_features: int
    out_features: int
    rank: int
    nbytes: int
    nbytes_16bit: int
    error: float
    naive: float
    alpha: float = 0.0
    beta: float = 0.0
    iterations: int = 0
    largest_input: float = 0.0

    @property
    def gain(self) -> float:
        """How many times smaller than the naive error."""
        return self.naive / max(self.error, SMALLEST)


@dataclass(frozen=True, kw_only=True)
class QuantizationReport:
    """A quantized model: its layers, and the bytes of all its weights, quantized or not."""

    model: str
    format: str
    rank: int
    nbytes: int
    nbytes_16bit: int
    layers: tuple[LayerError, ...]

    @property
    def error(self) -> float:
        """Geometric mean of the layers' errors."""
        return _geometric_mean([layer.error for layer in self.layers])

    @property
    def naive(self) -> float:
        """The same of the naive errors."""
        return _geometric_mean([layer.naive for layer in self.layers])

    def markdown(self) -> str:
        """A table with one line per layer, the means and the bytes below it."""
        lines = [
            "| layer | K → N | weight | input | error | naive | gain |",
            "|---|---|---|---|---|---|---|",
        ]
        lines += [
            f"| {layer.name} | {layer.in_features} → {layer.out_features} | {layer.weight} | "
            f"{layer.activation} | {layer.error:.4f} | {layer.naive:.4f} | {layer.gain:.1f}x |"
            for layer in self.layers
        ]
        lines.append(
            f"| geometric mean | | | | {self.error:.4f} | {self.naive:.4f} | "
            f"{self.naive / max(self.error, SMALLEST):.1f}x |"
        )
        share = self.nbytes / self.nbytes_16bit
        lines += ["", f"{self.model} in {self.format}, rank {self.rank}: {self.nbytes:,} bytes, "
                  f"{share:.3f} of the {self.nbytes_16bit:,} in 16 bit."]  # fmt: skip
        return "\n".join(lines)

    def save(self, folder: Path) -> None:
        """Write ``quantization_report.json`` and the table as ``quantization_report.md``."""
        content = asdict(self) | {"error": self.error, "naive": self.naive}
        (folder / REPORT_FILE).write_text(json.dumps(content, indent=2) + "\n")
        (folder / REPORT_FILE).with_suffix(".md").write_text(self.markdown() + "\n")


def load_report(folder: Path) -> QuantizationReport:
    """Read the report in the folder of a quantized model.

    Raises:
        WeightsError: there is none, or it is not one of ours.
    """
    content = read_json(folder / REPORT_FILE)
    try:
        layers = tuple(LayerError(**layer) for layer in content["layers"])
        known = {field.name for field in fields(QuantizationReport)} - {"layers"}
        return QuantizationReport(**{key: content[key] for key in known}, layers=layers)
    except (KeyError, TypeError) as error:
        raise WeightsError(
            f"{folder / REPORT_FILE} is not a report of gesso quantize ({error}); quantize again"
        ) from error


def plot_errors(reports: Sequence[QuantizationReport], path: Path) -> None:
    """Write a picture of the errors, one line per report, and the naive ones dashed.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(
            "plots need matplotlib, which is not installed; add it with: pip install 'gesso[train]'"
        ) from error
    longest = max(len(report.layers) for report in reports)
    figure = Figure(figsize=(max(7.0, 0.16 * longest), 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots()
    for number, report in enumerate(reports):
        names = [layer.name for layer in report.layers]
        style = {"color": f"C{number}", "marker": ".", "linewidth": 1}
        axes.plot(names, [la.error for la in report.layers], **style, label=report.format)
        style |= {"linestyle": "--", "alpha": 0.5}
        axes.plot(
            names, [la.naive for la in report.layers], **style, label=f"{report.format}, naive"
        )
    axes.set(yscale="log", ylabel="relative output error", title=f"{reports[0].model}, by layer")
    axes.tick_params(axis="x", labelrotation=90, labelsize=6)
    axes.grid(visible=True, which="both", alpha=0.3)
    figure.legend(loc="outside right upper")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _geometric_mean(values: Sequence[float]) -> float:
    return exp(sum(log(max(value, SMALLEST)) for value in values) / len(values))
