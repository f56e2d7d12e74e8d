"""One quantized linear layer, as every part of gesso passes it around and as the file stores it.

    y = Q_x((x + shift) / λ) · Rᵀ  +  (x · downᵀ) · upᵀ  +  bias

R is the quantized residual ``W diag(λ) − up·down·diag(λ)``; ``down`` has 1/λ folded in, so the
branch reads the raw x; the bias already carries everything that the shift of the activations costs
(SVDQuant's ``bias''``). K is padded to whole groups: codes 0, λ 1, down 0.
"""

# N out channels   K in channels, padded   G groups along K   R rank

from dataclasses import dataclass
from typing import Any, Final, Literal, get_args

import torch
from gesso_kernels.number_formats import e2m1_values, unpack_consecutive
from torch import Tensor

from gesso_core.errors import WeightsError

WeightFormat = Literal["int4", "nvfp4", "int8"]
ActivationFormat = Literal["int4", "uint4", "nvfp4", "int8", "16bit"]

# Columns that share a scale; an int8 weight has one scale per row.
GROUP: Final[dict[WeightFormat, int | None]] = {"int4": 64, "nvfp4": 16, "int8": None}
_AGAIN: Final = "the file is damaged or was made by another tool: quantize or import again"
_LARGEST: Final = 65_504.0  # of float16
_REAL: Final = (torch.float16, torch.bfloat16, torch.float32)
_CODES: Final[dict[WeightFormat, torch.dtype]] = {"int8": torch.int8}
_SCALE: Final[dict[WeightFormat, tuple[torch.dtype, ...]]] = {
    "nvfp4": (torch.float8_e4m3fn,),
    "int8": (torch.float32,),
}


