"""The decoder that calibration runs through, against transformers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.conftest import VARIANTS, VOCAB

from edgeskip.exporter.checkpoint import TensorReader, open_checkpoint
from edgeskip.exporter.quantization.calibrated.calibration import Calibration
from edgeskip.exporter.quantization.calibrated.decoder import Decoder
from edgeskip.runtime.bundle.tensors import bundle_tensors

SEQUENCES = tuple(tuple(np.random.default_rng(i).integers(0, VOCAB, 9 + 20 * i).tolist()) for i in range(3))


@pytest.mark.parametrize("variant", VARIANTS)
def test_states_are_those_of_transformers(variant, checkpoints, reference):
    checkpoint = open_checkpoint(str(checkpoints(variant)))
    tensors = bundle_tensors(checkpoint.architecture, 0, "fp32")
    model = reference(variant)
    with TensorReader(checkpoint) as reader:
        decoder = Decoder(reader, tensors, "fp32", Calibration(SEQUENCES, ""), (2,))
        states = decoder.embedded(decoder.checkpoint_rows())
        for i in range(4):
            layer = decoder.layer(i)
            states = [layer.output(x) for x in states]
            for ids, found in zip(SEQUENCES, states, strict=True):
                torch.testing.assert_close(found.cpu(), kept_outputs(model, ids)[i], atol=1e-3, rtol=1e-4)
        for ids, found in zip(SEQUENCES, decoder.head_inputs(states), strict=True):
            with torch.no_grad():
                wanted = model.model(torch.tensor([ids])).last_hidden_state[0]
            torch.testing.assert_close(found.cpu(), wanted, atol=1e-3, rtol=1e-4)
    assert [decoder.feeds_head(i) for i in range(4)] == [False, True, False, True]


def kept_outputs(model, ids):
    """The states after each layer, before any norm."""
    kept = []
    hooks = [
        layer.register_forward_hook(lambda _, __, out: kept.append((out[0] if isinstance(out, tuple) else out)[0]))
        for layer in model.model.layers
    ]
    with torch.no_grad():
        model(torch.tensor([ids]))
    for hook in hooks:
        hook.remove()
    return kept
