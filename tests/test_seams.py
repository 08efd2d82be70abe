"""Each seam of the house by what it is for: what is added here is what a feature would add, and no more."""

from __future__ import annotations

import copy
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch

from edgeskip.exporter import formats as exporter_formats
from edgeskip.exporter.bundle import ExportSettings, export_bundle
from edgeskip.exporter.checkpoint import open_checkpoint
from edgeskip.exporter.graphs import dialects as exporter_dialects
from edgeskip.exporter.graphs import pickers as exporter_pickers
from edgeskip.exporter.graphs.dialects import Standard
from edgeskip.runtime.backends.cpu_session import OrtCpuSession
from edgeskip.runtime.backends.engines.session import TrtSession
from edgeskip.runtime.bundle import dialects, formats, graphs
from edgeskip.runtime.bundle.dialects import Dialect
from edgeskip.runtime.bundle.formats import Format, Part
from edgeskip.runtime.bundle.manifest import WEIGHTS
from edgeskip.runtime.bundle.store import read_engines
from edgeskip.runtime.bundle.weights import embedding_table
from edgeskip.runtime.decoding.decode import Decoding, decode, prefill
from edgeskip.runtime.decoding.rounds import View, draft_round, prefill_round, speculative_round
from edgeskip.runtime.errors import RequestError
from edgeskip.runtime.load import load
from tests.conftest import run_round, save_checkpoint
from tests.standin import HostDevice, StandInTensorRT, with_engines

PROMPTS = [list(map(int, np.random.default_rng(seed).integers(2, 300, 11))) for seed in range(6)]
NEW_TOKENS = 40


def exported(checkpoint, folder, **settings):
    settings = {"exit_layer": 2, "prefill_chunk": 8} | settings
    return export_bundle(open_checkpoint(str(checkpoint)), folder, ExportSettings(**settings))


@contextmanager
def session_on(kind, bundle, dialect="cpu"):
    """The CPU's session, or TensorRT's on stand-ins for engines, which share what every session on CUDA does."""
    if kind == "cpu":
        with OrtCpuSession(bundle, dialect=dialect) as session:
            yield session
        return
    device = HostDevice()
    copied = with_engines(
        bundle, bundle.folder.with_name(f"{bundle.folder.name}-engines"), sm=device.compute_capability
    )
    with TrtSession(copied, read_engines(copied)[0], device, StandInTensorRT()) as session:
        yield session


