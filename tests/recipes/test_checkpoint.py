"""The shipped checkpoint is what its card says, and decodes exactly."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import edgeskip
from edgeskip.exporter.bundle import ExportSettings, export_bundle
from edgeskip.exporter.checkpoint import open_checkpoint
from edgeskip.exporter.reference import reference_model
from edgeskip.recipes.demo import CHECKPOINT, EXIT_LAYER
from edgeskip.runtime.bench.measure import TIE_GAP, tie_gap
from edgeskip.runtime.bench.prompts import load_prompts
from edgeskip.runtime.bundle.manifest import read_bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shipped") / "bundle"
    export_bundle(open_checkpoint(str(CHECKPOINT)), folder, ExportSettings(EXIT_LAYER))
    return read_bundle(folder)


def test_it_is_a_small_llama_with_tied_embeddings_and_grouped_queries():
    a = open_checkpoint(str(CHECKPOINT)).architecture
    assert (CHECKPOINT / "model.safetensors").stat().st_size <= 20_000_000
    assert a.model_type == "llama"
    assert 10 <= a.num_layers <= 12
    assert a.num_kv_heads < a.num_heads
    assert a.tie_word_embeddings
    assert (a.vocab_size, a.max_position_embeddings) == (4096, 1024)
    assert a.num_layers >= 3 * EXIT_LAYER


def test_the_exit_agrees_with_the_last_layer_on_held_out_text():
    """The card's measure on the prompts, beginnings of files with much prose: harder than the whole text's 0.80."""
    model = AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    agreeing = total = 0
    with torch.no_grad():
        for prompt in load_prompts():
            ids = tokenizer(prompt, return_tensors="pt").input_ids
            states = model(ids, output_hidden_states=True).hidden_states
            early = model.lm_head(model.model.norm(states[EXIT_LAYER])).argmax(-1)
            last = model.lm_head(states[-1]).argmax(-1)  # transformers has normed the last one
            agreeing += int((early == last).sum())
            total += early.numel()
    assert total > 2000
    assert agreeing / total > 0.65


def test_its_tokens_equal_transformers_greedy_tokens(bundle):
    reference = AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()
    with edgeskip.load(bundle.folder) as model:
        for prompt in load_prompts()[:6]:
            plain = model.complete(prompt, mode="autoregressive", max_new_tokens=40)
            for k in (1, 4, 8):
                assert model.complete(prompt, num_speculations=k, max_new_tokens=40).token_ids == plain.token_ids
            ids = torch.tensor([plain.prompt_token_ids])
            out = reference.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False, pad_token_id=1
            )
            theirs = tuple(out[0, ids.shape[1] :].tolist())
            pairs = enumerate(zip(plain.token_ids, theirs, strict=True))
            parts = next(((i, a, b) for i, (a, b) in pairs if a != b), None)
            if parts is not None:
                position, a, b = parts
                assert tie_gap(model, [*plain.prompt_token_ids, *theirs[:position]], a, b) < TIE_GAP["fp32"]


def test_a_bundle_gives_back_the_very_weights(bundle):
    ours = reference_model(bundle)
    theirs = AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()
    ids = torch.arange(100, 140)[None]
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, theirs(ids).logits)
