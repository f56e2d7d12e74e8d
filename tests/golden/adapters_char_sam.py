"""Adapter of the character alignment cases."""

import torch
from gesso_core.annotate.char_sam.ctc import align
from golden_case import Adapter, Case
from torch import Tensor


def ctc_alignment(case: Case) -> dict[str, Tensor]:
    produced: dict[str, Tensor] = {}
    for number in range(sum(name.startswith("labels_") for name in case.inputs)):
        aligned = align(
            case.inputs[f"log_probs_{number}_TC"].numpy(),
            case.inputs[f"labels_{number}"].tolist(),
            blank=case.meta["call"]["blank"],
        )
        produced[f"path_{number}_T"] = torch.from_numpy(aligned.path_T)
        produced[f"spans_{number}_L2"] = torch.from_numpy(aligned.spans_L2)
        produced[f"score_{number}"] = torch.tensor([aligned.score], dtype=torch.float64)
    return produced


ADAPTERS: dict[tuple[str, str], Adapter] = {("annotation", "ctc_alignment"): ctc_alignment}
