"""The reference of quantised models: transformers in fp32 on exactly the weights that the quantised ones stand for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tests import zoo
from twinpilots.model.checkpoint import Checkpoint
from twinpilots.model.tensor_names import hf_spelling, tensor_plan


def reference_model(path: Path, checkpoint: Checkpoint) -> Any:
    """The model saved in ``path`` with every weight replaced by the checkpoint's, dequantised."""
    import torch

    model = zoo.load_reference(path)
    state = model.state_dict()
    plan = tensor_plan(checkpoint.spec, hf_spelling(checkpoint.spec, state.keys()))
    with torch.no_grad():
        for tensor_id, source in plan.items():
            if source.name in state:
                state[source.name].copy_(torch.from_numpy(np.array(checkpoint.tensor(tensor_id).float32())))
    return model


def pack_gptq(codes: np.ndarray, zeros: np.ndarray, stored_less: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """(qweight [inputs / 8, outputs], qzeros [groups, outputs / 8]) int32 of codes [inputs, outputs] and zero points [groups, outputs], word by word."""
    qweight = np.zeros((codes.shape[0] // 8, codes.shape[1]), np.uint32)
    for k in range(codes.shape[0]):
        qweight[k // 8] |= codes[k].astype(np.uint32) << (4 * (k % 8))
    qzeros = np.zeros((zeros.shape[0], zeros.shape[1] // 8), np.uint32)
    for n in range(zeros.shape[1]):
        qzeros[:, n // 8] |= ((zeros[:, n].astype(np.int64) - stored_less) % 16).astype(np.uint32) << (4 * (n % 8))
    return qweight.view(np.int32), qzeros.view(np.int32)


def pack_awq(codes: np.ndarray, zeros: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(qweight [inputs, outputs / 8], qzeros [groups, outputs / 8]) int32, as AutoAWQ's WQLinear_GEMM.from_linear writes them."""
    order_map = [0, 2, 4, 6, 1, 3, 5, 7]

    def packed(values: np.ndarray) -> np.ndarray:
        words = np.zeros((values.shape[0], values.shape[1] // 8), np.uint32)
        for column in range(values.shape[1] // 8):
            for i in range(8):
                words[:, column] |= values[:, column * 8 + order_map[i]].astype(np.uint32) << (i * 4)
        return words.view(np.int32)

    return packed(codes), packed(zeros)
