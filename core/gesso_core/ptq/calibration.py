"""Calibration: what every layer sees while the 16-bit model draws the calibration prompts.

The pictures are drawn by the real denoiser, every step of them and both halves of the guidance.
Of each layer a uniform sample of its inputs stays on disk (`samples`), and the largest magnitude
of every channel over *all* tokens. Memory does not grow with the number of prompts.

A folder of captures belongs to one set of choices (`Plan`): it is used again for the same, and
refused for any other.
"""

# B rows of the network   N tokens   M samples   K channels   E entries

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from gesso_core.errors import NumericalError, WeightsError
from gesso_core.pipelines.denoiser import Denoiser
from gesso_core.pipelines.recipe import GenerationRequest, Recipe
from gesso_core.ptq.choices import refuse_other, write_json
from gesso_core.ptq.measuring import FILL, behind_parent, parent_inputs
from gesso_core.ptq.samples import Entries, SampleWriter, read_sample
from gesso_core.quant.layer import Evaluate
from gesso_core.quant.layer_map import LayerRule, matrix_of
from gesso_core.safe_files import read_json, read_tensors

MANIFEST: Final = "calibration.json"
MAXIMA: Final = "channel_maxima.safetensors"
DEFAULT_SEED: Final = 12345
DEFAULT_TOKENS: Final = 4096
LEAST_SEQUENCES: Final = 32
# What may wait in memory, for all layers together, until it goes to disk.
PENDING_BYTES: Final = 64 * 1024 * 1024
BATCH_PIXELS: Final = 4 * 1024 * 1024
LARGEST_BATCH: Final = 32

OnDone = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Every choice that the captured numbers depend on."""

    model: str
    weights_sha256: str
    prompts_sha256: str
    prompts: int
    sampler: str
    steps: int
    guidance_scale: float
    size: tuple[int, int]
    seed: int
    dtype: str
    max_tokens: int
    layers: tuple[str, ...]
    sequences: tuple[str, ...]  # of these layers, whole sequences

    def as_json(self) -> dict[str, Any]:
        """The plan as it reads back from a file."""
        content: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return content


@dataclass(frozen=True, eq=False)
class LayerSample:
    """Inputs of one layer, as `quantize_linear` wants them.

    Attributes:
        x_MK: rows of the input.
        maxima_K: largest magnitude over all tokens that passed, not only over the sample.
        sequence: rows that belong together.
        evaluate: from outputs to where their error counts; None means that it counts itself.
    """

    x_MK: Tensor
    maxima_K: Tensor
    sequence: int = 1
    evaluate: Evaluate | None = None


def make_plan(
    denoiser: Denoiser,
    rules: Mapping[str, LayerRule],
    prompts: Sequence[str],
    *,
    steps: int | None = None,
    seed: int = DEFAULT_SEED,
    max_tokens: int = DEFAULT_TOKENS,
) -> Plan:
    """The plan for these prompts; what is None takes the model's default."""
    recipe = _recipe(denoiser, prompts[0], seed, steps)
    return Plan(
        model=denoiser.entry.name,
        weights_sha256=denoiser.identity.weights_sha256,
        prompts_sha256=hashlib.sha256("\n".join(prompts).encode()).hexdigest(),
        prompts=len(prompts),
        sampler=recipe.sampler,
        steps=recipe.steps,
        guidance_scale=recipe.guidance_scale,
        size=recipe.model_size,
        seed=seed,
        dtype=str(denoiser.dtype).removeprefix("torch."),
        max_tokens=max_tokens,
        layers=tuple(rules),
        sequences=tuple(name for name, rule in rules.items() if rule.measure == "parent"),
    )


def is_captured(folder: Path, plan: Plan) -> bool:
    """Whether the folder holds all that the plan asks for.

    Raises:
        WeightsError: it holds captures of another plan, and says what differs.
    """
    if not (folder / MANIFEST).exists():
        return False
    found = read_json(folder / MANIFEST)
    complete = bool(found.pop("complete", False))
    refuse_other(
        found,
        plan.as_json(),
        f"{folder} holds captures of another run, which must not be mixed with these; it",
    )
    return complete


