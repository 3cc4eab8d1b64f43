"""Spec and checkpoint together mean what transformers computes: a plain numpy decoder that reads nothing else gives the same logits, for every family."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from tests import reference, zoo  # noqa: E402
from twinpilots.model.checkpoint import open_checkpoint  # noqa: E402


@pytest.mark.parametrize(("seed", "dtype"), [(0, "float32"), (1, "bfloat16"), (2, "float16")])
@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_logits_equal_transformers(family: str, seed: int, dtype: str, tmp_path: Path) -> None:
    path = zoo.save(family, seed, tmp_path / family, dtype)
    checkpoint = open_checkpoint(path, strict=True)
    tokens = np.random.default_rng(seed).integers(3, zoo.VOCAB, 25).tolist()  # longer than every window, and than longrope's switch
    with torch.no_grad():
        expected = zoo.load_reference(path)(input_ids=torch.tensor([tokens]), use_cache=False).logits[0].numpy()
    error = reference.forward(checkpoint, tokens) - expected
    assert np.sqrt((error**2).mean() / (expected**2).mean()) < 1e-5


def test_the_reference_generates_from_shards_and_has_clear_margins(tmp_path: Path) -> None:
    path = zoo.save("llama", 0, tmp_path / "m", max_shard_size="40KB")
    assert len(list(path.glob("*.safetensors"))) > 1
    tokens, logits = zoo.reference_generate(path, [5, 17, 99], 6)
    assert tokens == [int(row.argmax()) for row in logits] and np.median(zoo.margins(logits)) > 0.05
    mine = reference.forward(open_checkpoint(path), [5, 17, 99, *tokens[:-1]])[2:]
    np.testing.assert_allclose(mine, logits, atol=1e-4)