def greedy(model, prompt, new_tokens=NEW_TOKENS):
    """Transformers' greedy continuation, up to EOS."""
    ids = torch.tensor([prompt])
    settings = {"max_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 1}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0, len(prompt) :].tolist()


def until_eos(ids):
    """What a text has up to its first EOS, which is token 1 here."""
    return ids[: ids.index(1) + 1] if 1 in ids else ids


def loop(session, bundle, how, prompt, new_tokens=NEW_TOKENS):
    """The loop without stops, and the drafts that were accepted."""
    manifest = bundle.manifest
    steps = [prefill(session, how, embedding_table(bundle)[prompt], manifest.prefill_chunk)]
    steps += decode(session, how, len(prompt), manifest.max_length, end=len(prompt) + new_tokens - 1)
    ids = [token for step in steps for token in step.token_ids]
    return ids[:new_tokens], sum(step.accepted for step in steps)


def test_a_bundle_with_two_exits_decodes_from_either_with_the_same_text(checkpoints, reference, tmp_path):
    bundle = exported(checkpoints("llama-gqa"), tmp_path / "b", exit_layer=1, other_exits=(3,))
    assert list(bundle.manifest.graphs) == ["draft", "middle_1_3", "verify", "head"]
    assert bundle.manifest.chains["3"]["draft"] == ("draft", "middle_1_3", "head")
    accepted = {}
    for exit_layer in (1, 3):
        single = exported(checkpoints("llama-gqa"), tmp_path / str(exit_layer), exit_layer=exit_layer)
        with (
            load(bundle.folder, device="cpu", exit_layer=exit_layer) as model,
            load(single.folder, device="cpu") as alone,
        ):
            for prompt in PROMPTS:
                ours = model.complete(prompt, num_speculations=3, confidence_threshold=0, max_new_tokens=NEW_TOKENS)
                wanted = alone.complete(prompt, num_speculations=3, confidence_threshold=0, max_new_tokens=NEW_TOKENS)
                assert list(ours.token_ids) == greedy(reference("llama-gqa"), prompt)
                assert ours.statistics.accepted == wanted.statistics.accepted
                accepted[exit_layer] = accepted.get(exit_layer, 0) + ours.statistics.accepted
                early = model.complete(prompt, mode="early-exit", max_new_tokens=8).token_ids
                assert early == alone.complete(prompt, mode="early-exit", max_new_tokens=8).token_ids
    assert accepted[1] != accepted[3]


def test_engines_of_a_bundle_with_two_exits_decode_from_either(checkpoints, reference, tmp_path):
    bundle = exported(checkpoints("llama-gqa"), tmp_path / "b", exit_layer=1, other_exits=(3,), draft_vocabulary=250)
    with session_on("engines", bundle) as session:
        for exit_layer in (1, 3):
            split = bundle.manifest.split(exit_layer)
            for prompt in PROMPTS[:3]:
                ids, _ = loop(session, bundle, Decoding(split, 3), prompt)
                assert until_eos(ids) == greedy(reference("llama-gqa"), prompt)


def test_an_exit_that_a_bundle_lacks_is_refused_by_name(bundles):
    with pytest.raises(RequestError, match="exit layer: 3; wanted 2: the bundle is cut there"):
        load(bundles("llama-gqa").folder, device="cpu", exit_layer=3)


@pytest.mark.parametrize(("variant", "kind"), [("llama-gqa", "cpu"), ("llama-tied", "cpu"), ("llama-tied", "engines")])
def test_a_second_head_over_fewer_rows_drafts(variant, kind, checkpoints, reference, tmp_path):
    rows, model = 220, reference(variant)
    bundle = exported(checkpoints(variant), tmp_path / "b", exit_layer=3, draft_vocabulary=rows)
    split = bundle.manifest.split()
    assert (split.draft_head.graph, split.draft_head.vocabulary) == ("draft_head", rows)
    whole = exported(checkpoints(variant), tmp_path / "whole", exit_layer=3)
    assert bundle.manifest.files[WEIGHTS] == whole.manifest.files[WEIGHTS]  # a prefix of the same bytes
    accepted = 0
    with session_on(kind, bundle) as session:
        for prompt in PROMPTS:
            ids, count = loop(session, bundle, Decoding(split, 3), prompt)
            assert ids == loop(session, bundle, Decoding(split), prompt)[0]
            accepted += count
        assert accepted
        prompt = PROMPTS[0]
        session.write("inputs_embeds", embedding_table(bundle)[prompt[:8]])
        run_round(session, prefill_round(split, 8, last=False, early_exit=False), 0)
        session.write("inputs_embeds", embedding_table(bundle)[prompt[8:9]])
        run_round(session, draft_round(split, 0), 8)
        with torch.no_grad():
            states = model(torch.tensor([prompt[:9]]), output_hidden_states=True).hidden_states[3][0, -1]
            logits = model.lm_head(model.model.norm(states))[:rows]
        np.testing.assert_allclose(session.read(View("draft_logits", 0, 1))[0, :rows], logits.numpy(), atol=1e-4)
        assert session.read(View("draft_token_ids", 0, 1))[0] == int(logits.argmax())
        assert session.draft_confidence(0, rows) == pytest.approx(float(logits.softmax(0).max()), rel=1e-4)


@pytest.fixture
def rows_in_8_bits(monkeypatch):
    """A format that nobody else knows: 8-bit rows, and the largest magnitude of each."""

    def encode(rows, _, __=None):
        scales = np.abs(rows.astype(np.float32)).max(axis=1) / 127
        return np.rint(rows / scales[:, None]).astype(np.int8), scales

    def whole(op, stored):
        scales = stored.part(".scale")
        return op.Mul(op.CastLike(stored.part(), scales), op.Unsqueeze(scales, [1]))

    parts = (Part("", "int8", lambda shape: shape), Part(".scale", "fp32", lambda shape: shape[:1]))
    decoded = Format("test8", parts, lambda parts, _: parts[0].astype(np.float32) * parts[1][..., None])
    monkeypatch.setitem(formats.FORMATS, "test8", decoded)
    monkeypatch.setitem(exporter_formats.WRITERS, "test8", exporter_formats.FormatWriter(encode, whole))
    return encode


@pytest.mark.parametrize("dialect", ["cpu", "ort", "standard"])
def test_a_tensor_of_a_new_format_goes_from_checkpoint_to_both_dialects(
    dialect, rows_in_8_bits, checkpoints, reference, tmp_path
):
    names = [
        "model.embed_tokens.weight",
        "model.layers.1.mlp.down_proj.weight",
        "model.layers.3.self_attn.o_proj.weight",
    ]
    bundle = exported(checkpoints("llama-gqa"), tmp_path / "b", formats=dict.fromkeys(names, "test8"))
    judge = copy.deepcopy(reference("llama-gqa"))
    with torch.no_grad():
        for name in names:
            weight = judge.get_parameter(name)
            numbers, scales = rows_in_8_bits(weight.numpy(), "fp32")
            weight.copy_(torch.from_numpy(numbers * scales[:, None].astype(np.float32)))
        wanted = judge(torch.tensor([PROMPTS[0]])).logits[0, -1].numpy()
        plain = reference("llama-gqa")(torch.tensor([PROMPTS[0]])).logits[0, -1].numpy()
    with OrtCpuSession(bundle, dialect=dialect) as session:
        split = bundle.manifest.split()
        prefill(session, Decoding(split), embedding_table(bundle)[PROMPTS[0]], 8)
        found = session.read_logits(1)[0]
        assert np.abs(found - wanted).max() < 1e-4
        assert np.abs(found - plain).max() > 1e-3
        ids, _ = loop(session, bundle, Decoding(split, 3), PROMPTS[1])
        assert until_eos(ids) == greedy(judge, PROMPTS[1])
    whole = exported(checkpoints("llama-gqa"), tmp_path / "whole")
    saved = sum(3 * judge.get_parameter(n).numel() - 4 * judge.get_parameter(n).shape[0] for n in names)
    assert whole.manifest.weights_bytes - bundle.manifest.weights_bytes == pytest.approx(saved, abs=1024)


@pytest.mark.parametrize("dialect", ["cpu", "ort", "standard"])
def test_a_format_has_a_product_of_its_own_where_a_dialect_has_one(
    dialect, rows_in_8_bits, checkpoints, monkeypatch, tmp_path
):
    """As a dialect with a kernel for it would have: it reads the parts, and another dialect the whole tensor."""

    def product(op, x, weight):
        numbers = op.Transpose(op.CastLike(weight.part(), x), perm=[1, 0])
        return op.Mul(op.MatMul(x, numbers), weight.part(".scale"))

    names = ["lm_head.weight", "model.layers.0.mlp.down_proj.weight"]
    plain = exported(checkpoints("llama-gqa"), tmp_path / "plain", formats=dict.fromkeys(names, "test8"))
    writer = replace(exporter_formats.WRITERS["test8"], products={"cpu": product, "ort": product})
    monkeypatch.setitem(exporter_formats.WRITERS, "test8", writer)
    bundle = exported(checkpoints("llama-gqa"), tmp_path / "b", formats=dict.fromkeys(names, "test8"))
    for graph in ("draft", "head"):
        nodes = onnx.load(str(bundle.graph_path(graph, dialect)), load_external_data=False).graph.node
        assert [node.op_type for node in nodes].count("MatMul") == (0 if dialect == "standard" else 1)
    logits = []
    for one in (plain, bundle):
        with OrtCpuSession(one, dialect=dialect) as session:
            prefill(session, Decoding(one.manifest.split()), embedding_table(one)[PROMPTS[0]], 8)
            logits.append(session.read_logits(1)[0])
    np.testing.assert_allclose(logits[0], logits[1], atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"formats": {"lm_head": "fp32"}}, "formats: 'lm_head' is no tensor of the model"),
        ({"formats": {"lm_head.weight": "fp16"}}, "formats: 'lm_head.weight' in 'fp16', where fp32 has fp32"),
        ({"picker": "best"}, "picker: best; wanted greedy"),
        ({"draft_vocabulary": 300}, "draft vocabulary: 300; wanted 128 to 299 rows"),
        ({"other_exits": (4,)}, "exit layer: 4; wanted 1 to 3"),
    ],
)
def test_what_no_bundle_can_be_is_refused_at_export(settings, message, checkpoints, tmp_path):
    with pytest.raises(RequestError, match=message):
        exported(checkpoints("llama-gqa"), tmp_path / "b", **settings)
    assert not (tmp_path / "b").exists()