def capture(
    denoiser: Denoiser,
    rules: Mapping[str, LayerRule],
    prompts: Sequence[str],
    plan: Plan,
    folder: Path,
    *,
    on_done: OnDone = lambda done, total: None,
) -> None:
    """Draw the prompts and keep what the layers of ``plan`` see. ``on_done``: steps of all steps.

    An interrupted capture starts again from nothing, a complete one stays as it is.
    """
    if is_captured(folder, plan):
        return
    forget(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _write_manifest(folder, plan, complete=False)
    recorder = _Recorder(denoiser.model, rules, plan, folder)
    most = max(1, min(LARGEST_BATCH, BATCH_PIXELS // (plan.size[0] * plan.size[1])))
    done, total = 0, len(prompts) * plan.steps
    with recorder.listening():
        for start in range(0, len(prompts), most):
            numbered = enumerate(prompts[start : start + most], start=plan.seed + start)
            recipes = [_recipe(denoiser, prompt, seed, plan.steps) for seed, prompt in numbered]
            for _ in _steps(denoiser, recipes):
                recorder.flush_if_full()
                done += len(recipes)
                on_done(done, total)
    recorder.finish()
    _write_manifest(folder, plan, complete=True)


def forget(folder: Path) -> None:
    """Remove captures.

    Raises:
        WeightsError: the folder holds other files; it stays as it is.
    """
    if (folder / MANIFEST).exists():
        shutil.rmtree(folder)
    elif folder.exists() and any(folder.iterdir()):
        raise WeightsError(
            f"{folder} is not empty, and what it holds are not captured inputs; give another folder"
        )


def read_layer(
    folder: Path, names: Sequence[str], rule: LayerRule, model: nn.Module
) -> LayerSample:
    """The captured inputs of a layer, or of several that read the same.

    Raises:
        WeightsError: there are none; says how to make them.
    """
    name = names[0]
    entries = read_sample(folder / name)
    maxima = read_tensors(folder / MAXIMA) if (folder / MAXIMA).exists() else {}
    if not entries or name not in maxima or not (folder / MANIFEST).exists():
        raise WeightsError(
            f"{folder} has no calibration for {name}; run gesso quantize without an interruption "
            "in its calibration, or with --fresh, so that the model draws its prompts"
        )
    x = entries["x"]
    if rule.measure == "layer":
        return LayerSample(x_MK=x, maxima_K=maxima[name])
    parent = model.get_submodule(name.rpartition(".")[0])
    rows = {n.rpartition(".")[2]: len(matrix_of(model.get_submodule(n), n)[0]) for n in names}
    return LayerSample(
        x_MK=x.flatten(0, 1),
        maxima_K=maxima[name],
        sequence=x.shape[1],
        evaluate=behind_parent(parent, rows, entries),
    )


class _Recorder:
    """Listens to the inputs of the layers, and hands them to one `SampleWriter` each."""

    def __init__(
        self, model: nn.Module, rules: Mapping[str, LayerRule], plan: Plan, folder: Path
    ) -> None:
        self.model, self.rules, self.plan, self.folder = model, rules, plan, folder
        self.writers: dict[str, SampleWriter] = {}
        self.maxima: dict[str, Tensor] = {}

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Hooks on the layers for as long as the block lasts."""
        handles = []
        try:
            for name, rule in self.rules.items():
                place = name.rpartition(".")[0] if rule.measure == "parent" else name
                module = self.model.get_submodule(place)
                handles.append(module.register_forward_pre_hook(self._hook(name, rule)))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def flush_if_full(self) -> None:
        """To disk with all that waits, once that is much."""
        if sum(writer.pending_bytes for writer in self.writers.values()) > PENDING_BYTES:
            for writer in self.writers.values():
                writer.flush()

    def finish(self) -> None:
        """Check and close the samples."""
        for name in self.rules:
            if name not in self.writers:
                raise WeightsError(
                    f"{name} was never used while the model drew its prompts; "
                    "take it out of the layer map"
                )
            self.writers[name].finish()
        save_file({k: v.cpu() for k, v in self.maxima.items()}, self.folder / MAXIMA)

    def _hook(self, name: str, rule: LayerRule) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            if rule.measure == "parent":
                entries = parent_inputs(module, arguments)
                x = entries["x"]
            else:
                x = arguments[0].detach()
                entries = {"x": x.flatten(0, -2)}
            maxima_K = x.flatten(0, -2).abs().amax(dim=0).float()
            if not bool(maxima_K.isfinite().all()):
                raise NumericalError(
                    f"the input of {name} became NaN or infinite; calibrate in float32, or in the "
                    "number format that the weights were trained for"
                )
            known = self.maxima.get(name)
            self.maxima[name] = maxima_K if known is None else torch.maximum(known, maxima_K)
            self._writer(name, rule, entries).add(entries)

        return hook

    def _writer(self, name: str, rule: LayerRule, entries: Entries) -> SampleWriter:
        if name not in self.writers:
            most = self.plan.max_tokens
            if rule.measure == "parent":
                most = max(most // entries["x"].shape[1], LEAST_SEQUENCES)
            self.writers[name] = SampleWriter(self.folder / name, most, self.plan.seed, FILL)
        return self.writers[name]


def _steps(denoiser: Denoiser, recipes: Sequence[Recipe]) -> Iterator[None]:
    drafts = [denoiser.begin(recipe) for recipe in recipes]
    while not drafts[0].done:
        drafts = denoiser.advance(drafts)
        yield


def _recipe(denoiser: Denoiser, prompt: str, seed: int, steps: int | None) -> Recipe:
    side = denoiser.entry.native_size
    return denoiser.recipe(
        GenerationRequest(prompt=prompt, width=side, height=side, seed=seed, steps=steps)
    )


def _write_manifest(folder: Path, plan: Plan, *, complete: bool) -> None:
    write_json(folder / MANIFEST, {**plan.as_json(), "complete": complete})