@dataclass(frozen=True, kw_only=True, eq=False)
class QuantizedLinear:
    """Weights of one layer; shapes below, all on the CPU as stored.

    Attributes:
        weight: number format of the residual.
        activation: number format that its input is quantized to at run time; ``"16bit"`` leaves it.
        in_features: columns without padding.
        codes: uint8 [N, K/2], consecutive nibbles; for int8: int8 [N, K].
        scale: [N, G]: 16 bit for int4, float8_e4m3fn for nvfp4; [N, 1] float32 for int8.
        tensor_scale: nvfp4 only: second scale, [1], or [N] where layers were concatenated.
        zero: weight-only layers from other files: added after scaling, [N, G], with unsigned codes.
        smooth: λ [K], 16 bit.
        down: [R, K], 16 bit, 1/λ folded in.
        up: [N, R], 16 bit.
        bias: [N] or None.
        shift: added to x before the quantizer (0.171875 after a GELU, else 0).
    """

    weight: WeightFormat
    activation: ActivationFormat
    in_features: int
    codes: Tensor
    scale: Tensor
    smooth: Tensor
    down: Tensor
    up: Tensor
    bias: Tensor | None = None
    tensor_scale: Tensor | None = None
    zero: Tensor | None = None
    shift: float = 0.0

    @property
    def out_features(self) -> int:
        """N."""
        return self.codes.shape[0]

    @property
    def padded_in(self) -> int:
        """K: ``in_features`` rounded up to whole groups."""
        return self.smooth.shape[0]

    @property
    def rank(self) -> int:
        """R."""
        return self.down.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by the names they have in the file; absent ones are left out."""
        names = ("codes", "scale", "tensor_scale", "zero", "smooth", "down", "up", "bias")
        found = {name: getattr(self, name) for name in names}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def residual(self) -> Tensor:
        """R dequantized, fp32 [N, K], in the smoothed space."""
        if self.weight == "int8":
            return self.codes.float() * self.scale.float()
        if self.weight == "nvfp4":
            values = e2m1_values(unpack_consecutive(self.codes, signed=False))
        else:
            values = unpack_consecutive(self.codes, signed=self.zero is None).float()
        groups = values.view(*self.scale.shape, -1) * self.scale.float()[..., None]
        if self.zero is not None:
            groups = groups + self.zero.float()[..., None]
        residual = groups.flatten(-2)
        return (
            residual if self.tensor_scale is None else residual * self.tensor_scale.float()[:, None]
        )

    def dense(self) -> Tensor:
        """The weight that this layer stands for, fp32 [N, in_features]; acts on the raw x."""
        weight = self.residual() / self.smooth.float() + self.up.float() @ self.down.float()
        return weight[:, : self.in_features]

    def require_valid(self, name: str) -> None:
        """Raise `WeightsError` naming the layer if its facts or tensors do not fit one another.

        What passes runs in every mode of its format. Other tools write these files as well, so
        types are checked as strictly as shapes.
        """
        self._require_facts(name)
        self._require_types(name)
        self._require_shapes(name)
        for part, tensor in self.tensors().items():
            values = tensor.float() if tensor.element_size() == 1 else tensor
            if part != "codes" and not bool(values.isfinite().all()):
                raise WeightsError(f"{name}.{part} has NaN or infinite values; {_AGAIN}")
        if not bool(self.smooth.all()):
            raise WeightsError(f"{name}.smooth has a 0, which inputs are divided by; {_AGAIN}")

    def _require_facts(self, name: str) -> None:
        for fact, known in (("weight", WeightFormat), ("activation", ActivationFormat)):
            _require(getattr(self, fact) in get_args(known), name, fact, getattr(self, fact),
                     f"one of {', '.join(get_args(known))}")  # fmt: skip
        fits = type(self.shift) in (int, float) and abs(self.shift) <= _LARGEST
        _require(fits, name, "shift", self.shift, "a number of 16 bit")
        _require(type(self.in_features) is int, name, "in_features", self.in_features, "a count")
        _require(
            self.activation != "nvfp4" or self.weight == "nvfp4",
            name, "activation", "nvfp4", f"what goes with {self.weight} weights",
        )  # fmt: skip
        unsigned = self.zero is not None
        if unsigned and (self.weight, self.activation) != ("int4", "16bit"):
            raise WeightsError(f"{name}.zero is for int4 weights with 16-bit inputs; {_AGAIN}")
        if self.tensor_scale is not None and self.weight != "nvfp4":
            raise WeightsError(f"{name}.tensor_scale is for nvfp4 weights; {_AGAIN}")

    def _require_types(self, name: str) -> None:
        allowed = {
            "codes": (_CODES.get(self.weight, torch.uint8),),
            "scale": _SCALE.get(self.weight, _REAL),
        }
        for part, tensor in self.tensors().items():
            types = allowed.get(part, _REAL)
            expected = " or ".join(str(dtype) for dtype in types)
            _require(tensor.dtype in types, name, f"{part} type", tensor.dtype, expected)
        for part in ("codes", "down"):
            tensor = getattr(self, part)
            shape = tuple(tensor.shape)
            matrix = tensor.ndim == 2 and (part == "down" or tensor.numel() > 0)
            _require(matrix, name, f"{part} shape", shape, "a matrix")

    def _require_shapes(self, name: str) -> None:
        group = GROUP[self.weight]
        columns = self.codes.shape[1] * (1 if self.weight == "int8" else 2)
        groups = 1 if group is None else columns // group
        rows = self.out_features
        if group is not None and columns % group:
            raise WeightsError(
                f"{name}: {columns} input columns are not whole groups of {group}; pad K to a "
                f"multiple of {group} with codes 0, smooth 1 and down 0, as gesso quantize does"
            )
        expected: dict[str, set[tuple[int, ...]]] = {
            "scale": {(rows, groups)},
            "tensor_scale": {(1,), (rows,)},
            "zero": {(rows, groups)},
            "smooth": {(columns,)},
            "down": {(self.rank, columns)},
            "up": {(rows, self.rank)},
            "bias": {(rows,)},
        }
        for tensor, shapes in expected.items():
            found = getattr(self, tensor)
            if found is not None and tuple(found.shape) not in shapes:
                raise WeightsError(
                    f"{name}.{tensor} has the shape {tuple(found.shape)}, expected "
                    f"{' or '.join(map(str, sorted(shapes)))} beside codes "
                    f"{tuple(self.codes.shape)}; the file mixes layers of different models"
                )
        if not 0 < self.in_features <= columns:
            raise WeightsError(f"{name}: in_features {self.in_features} is not in 1..{columns}")


def _require(fits: bool, name: str, what: str, given: Any, expected: str) -> None:
    if not fits:
        raise WeightsError(f"{name}: {what} is {str(given)[:60]!r}, expected {expected}; {_AGAIN}")


def pad_columns(x: Tensor, multiple: int, value: float = 0.0) -> Tensor:
    """(..., K) with K rounded up to a multiple, filled with ``value``."""
    missing = -x.shape[-1] % multiple
    return torch.nn.functional.pad(x, (0, missing), value=value) if missing else x