class NewRows(Standard):
    """As `standard`, but what comes out are the rows of this call, not the caches with these rows in them."""

    name = "rows"

    def attention(self, op, heads, qkv, pasts, places):
        """Attends as `standard` does."""
        _, key, value = self.rotated_heads(op, heads, qkv, places)
        out, _, _ = super().attention(op, heads, qkv, pasts, places)
        return out, key, value


class WeightsIn(Standard):
    """As `standard`; its weights are inputs of the graph."""

    name = "weights-in"


@pytest.fixture
def more_dialects(monkeypatch):
    """Two that bundles do not have."""
    monkeypatch.setitem(dialects.DIALECTS, "rows", Dialect("rows", "{}.rows.onnx", caches="new-rows"))
    monkeypatch.setitem(exporter_dialects.WRITERS, "rows", NewRows())
    monkeypatch.setitem(dialects.DIALECTS, "weights-in", Dialect("weights-in", "{}.in.onnx", weights="inputs"))
    monkeypatch.setitem(exporter_dialects.WRITERS, "weights-in", WeightsIn())


@pytest.mark.parametrize("dialect", ["rows", "weights-in"])
@pytest.mark.parametrize("variant", ["llama-gqa", "qwen3", "llama-tied"])
def test_a_dialect_with_other_conventions_decodes_the_same_text(
    variant, dialect, more_dialects, checkpoints, reference, tmp_path
):
    bundle = exported(checkpoints(variant), tmp_path / "b", draft_vocabulary=200)
    split = bundle.manifest.split()
    with OrtCpuSession(bundle, dialect=dialect) as session:
        for prompt in PROMPTS[:3]:
            for k in (0, 3):
                ids, _ = loop(session, bundle, Decoding(split, k), prompt)
                assert until_eos(ids) == greedy(reference(variant), prompt)


