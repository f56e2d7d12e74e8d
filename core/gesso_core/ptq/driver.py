"""Quantize a model, layer by layer; killed at any moment, it continues.

Finished layers and a finished calibration stay; a calibration that was cut off begins again.

    folder/.work/choices.json        what this run was asked for; another run is refused
    folder/.work/calibration/        captured inputs (`calibration`)
    folder/.work/layers/NAME…        every finished layer, a canonical file of its own
    folder/quantization_report.json  errors and sizes (`report`)
    folder/config.json, gesso_quantized.safetensors      the result, written last

A layer's numbers depend on its own inputs, weights and seed only, so a run that was interrupted
ends with the same bytes as one that was not. ``.work`` is removed at the end.

Memory: on a CPU the model runs in float32, 4 bytes per weight, whatever it is stored in; beside it
lie the inputs of one layer and the fp32 copies of its matrix. Captures wait on disk.
"""

import shutil
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final, Literal

import torch
from torch import Tensor

from gesso_core.errors import InvalidRequest
from gesso_core.hub import DEFAULT_STORE, resolve_parts, trained_dtype
from gesso_core.hub.checkpoint import file_metadata, is_quantized, weight_files
from gesso_core.pipelines.denoiser import Denoiser
from gesso_core.pipelines.load import load_denoiser
from gesso_core.ptq import calibration
from gesso_core.ptq.calibration import DEFAULT_SEED, DEFAULT_TOKENS
from gesso_core.ptq.choices import refuse_other, write_json
from gesso_core.ptq.joined import join, split_rows
from gesso_core.ptq.prompts import checked_prompts, default_prompts
from gesso_core.ptq.report import LayerError, QuantizationReport, load_report
from gesso_core.ptq.settings import DEFAULT_RANK, FORMATS, Format, Settings, require_writable
from gesso_core.quant.canonical import (
    CANONICAL_FILE,
    QuantizedModel,
    read_about,
    read_canonical,
    write_canonical,
)
from gesso_core.quant.layer import LayerReport, QuantOptions, quantize_linear
from gesso_core.quant.layer_map import LayerRule, find_layers, layer_map, matrix_of
from gesso_core.quant.low_rank import Svd
from gesso_core.quant.options import HALF_TYPES
from gesso_core.quant.record import ActivationFormat, QuantizedLinear
from gesso_core.safe_files import read_header, read_json

Stage = Literal["calibrating", "quantizing"]
OnProgress = Callable[[Stage, int, int, str], None]

WORK: Final = ".work"


def quantize_model(
    name_or_folder: str | Path,
    out_folder: Path,
    *,
    to: Format,
    rank: int = DEFAULT_RANK,
    gptq: bool = False,
    svd: Svd = "randomized",
    layers: str = "sana",
    prompts: Sequence[str] | None = None,
    steps: int | None = None,
    seed: int = DEFAULT_SEED,
    max_tokens: int | None = None,
    captured: Path | None = None,
    on_progress: OnProgress = lambda stage, done, total, what: None,
    resume: bool = True,
    store: Path = DEFAULT_STORE,
) -> QuantizationReport:
    """Quantize a text-to-image model into ``out_folder``.

    Args:
        to: number format of weights and inputs; ``"w8a8"`` is 8 bit for both.
        rank: of the low-rank branch; 0 leaves it out.
        gptq: compensate the rounding of a weight in those that are rounded after it.
        svd: ``"exact"`` is slower by an order and hardly better.
        layers: the name of a layer map.
        prompts: to calibrate on; by default those that the model brings.
        steps: of every calibration picture; by default the model's.
        seed: of the pictures and of every random choice.
        max_tokens: rows that are kept of each layer's input; by default 4096, and with ``gptq``
            at least twice as many as the widest layer has columns.
        captured: where the captured inputs are kept, for several formats of one model; by default
            they are removed at the end.
        on_progress: stage, how much of how much, and the name of a finished layer.
        resume: continue what lies in the folder; otherwise begin anew.

    Raises:
        InvalidRequest: no prompts, a setting out of range, or a folder that cannot be written.
        WeightsError: the folder holds the work of another run.
        ConfigError: the layer map does not fit the model.
    """
    settings = Settings(
        to=to, rank=rank, gptq=gptq, svd=svd, layers=layers, steps=steps, seed=seed,
        max_tokens=max_tokens or DEFAULT_TOKENS,
    )  # fmt: skip
    rules = layer_map(layers)
    transformer = resolve_parts(name_or_folder, store=store).transformer
    if is_quantized(transformer):
        raise InvalidRequest(
            f"{name_or_folder} is quantized already; quantize the 16-bit model it was made from",
            field="model",
        )
    prompts = checked_prompts(
        list(default_prompts(name_or_folder, store=store) if prompts is None else prompts),
        "the list",
    )
    require_writable(out_folder)
    denoiser = load_denoiser(name_or_folder, store=store)
    denoiser.model.chunk_ffn(1)  # a layer worked through in parts would never be called
    found = find_layers(denoiser.model, rules)
    settings = settings.for_layers(denoiser.model, found, keep_tokens=max_tokens is not None)
    metadata = file_metadata(weight_files(transformer).files[0])
    run = _Run(
        denoiser=denoiser,
        rules=found,
        prompts=prompts,
        settings=settings,
        dtype=_sixteen_bit(transformer),
        autoencoder_sha256=str(metadata.get("autoencoder_sha256") or ""),
        folder=out_folder,
        captured=captured or out_folder / WORK / "calibration",
        on_progress=on_progress,
    )
    if not resume:
        run.forget()
    return run()


