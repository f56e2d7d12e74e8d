"""Quantized layers and models of random numbers, and files of foreign formats with them."""

import json
from pathlib import Path

import torch
from gesso_core.interchange.formats import export_quantized
from gesso_core.quant.canonical import QuantizedModel
from gesso_core.quant.record import QuantizedLinear, WeightFormat
from gesso_core.safe_files import read_header, read_tensors
from gesso_kernels.number_formats import pack_consecutive
from safetensors.torch import load_file, save_file
from torch import Tensor

CASES = Path(__file__).parents[1] / "golden" / "cases" / "svdquant"


def random_layer(
    rows: int,
    columns: int,
    rank: int = 16,
    weight: WeightFormat = "int4",
    dtype: torch.dtype = torch.bfloat16,
    *,
    bias: bool = True,
    tensor_scales: int = 1,
    seed: int = 0,
) -> QuantizedLinear:
    generator = torch.Generator().manual_seed(seed)
    padded = -(-columns // 64) * 64
    group = 64 if weight == "int4" else 16

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    low, high = (-7, 8) if weight == "int4" else (0, 16)
    codes = torch.randint(low, high, (rows, padded), generator=generator)
    codes[:, columns:] = 0
    scale = (normal(rows, padded // group).abs() + 0.1).to(dtype)
    smooth, down = normal(padded).abs() + 0.5, normal(rank, padded)
    smooth[columns:], down[:, columns:] = 1, 0
    return QuantizedLinear(
        weight=weight,
        activation=weight,
        in_features=columns,
        codes=pack_consecutive(codes),
        scale=scale if weight == "int4" else scale.to(torch.float8_e4m3fn),
        tensor_scale=None if weight == "int4" else normal(tensor_scales).abs() + 0.1,
        smooth=smooth,
        down=down,
        up=normal(rows, rank),
        bias=normal(rows) if bias else None,
    )


def assert_same_layer(got: QuantizedLinear, want: QuantizedLinear) -> None:
    for fact in ("weight", "activation", "in_features", "shift"):
        assert getattr(got, fact) == getattr(want, fact)
    assert_same_tensors(got.tensors(), want.tensors())


def assert_same_tensors(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype, name
        assert got[name].shape == tensor.shape, name
        same = got[name].contiguous().view(torch.uint8) == tensor.contiguous().view(torch.uint8)
        assert same.all(), name


def assert_same_model(got: QuantizedModel, want: QuantizedModel) -> None:
    assert got.layers.keys() == want.layers.keys()
    for name, layer in want.layers.items():
        assert_same_layer(got.layers[name], layer)
    assert_same_tensors(dict(got.plain), dict(want.plain))


def sana_model(
    weight: WeightFormat = "int4", width: int = 96, hidden: int = 160, *, qk_norm: bool = False
) -> QuantizedModel:
    """Two blocks of a Sana with 16-bit random tensors; only shapes that matter are realistic."""
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).bfloat16()

    shapes = {
        "attention.qkv": (3 * width, width),
        "attention.out": (width, width),
        "cross.q": (width, width),
        "cross.out": (width, width),
        "ffn.expand": (2 * hidden, width),
        "ffn.project": (width, hidden),
    }
    layers: dict[str, QuantizedLinear] = {}
    plain: dict[str, Tensor] = {}
    for block in (f"blocks.{i}" for i in range(2)):
        for number, (name, (rows, columns)) in enumerate(shapes.items()):
            bias = name not in ("attention.qkv", "ffn.project")
            rank = 20 if name == "ffn.expand" else 16
            layers[f"{block}.{name}"] = random_layer(
                rows, columns, rank, weight, bias=bias, seed=number,
                tensor_scales=rows if name == "attention.qkv" else 1,
            )  # fmt: skip
        plain[f"{block}.table"] = normal(6, width)
        plain[f"{block}.cross.kv.weight"] = normal(2 * width, width)
        plain[f"{block}.cross.kv.bias"] = normal(2 * width)
        plain[f"{block}.ffn.depthwise.weight"] = normal(2 * hidden, 1, 3, 3)
        plain[f"{block}.ffn.depthwise.bias"] = normal(2 * hidden)
        if qk_norm:
            plain[f"{block}.attention.q_norm.weight"] = normal(width)
            plain[f"{block}.cross.k_norm.weight"] = normal(width)
    plain["patch.weight"], plain["head.table"] = normal(width, 4, 1, 1), normal(2, width)
    plain["caption.norm.weight"] = normal(width)
    return QuantizedModel(layers=layers, plain=plain, made_by={"model": "sana", "rank": 16})


def sana_config(width: int = 96, ratio: float = 160 / 96 + 1e-6) -> dict[str, object]:
    return {
        "_class_name": "SanaTransformer2DModel", "num_attention_heads": width // 32,
        "attention_head_dim": 32, "num_cross_attention_heads": width // 32,
        "cross_attention_head_dim": 32, "mlp_ratio": ratio,
    }  # fmt: skip


def leaves(tensors: dict[str, Tensor], layer: str) -> dict[str, Tensor]:
    return {n.rpartition(".")[2]: t for n, t in tensors.items() if n.rpartition(".")[0] == layer}


def written_without(tmp_path: Path, model: QuantizedModel, *entries: str) -> Path:
    path = tmp_path / "x.safetensors"
    export_quantized(model, path, config=sana_config())
    metadata = read_header(path)["__metadata__"]
    kept = {name: value for name, value in metadata.items() if name not in entries}
    save_file(read_tensors(path), path, kept)
    return path


def flux_inputs() -> dict[str, dict[str, Tensor]]:
    parts: dict[str, dict[str, Tensor]] = {"model": {}, "scale": {}, "smooth": {}, "branch": {}}
    for case in ("nunchaku_flux_single_block", "nunchaku_flux_double_block"):
        for name, tensor in load_file(CASES / case / "tensors.safetensors").items():
            kind, _, rest = name.partition(".")
            if kind == "input":
                part, _, key = rest.partition(".")
                parts[part][key] = tensor
    return parts


def intermediate_folder(folder: Path, **changes: object) -> Path:
    folder.mkdir()
    parts: dict[str, object] = dict(flux_inputs())
    branch: dict[str, dict[str, Tensor]] = {}
    for name, tensor in parts["branch"].items():
        module, factor = name[: -len(".a.weight")], name[-len("a.weight") :]
        branch.setdefault(module, {})[factor] = tensor
    parts["branch"] = branch
    parts["smooth"] |= {"proj.fuse_when_possible": False}
    for name, content in (parts | changes).items():
        torch.save(content, folder / f"{name}.pt")
    return folder


def modelopt_tensors(dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    m = "blocks.0.attn1.to_q"
    return {
        f"{m}.weight": pack_consecutive(torch.randint(0, 16, (48, 80), generator=generator)),
        f"{m}.weight_scale": (normal(48, 5).abs() + 0.1).to(torch.float8_e4m3fn),
        f"{m}.weight_scale_2": torch.tensor(0.03),
        f"{m}.pre_quant_scale": (normal(80).abs() + 0.5).to(dtype),
        f"{m}.svdquant_lora_a": normal(8, 80).to(dtype),
        f"{m}.svdquant_lora_b": normal(48, 8).to(dtype),
        f"{m}.input_scale": torch.tensor(0.005),
        f"{m}.bias": normal(48).to(dtype),
        "proj_out.weight": normal(4, 4).to(dtype),
    }


def modelopt_folder(folder: Path, tensors: dict[str, Tensor], algorithm: str = "NVFP4_SVD") -> Path:
    folder.mkdir()
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
    claims = {"quant_method": "modelopt", "quant_algo": algorithm, "ignore": ["proj_out"]}
    (folder / "config.json").write_text(json.dumps({"quantization_config": claims}))
    return folder