def test_what_comes_out_of_these_dialects(more_dialects, checkpoints, tmp_path):
    bundle = exported(checkpoints("llama-gqa"), tmp_path / "b")
    rows = onnx.load(str(bundle.graph_path("draft", "rows")), load_external_data=False).graph
    shapes = {
        value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim] for value in rows.output
    }
    assert shapes["present.0.key"] == [1, 2, "T", 16]
    inputs = onnx.load(str(bundle.graph_path("draft", "weights-in")), load_external_data=False).graph
    assert "model.layers.1.mlp.down_proj.weight" in {value.name for value in inputs.input}
    assert not [tensor.name for tensor in inputs.initializer if tensor.external_data]
    standard = onnx.load(str(bundle.graph_path("draft", "standard")), load_external_data=False).graph
    assert [tensor.name for tensor in standard.initializer if tensor.external_data]


class EveryThirdWorst:
    """The token with the smallest logit wherever the position is a multiple of three, and else the largest."""

    name = "signed"

    def row_inputs(self, first, rows):
        """The sign of each row's logits."""
        return {"signs": np.where(np.arange(first, first + rows) % 3 == 0, -1, 1)}


@pytest.mark.parametrize(("kind", "dialect"), [("cpu", "cpu"), ("cpu", "standard"), ("engines", "standard")])
def test_a_picker_that_is_not_greedy(kind, dialect, checkpoints, reference, monkeypatch, tmp_path):
    def signed(op, logits, row_inputs):
        return op.ArgMax(
            op.Mul(logits, op.CastLike(op.Unsqueeze(row_inputs["signs"], [2]), logits)), axis=-1, keepdims=0
        )

    monkeypatch.setitem(graphs.PICKERS, "signed", ("signs",))
    monkeypatch.setitem(exporter_pickers.PICKERS, "signed", signed)
    bundle = exported(checkpoints("llama-gqa"), tmp_path / "b", exit_layer=3, picker="signed")
    split, model = bundle.manifest.split(picker="signed"), reference("llama-gqa")
    accepted = 0
    with pytest.raises(RequestError, match="picker: greedy; wanted signed"):
        load(bundle.folder, device="cpu")
    with pytest.raises(RequestError, match="picker: greedy, with heads that are signed"):
        Decoding(split)
    with session_on(kind, bundle, dialect) as session:
        for prompt in PROMPTS[:3]:
            ids = list(prompt)
            for _ in range(NEW_TOKENS):
                with torch.no_grad():
                    logits = model(torch.tensor([ids])).logits[0, -1]
                ids.append(int(logits.argmin() if (len(ids) - 1) % 3 == 0 else logits.argmax()))
            for k, threshold in ((0, 0.0), (4, 0.0), (4, 0.3)):
                how = Decoding(split, k, threshold, picker=EveryThirdWorst())
                found, count = loop(session, bundle, how, prompt)
                assert found == ids[len(prompt) :]
                accepted += count
    assert accepted