def _sixteen_bit(transformer: Path) -> torch.dtype:
    """Of scales, branches and all that is not quantized.

    What the model was trained for; where that was fp32, what it is stored in, so that nothing is
    rounded twice; bfloat16 where that is fp32 as well.
    """
    trained = trained_dtype(transformer)
    if trained in HALF_TYPES:
        return trained
    header = read_header(weight_files(transformer).files[0])
    stored = {entry["dtype"] for name, entry in header.items() if name != "__metadata__"}
    return torch.float16 if stored == {"F16"} else torch.bfloat16


@dataclass(frozen=True, kw_only=True)
class _Run:
    """One run of the quantizer; everything it does is on disk."""

    denoiser: Denoiser
    rules: Mapping[str, LayerRule]
    prompts: Sequence[str]
    settings: Settings
    dtype: torch.dtype
    autoencoder_sha256: str
    folder: Path
    captured: Path
    on_progress: OnProgress

    def __call__(self) -> QuantizationReport:
        made_by = self._made_by()
        if self._is_done(made_by):
            shutil.rmtree(self.folder / WORK, ignore_errors=True)
            return load_report(self.folder)
        self._begin(made_by)
        plan = self._plan()
        calibration.capture(
            self.denoiser, self.rules, self.prompts, plan, self.captured,
            on_done=lambda done, total: self.on_progress("calibrating", done, total, ""),
        )  # fmt: skip
        done = 0
        for names in self._groups():
            if not self._file(names).exists():
                self._quantize(names)
            done += len(names)
            self.on_progress("quantizing", done, len(self.rules), names[-1])
        return self._finish(made_by)

    def forget(self) -> None:
        """Remove what an earlier run left."""
        shutil.rmtree(self.folder / WORK, ignore_errors=True)
        calibration.forget(self.captured)
        (self.folder / CANONICAL_FILE).unlink(missing_ok=True)

    def _is_done(self, made_by: Mapping[str, Any]) -> bool:
        path = self.folder / CANONICAL_FILE
        if not path.exists():
            return False
        refuse_other(read_about(path)["made_by"], made_by, f"{self.folder} holds a model that")
        return True

    def _begin(self, made_by: Mapping[str, Any]) -> None:
        path = self.folder / WORK / "choices.json"
        if path.exists():
            refuse_other(
                read_json(path), made_by, f"{self.folder} holds the unfinished work of a run that"
            )
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, made_by)

    def _plan(self) -> calibration.Plan:
        settings = self.settings
        return calibration.make_plan(
            self.denoiser, self.rules, self.prompts,
            steps=settings.steps, seed=settings.seed, max_tokens=settings.max_tokens,
        )  # fmt: skip

    def _made_by(self) -> dict[str, Any]:
        settings = asdict(self.settings)
        for planned in ("steps", "seed", "max_tokens"):
            del settings[planned]
        content: dict[str, Any] = {
            "model": self.denoiser.entry.name,
            "weights_sha256": self.denoiser.identity.weights_sha256,
            "trained_dtype": str(self.dtype).removeprefix("torch."),
            "autoencoder_sha256": self.autoencoder_sha256,
            **settings,
            "calibration": self._plan().as_json(),
            "gesso": version("gesso"),
        }
        return content

    def _groups(self) -> list[list[str]]:
        """Layers that are quantized as one; most are alone."""
        groups: dict[tuple[str, str], list[str]] = {}
        for name, rule in self.rules.items():
            parent = name.rpartition(".")[0]
            key = (name, "") if rule.share is None else (parent, rule.share)
            groups.setdefault(key, []).append(name)
        return list(groups.values())

    def _file(self, names: Sequence[str]) -> Path:
        return self.folder / WORK / "layers" / f"{names[0]}.safetensors"

    def _quantize(self, names: Sequence[str]) -> None:
        model, rule = self.denoiser.model, self.rules[names[0]]
        sample = calibration.read_layer(self.captured, names, rule, model)
        matrices = [matrix_of(model.get_submodule(name), name) for name in names]
        options = self._options(names[0], rule)
        record, about = quantize_linear(
            *join(matrices),
            sample.x_MK,
            options,
            evaluate=sample.evaluate,
            sequence=sample.sequence,
            # Only unsigned codes gain from it: other grids are symmetric.
            shift=rule.shift if options.activation == "uint4" else 0.0,
            parts=tuple(len(weight) for weight, _ in matrices) if len(names) > 1 else (),
        )
        records = split_rows(record, matrices) if len(names) > 1 else [record]
        largest = float(sample.maxima_K.max())
        errors = [
            _error_of(name, part, about, largest) for name, part in zip(names, records, strict=True)
        ]
        content = QuantizedModel(
            layers=dict(zip(names, records, strict=True)),
            plain={},
            made_by={"errors": [asdict(error) for error in errors]},
        )
        write_canonical(self._file(names), content)

    def _options(self, name: str, rule: LayerRule) -> QuantOptions:
        weight = FORMATS[self.settings.to]
        activation: ActivationFormat = weight
        if rule.activation == "16bit":
            activation = "16bit"
        elif rule.shift and weight == "int4":
            activation = "uint4"
        return QuantOptions(
            weight=weight,
            activation=activation,
            rank=self.settings.rank,
            svd=self.settings.svd,
            gptq=self.settings.gptq,
            dtype=self.dtype,
            seed=self.settings.seed ^ zlib.crc32(name.encode()),
        )

    def _finish(self, made_by: Mapping[str, Any]) -> QuantizationReport:
        layers: dict[str, QuantizedLinear] = {}
        errors: list[LayerError] = []
        for names in self._groups():
            content = read_canonical(self._file(names))
            layers |= content.layers
            errors += [LayerError(**error) for error in content.made_by["errors"]]
        plain = self._plain()
        report = QuantizationReport(
            model=self.denoiser.entry.name,
            format=self.settings.to,
            rank=self.settings.rank,
            nbytes=sum(t.nbytes for t in plain.values()) + sum(e.nbytes for e in errors),
            nbytes_16bit=sum(t.nbytes for t in plain.values())
            + sum(e.nbytes_16bit for e in errors),
            layers=tuple(errors),
        )
        report.save(self.folder)
        write_json(self.folder / "config.json", self.denoiser.model.config.to_diffusers())
        content = QuantizedModel(layers=layers, plain=plain, made_by=made_by)
        write_canonical(self.folder / CANONICAL_FILE, content)
        shutil.rmtree(self.folder / WORK)
        return report

    def _plain(self) -> dict[str, Tensor]:
        """What is not quantized, in 16 bit."""
        state = self.denoiser.model.state_dict()
        return {
            key: tensor.to(self.dtype) if tensor.is_floating_point() else tensor
            for key, tensor in state.items()
            if key.rpartition(".")[0] not in self.rules
        }


def _error_of(
    name: str, record: QuantizedLinear, about: LayerReport, largest_input: float
) -> LayerError:
    dense = record.out_features * (record.in_features + (record.bias is not None))
    return LayerError(
        name=name,
        weight=record.weight,
        activation=record.activation,
        in_features=record.in_features,
        out_features=record.out_features,
        rank=record.rank,
        nbytes=record.nbytes,
        nbytes_16bit=2 * dense,
        error=about.error,
        naive=about.naive_error,
        alpha=about.alpha,
        beta=about.beta,
        iterations=about.iterations,
        largest_input=largest_input,
    )
