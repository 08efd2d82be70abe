"""The published figures: the pages show what the kept reports say, and scripts measure what they say they do."""

from __future__ import annotations

import copy
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

DOCS = Path(__file__).parents[1] / "docs"


@pytest.mark.parametrize("script", ["benchmarks/tables.py", "tuning/run.py"])
def test_the_tables_are_those_of_the_reports(script):
    result = subprocess.run([sys.executable, DOCS / script, "--check"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.fixture(scope="module")
def schedules():
    return runpy.run_path(str(DOCS / "benchmarks/schedules.py"), run_name="schedules")


def test_policies_run_the_layers_that_they_say(schedules, reference):
    """By transformers: a whole text, one with layers taken out, and attention with a mask for the rows that left."""
    full, read, prompt = reference("llama-gqa"), schedules["read"], 6
    layers, ids = len(full.model.layers), [*range(40, 70)]
    with torch.no_grad():
        output = full(torch.tensor([ids]), output_hidden_states=True)
        states, logits = output.hidden_states, output.logits[0]
        at_exit = full.lm_head(full.model.norm(states[3]))[0]
        taken_out = copy.deepcopy(full)
        taken_out.model.layers = torch.nn.ModuleList([full.model.layers[0], full.model.layers[-1]])
        outer = taken_out(torch.tensor([ids]), use_cache=False).logits[0]

    def assert_reads(policy, wanted, ran):
        found, layers_run = read(full, ids, prompt, policy)
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)
        assert layers_run.tolist() == ran

    assert_reads(schedules["whole"](), logits, [layers] * len(ids))
    assert_reads(schedules["fixed_exit"](3), at_exit, [3] * len(ids))
    assert_reads(schedules["evenly"](2, layers), outer, [2] * len(ids))

    predictors = schedules["train_predictors"](full, [ids])
    of_exit = torch.where(torch.arange(len(ids))[:, None] >= prompt, at_exit, logits)
    assert_reads(
        schedules["specee"](full, predictors, 0.0, True), of_exit, [layers] * prompt + [3] * (len(ids) - prompt)
    )
    assert_reads(schedules["specee"](full, predictors, 1.1, True), logits, [layers] * len(ids))

    sure = at_exit.softmax(-1).amax(-1)
    threshold = float(sure[prompt:].median()) + 1e-6
    left = (sure >= threshold) & (torch.arange(len(ids)) >= prompt)
    ran = [3 if gone else layers for gone in left.tolist()]
    assert_reads(schedules["confident"](full, threshold, True), torch.where(left[:, None], at_exit, logits), ran)
    seen = torch.ones(len(ids), len(ids)).tril().bool() & ~left
    mask = torch.zeros(len(ids), len(ids)).masked_fill(~(seen | torch.eye(len(ids)).bool()), -1e30)
    with torch.no_grad():
        turns = full.model.rotary_emb(states[3], torch.arange(len(ids))[None])
        last = full.model.layers[3](states[3], attention_mask=mask[None, None], position_embeddings=turns)
        without = full.lm_head(full.model.norm(last))[0]
    assert_reads(schedules["confident"](full, threshold, False), torch.where(left[:, None], at_exit, without), ran)


def test_schedules_leave_no_row_out_that_a_later_token_reads(schedules):
    for warm_up in (None, 1):
        policy, rows = schedules["falling"](4, 1, 4, warm_up), torch.ones(200, dtype=torch.bool)
        ran = torch.stack([policy.rows(layer, rows, rows, 6) for layer in range(4)])
        assert ran[:, :6].all()
        assert (ran[:, 1:] <= ran[:, :-1]).all()
        assert ran.sum(0).tolist() == sorted(ran.sum(0).tolist(), reverse=True)
        assert (int(ran[:, 6].sum()), int(ran[:, -1].sum())) == (4, 1)


def test_quality_is_that_of_the_whole_model_where_all_layers_run(schedules, reference):
    full = reference("llama-gqa")
    texts = [schedules["text_of"](full, [*range(40, 52)], [*range(60, 70)])]
    same = schedules["quality"](full, texts, schedules["whole"]())
    assert (same.layers, same.agreement, same.divergence, same.perplexity) == (4, 1, 0, 1)
    less = schedules["quality"](full, texts, schedules["fixed_exit"](1))
    assert (less.layers, less.divergence > 0) == (1, True)