def test_a_call_binds_the_caches_of_other_layers(bundles):
    """As one graph of a few layers would be, bound as often as a model has such runs."""
    bundle = bundles("llama-gqa")
    split = bundle.manifest.split()
    with OrtCpuSession(bundle) as session:
        session.write("inputs_embeds", embedding_table(bundle)[PROMPTS[0][:8]])
        chunk = prefill_round(split, 8, last=False, early_exit=True)
        run_round(session, chunk, 0)
        own = {name: session.read_cache(name) for name in ("past_key_values.0.key", "past_key_values.1.value")}
        assert not session.read_cache("past_key_values.2.key").any()
        moved = replace(chunk, calls=tuple(replace(call, layer_shift=2) for call in chunk.calls))
        run_round(session, moved, 0)
        np.testing.assert_array_equal(session.read_cache("past_key_values.2.key"), own["past_key_values.0.key"])
        np.testing.assert_array_equal(session.read_cache("past_key_values.3.value"), own["past_key_values.1.value"])


def test_draft_and_target_logits_are_kept_apart(bundles, reference):
    """Verification leaves the drafts' logits as they were."""
    bundle, model = bundles("llama-gqa"), reference("llama-gqa")
    split, prompt = bundle.manifest.split(), PROMPTS[0]
    with OrtCpuSession(bundle) as session:
        first = prefill(session, Decoding(split), embedding_table(bundle)[prompt], 8).token_ids[0]
        run_round(session, speculative_round(split, 2), len(prompt))
        with torch.no_grad():
            out = model(torch.tensor([[*prompt, first]]), output_hidden_states=True)
            drafted = model.lm_head(model.model.norm(out.hidden_states[2][0, -1])).numpy()
        np.testing.assert_allclose(session._buffers["draft_logits"][0], drafted, atol=1e-4)
        np.testing.assert_allclose(session.read_logits(1)[0], out.logits[0, -1].numpy(), atol=1e-4)
        assert session._buffers["target_token_logits"][0] == pytest.approx(float(out.logits[0, -1].max()), abs=1e-4)


def test_a_model_can_be_cut_after_each_of_its_layers(tmp_path, reference):
    folder = save_checkpoint(reference("qwen2"), tmp_path / "c")
    bundle = exported(folder, tmp_path / "b", exit_layer=1, other_exits=(2, 3), draft_vocabulary=250)
    for exit_layer in (1, 2, 3):
        with load(bundle.folder, device="cpu", exit_layer=exit_layer) as model:
            ids = model.complete(PROMPTS[2], num_speculations=2, max_new_tokens=20).token_ids
        assert list(ids) == greedy(reference("qwen2"), PROMPTS[2], 20)
