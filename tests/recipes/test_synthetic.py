"""Synthetic checkpoints: as marked, as measured, whatever measures it."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import transformers
from click.testing import CliRunner
from safetensors.torch import load_file
from tests.conftest import edit_json
from tokenizers import Tokenizer

import edgeskip
from edgeskip.cli import main
from edgeskip.exporter.bundle import ExportSettings, export_bundle
from edgeskip.exporter.checkpoint import open_checkpoint
from edgeskip.recipes import synthetic
from edgeskip.recipes.shape import load_shape
from edgeskip.recipes.synthetic import Measurement, Segments, Spread, SyntheticSettings, byte_tokenizer, synthesize
from edgeskip.runtime.bundle.manifest import MANIFEST, read_bundle
from edgeskip.runtime.errors import BackendError, CheckpointError, RequestError

SHAPE = {
    "model_type": "llama",
    "vocab_size": 16000,
    "hidden_size": 128,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
}
NUM_BYTES = 256
SETTINGS = {  # shape -> what is asked for
    "untied": SyntheticSettings(2, (0.7,)),
    "tied": SyntheticSettings(2, (0.8,), seed=3, dtype="bf16"),
    "few rows": SyntheticSettings(2, (0.7,), num_prompts=8, new_tokens=64, draft_vocabulary=6000),
    "small": SyntheticSettings(3, (0.6,), dtype="fp32", num_prompts=8, new_tokens=64),
}


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    changes = {
        "untied": {},
        "few rows": {},
        "tied": {"tie_word_embeddings": True},
        "small": {"vocab_size": 300},
        "wide": {"hidden_size": 512},
        "deep": {
            "vocab_size": 3000,
            "hidden_size": 512,
            "intermediate_size": 1024,
            "num_hidden_layers": 10,
            "num_attention_heads": 8,
            "tie_word_embeddings": True,
        },
        "segments": {"vocab_size": 5000, "intermediate_size": 512, "tie_word_embeddings": True},
    }
    for name, change in changes.items():
        (folder / f"{name}.json").write_text(json.dumps(SHAPE | change))
    return folder


@pytest.fixture(scope="module")
def made(shapes, tmp_path_factory):
    """Name -> the folder and what was said of it, made once."""
    folder = tmp_path_factory.mktemp("synthetic")
    return {
        name: (folder / name, synthesize(str(shapes / f"{name}.json"), folder / name, settings))
        for name, settings in SETTINGS.items()
    }


def tensors(folder):
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def matches(model, settings):
    """transformers' own generation, then one pass over its texts: matches [B, T] of the exit's picks."""
    generator = torch.Generator().manual_seed(settings.seed)
    size = (settings.num_prompts, settings.prompt_length)
    rows = settings.draft_vocabulary or model.config.vocab_size
    prompts = torch.randint(rows, size, generator=generator)
    with torch.inference_mode():
        ones = torch.ones_like(prompts)
        texts = model.generate(prompts, attention_mask=ones, do_sample=False, max_new_tokens=settings.new_tokens)
        states = model(texts[:, :-1], output_hidden_states=True).hidden_states[settings.exit_layer]
        picks = model.lm_head(model.model.norm(states)).argmax(-1)
    new = slice(settings.prompt_length, None)
    assert texts.max() < rows
    assert texts.shape[1] == settings.prompt_length + settings.new_tokens  # no EOS
    return (picks[:, settings.prompt_length - 1 :] == texts[:, new]).double(), texts[:, new]


@pytest.mark.parametrize("name", SETTINGS)
def test_the_match_rate_is_as_asked_for_and_as_transformers_measures_it(name, made):
    folder, said = made[name]
    settings = SETTINGS[name]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    matched, texts = matches(model, settings)
    assert said.match_rate == pytest.approx(*settings.match_rates, abs=synthetic.LARGEST_ERROR)
    assert said.match_rate == pytest.approx(float(matched.mean()), abs=0.01)
    by_prompt = sorted(matched.mean(-1).tolist())
    assert said.match_rate_by_prompt.min == pytest.approx(by_prompt[0], abs=0.05)
    assert said.match_rate_by_prompt.max == pytest.approx(by_prompt[-1], abs=0.05)
    distinct = sum(len(set(text)) / len(text) for text in texts.tolist()) / len(texts)
    assert said.distinct_tokens == pytest.approx(distinct, abs=0.02)
    assert said.distinct_tokens >= 0.9 or name == "small"


@pytest.mark.parametrize("name", SETTINGS)
def test_the_checkpoint_is_marked_and_has_no_eos(name, made, shapes):
    folder, said = made[name]
    config = json.loads((folder / "config.json").read_text())
    assert config["edgeskip_synthetic"] == json.loads(json.dumps(asdict(said)))
    assert said.shape == f"{name}.json"
    assert (said.seed, said.exit_layer) == (SETTINGS[name].seed, SETTINGS[name].exit_layer)
    assert 0 < said.segments[0].damping <= 1
    for file in ("config.json", "generation_config.json"):
        assert json.loads((folder / file).read_text())["eos_token_id"] is None
    readme = (folder / "README.md").read_text()
    assert "not a language model" in readme
    assert f"{said.match_rate:.1%}" in readme
    dtypes = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    assert {tensor.dtype for tensor in tensors(folder).values()} == {dtypes[SETTINGS[name].dtype]}
    assert open_checkpoint(str(folder)).architecture == load_shape(str(shapes / f"{name}.json")).architecture


def test_the_seed_makes_the_weights(made, shapes, tmp_path):
    folder, said = made["untied"]
    shape = str(shapes / "untied.json")
    again = synthesize(shape, tmp_path / "again", SETTINGS["untied"])
    other = synthesize(shape, tmp_path / "other", replace(SETTINGS["untied"], seed=1))
    assert again == said
    assert other != replace(said, seed=1)
    wanted = tensors(folder)
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in tensors(tmp_path / "again").items())
    name = "model.embed_tokens.weight"
    assert not torch.equal(tensors(tmp_path / "other")[name], wanted[name])


def test_only_the_output_projections_of_later_layers_are_damped(made):
    folder, said = made["untied"]
    late, early = (2, 3), (0, 1)
    stored = {name: tensor.float().std().item() for name, tensor in tensors(folder).items() if tensor.dim() == 2}
    for kind in ("mlp.down_proj", "self_attn.o_proj"):
        fan_in = 160 if "mlp" in kind else 128
        plain = 1 / fan_in**0.5 / (synthetic.GATED_RMS if "mlp" in kind else 1)
        for layer in late:  # undamped they outweigh the early ones: 2 layers of variance 8 / 2 * 2
            deviation = said.segments[0].damping * plain * synthetic.LATE_VARIANCE**0.5
            assert stored[f"model.layers.{layer}.{kind}.weight"] == pytest.approx(deviation, rel=0.05)
        assert stored[f"model.layers.{early[1]}.{kind}.weight"] == pytest.approx(plain, rel=0.05)
    for layer in (*early, *late):
        assert stored[f"model.layers.{layer}.mlp.up_proj.weight"] == pytest.approx(128**-0.5, rel=0.05)


def accepted_of_tested(texts):
    """The share of tested drafts that were accepted, in rounds that always have K drafts."""
    tested = accepted = 0.0
    for text in texts:
        histogram = text.statistics.acceptance_histogram
        accepted += sum(a * n for a, n in enumerate(histogram))
        tested += sum(min(a + 1, len(histogram) - 1) * n for a, n in enumerate(histogram))
    return accepted / tested


@pytest.mark.parametrize("name", ["untied", "tied"])
def test_self_speculative_decoding_of_its_bundle_has_the_match_rate(name, made, tmp_path):
    folder, said = made[name]
    export_bundle(open_checkpoint(str(folder)), tmp_path / "b", ExportSettings(said.exit_layer, num_speculations=3))
    assert read_bundle(tmp_path / "b").manifest.synthetic
    texts = ["def f(x):\n    return", "naïve: 日本", "The capital of France is", "0123456789"]
    with edgeskip.load(tmp_path / "b") as model:
        made_texts = [model.complete(text, max_new_tokens=150, confidence_threshold=0) for text in texts]
    for text, made_text in zip(texts, made_texts, strict=True):
        assert len(made_text.prompt_token_ids) == len(text.encode())
        assert made_text.stop_reason == "max_new_tokens"
    assert accepted_of_tested(made_texts) == pytest.approx(said.match_rate, abs=0.08)  # of some 500 tokens
    shown = CliRunner().invoke(main, ["inspect", str(tmp_path / "b")]).stdout
    assert "synthetic: random weights" in shown


@pytest.fixture(scope="module")
def segments(shapes, tmp_path_factory):
    """A checkpoint whose texts have segments, in a vocabulary of which they use a part, and what was said of it."""
    folder = tmp_path_factory.mktemp("segments") / "made"
    settings = SyntheticSettings(
        2, (0.3, 0.6, 0.95), num_prompts=5, new_tokens=96, max_steps=8, draft_vocabulary=4000, segment_tokens=40
    )
    return folder, synthesize(str(shapes / "segments.json"), folder, settings)


PROMPTS = ["def f(x):\n    return", "naïve: 日本", "The capital of France is", "0123456789", "(", "Once upon a time"]


@pytest.fixture(scope="module")
def segment_texts(segments, tmp_path_factory):
    """Prompts and what the whole model writes after them, which is what self-speculation writes."""
    folder = tmp_path_factory.mktemp("bundles")
    export_bundle(open_checkpoint(str(segments[0])), folder / "b", ExportSettings(2, draft_vocabulary=4000))
    return texts_with_and_without_drafts(folder / "b")[0]


def texts_with_and_without_drafts(folder):
    with edgeskip.load(folder) as model:
        texts = [model.complete(p, max_new_tokens=160, mode="autoregressive").token_ids for p in PROMPTS]
        for threshold in (0.5, 0.0):
            drafted = [model.complete(p, max_new_tokens=160, confidence_threshold=threshold) for p in PROMPTS]
            assert [text.token_ids for text in drafted] == texts
    return list(zip(PROMPTS, texts, strict=True)), drafted


def kinds_of(prompt, text):
    """The kind of the segment that each token of a text was picked in."""
    return torch.tensor([*prompt.encode(), *text])[-len(text) - 1 : -1] % 3


def test_segments_have_their_match_rates_and_the_exit_is_as_sure_as_it_is_right(segments, segment_texts):
    folder, said = segments
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    kinds, right, sure = [], [], []
    for prompt, text in segment_texts:
        token_ids = torch.tensor([[*prompt.encode(), *text]])
        with torch.inference_mode():
            states = model(token_ids[:, :-1], output_hidden_states=True).hidden_states[2][0, -len(text) :]
            chances = model.lm_head(model.model.norm(states)).softmax(-1)
        right.append(chances.argmax(-1) == torch.tensor(text))
        sure.append(chances.amax(-1))
        kinds.append(kinds_of(prompt, text))
    changes = sum(int((kind[1:] != kind[:-1]).sum()) for kind in kinds)
    assert sum(map(len, kinds)) / changes == pytest.approx(said.segment_tokens, rel=0.7)  # there are some 40 of them
    kinds, right, sure = torch.cat(kinds), torch.cat(right).double(), torch.cat(sure).double()
    for kind, wanted in enumerate((0.3, 0.6, 0.95)):
        assert right[kinds == kind].mean() == pytest.approx(wanted, abs=0.1)
        assert said.segments[kind].match_rate == pytest.approx(wanted, abs=0.05)
        assert sure[kinds == kind].mean() == pytest.approx(wanted, abs=0.15)
    assert right[sure >= 0.9].mean() > 0.93
    assert right[sure < 0.3].mean() < 0.4
    assert said.distinct_tokens > 0.8


def test_segments_of_many_wide_layers(shapes, tmp_path):
    wanted = (0.3, 0.6, 0.95)
    settings = SyntheticSettings(8, wanted, num_prompts=6, prompt_length=16, new_tokens=32, max_steps=3)
    said = synthesize(str(shapes / "deep.json"), tmp_path / "made", settings)
    for segments, rate in zip(said.segments, wanted, strict=True):
        assert segments.match_rate == pytest.approx(rate, abs=0.1)
        assert segments.confidence == pytest.approx(rate, abs=0.15)
    assert said.distinct_tokens > 0.8


def test_segments_stay_in_4_bits(segments, tmp_path):
    settings = ExportSettings(2, num_speculations=4, weights="int4", draft_vocabulary=4000)
    export_bundle(open_checkpoint(str(segments[0])), tmp_path / "b", settings)
    texts, drafted = texts_with_and_without_drafts(tmp_path / "b")
    kinds = torch.cat([kinds_of(*text) for text in texts])
    wanted = sum((kinds == kind).double().mean() * rate for kind, rate in enumerate((0.3, 0.6, 0.95)))
    assert accepted_of_tested(drafted) == pytest.approx(float(wanted), abs=0.12)
    assert int((kinds[1:] != kinds[:-1]).sum()) < len(kinds) / 10


def test_a_bundle_of_trained_weights_is_not_marked(bundles, tmp_path):
    folder = shutil.copytree(bundles("llama-gqa").folder, tmp_path / "b")
    assert not read_bundle(folder).manifest.synthetic
    edit_json(folder / MANIFEST, lambda manifest: manifest.pop("synthetic"))  # as written before there was such a key
    assert not read_bundle(folder).manifest.synthetic
    assert "synthetic" not in CliRunner().invoke(main, ["inspect", str(folder)]).stdout


@pytest.mark.parametrize("vocab_size", [256, 300, 128256])
def test_the_tokenizer_has_a_token_for_every_id(vocab_size, tmp_path):
    byte_tokenizer(vocab_size).save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == vocab_size
    text = "".join(map(chr, range(0x300))) + " 日本 300 \x7f\n"
    assert tokenizer.encode(text).ids == list(text.encode())
    assert tokenizer.decode(list(text.encode())) == text
    decoded = [tokenizer.decode([i]) for i in range(NUM_BYTES, vocab_size)]
    assert decoded == [f" {i}" for i in range(NUM_BYTES, vocab_size)]
    assert tokenizer.decode([ord("a"), *range(NUM_BYTES, vocab_size)][:3]).startswith("a")


@pytest.mark.parametrize(
    ("shape", "change", "error", "message"),
    [
        ("llama3-8B", {}, RequestError, "'llama3-8B' is neither .*; wanted one of codellama-34b, .*mean 'llama3-8b'?"),
        ("gpt", {}, RequestError, "'gpt' is neither a published shape nor a config.json; wanted one of"),
        ("a\0b", {}, RequestError, "cannot be looked up"),
        ("{untied}", {"exit_layer": 0}, RequestError, "exit layer: 0; wanted 1 to 3: the model has 4 layers"),
        ("{untied}", {"exit_layer": 4}, RequestError, "exit layer: 4; wanted 1 to 3"),
        ("{untied}", {"match_rates": (0.5, 1.1)}, RequestError, "match rate: 1.1; wanted 0 to 1"),
        ("{untied}", {"match_rates": (float("nan"),)}, RequestError, "match rate: nan; wanted 0 to 1"),
        ("{untied}", {"match_rates": (0.5,) * 9}, RequestError, "match rates: 9 of them; wanted 1 to 8"),
        ("{untied}", {"segment_tokens": 1}, RequestError, "tokens of a segment: 1; wanted 2 to"),
        ("{untied}", {"seed": -1}, RequestError, "seed: -1; wanted 0 to"),
        ("{untied}", {"new_tokens": 161}, RequestError, "a context of 192; wanted 193 or more"),
        ("{bytes}", {}, RequestError, "255 tokens; wanted 256 or more"),
        ("{gemma}", {}, CheckpointError, "model_type 'gemma'"),
        ("{broken}", {}, CheckpointError, "not valid JSON"),
        ("{untied}", {"device": "cuda"}, BackendError, "--device cuda: no CUDA device"),
    ],
)
def test_bad_input_is_one_line(shape, change, error, message, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    files = {"untied": {}, "bytes": {"vocab_size": 255}, "gemma": {"model_type": "gemma"}}
    for name, config in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(SHAPE | config))
    (tmp_path / "broken.json").write_text("{")
    name = str(tmp_path / f"{shape[1:-1]}.json") if shape.startswith("{") else shape
    with pytest.raises(error, match=message) as caught:
        synthesize(name, tmp_path / "made", replace(SyntheticSettings(2, (0.8,)), **change))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "made").exists()


def test_too_little_disk_or_memory_is_one_line(shapes, tmp_path, monkeypatch):
    shape, settings = str(shapes / "untied.json"), SyntheticSettings(2, (0.8,), device="cpu")
    monkeypatch.setattr("os.sysconf", lambda _: 10)
    with pytest.raises(BackendError, match="device cpu: 0 GB of memory; wanted 0 GB for the weights"):
        synthesize(shape, tmp_path / "made", settings)
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(CheckpointError, match="0 MB free on the disk; wanted 9 MB"):
        synthesize(shape, tmp_path / "made", settings)
    assert list(tmp_path.iterdir()) == []


def measured_at(rates, distinct=1.0, confidence=0.5):
    segments = tuple(Segments(0.1, rate, confidence) for rate in rates)
    return Measurement(rates[0], Spread(rates[0], rates[0], rates[0]), distinct, segments)


@pytest.mark.parametrize(
    ("wanted", "measured", "message"),
    [
        ((0.8,), measured_at((0.7,)), "exit layer 2: the nearest match rate is 0.700, at a damping of 0.1; wanted 0.8"),
        (
            (0.3, 0.6, 0.9),
            measured_at((0.31, 0.7, 0.89)),
            r"exit layer 2, segments of match rate 0.6: the nearest match rate is 0.700, at a damping of 0.1 "
            r"\(the others are 0.310 for 0.3 and 0.890 for 0.9\); wanted 0.6; give another",
        ),
        ((0.8,), measured_at((0.8,), distinct=0.5), "its texts loop: 50% of their tokens are distinct"),
        ((0.3, 1.0), measured_at((1.0, 1.0), confidence=math.nan), "numbers overflow in fp16; use --dtype bf16"),
    ],
)
def test_what_misses_its_mark_is_refused(wanted, measured, message, shapes, tmp_path, monkeypatch):
    monkeypatch.setattr(synthetic, "find_dampings", lambda *_: measured)
    with pytest.raises(RequestError, match=message):
        synthesize(str(shapes / "wide.json"), tmp_path / "made", SyntheticSettings(2, wanted, num_prompts=1))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("scatter", [0.0, 0.02])
@pytest.mark.parametrize("wanted", [(0.0,), (0.02,), (0.5,), (0.97,), (1.0,), (0.3, 0.6, 0.95)])
def test_the_search_ends_at_any_rate_with_the_best_that_it_saw(wanted, scatter, monkeypatch):
    class Weights:
        model = None

        def damp(self, dampings):
            self.dampings = dampings

    tries = {}

    def measured(_, __, dampings, ___):
        rates = [0.01 + 0.99 * 2.718 ** (-4 * damping**0.8) for damping in dampings]
        rates = [min(1, rate + scatter * math.sin(1e4 * sum(dampings) + 2 * kind)) for kind, rate in enumerate(rates)]
        found = tuple(map(Segments, dampings, rates, rates))
        tries[tuple(dampings)] = max(abs(rate - aim) for rate, aim in zip(rates, wanted, strict=True))
        return Measurement(rates[0], Spread(rates[0], rates[0], rates[0]), 1.0, found)

    monkeypatch.setattr(synthetic, "measure", measured)
    weights = Weights()
    found = synthetic.find_dampings(weights, SyntheticSettings(2, wanted)).segments
    assert [segments.damping for segments in found] == weights.dampings == list(min(tries, key=tries.get))
    assert [segments.match_rate for segments in found] == pytest.approx(wanted, abs=0.03)


def test_the_command_tells_what_it_made_and_takes_no_folder_that_is_there(shapes, tmp_path):
    asked = ["synth", str(shapes / "small.json"), str(tmp_path / "made"), "--exit-layer", "2", "--match-rate", "0.8"]
    result = CliRunner().invoke(main, [*asked, "--seed", "1", "--dtype", "fp32", "--device", "cpu"])
    assert result.exit_code == 0, result.stderr
    assert result.stdout == ""
    assert "random weights; exit layer 2 matches" in result.stderr
    assert "Its texts repeat tokens" in result.stderr
    assert f"edgeskip export {tmp_path / 'made'} BUNDLE --exit-layer 2 --dtype fp32" in result.stderr
    alone = CliRunner().invoke(main, [*asked, "--segment-tokens", "64"])
    assert alone.exit_code == 2
    assert "--segment-tokens is for several match rates: repeat --match-rate, or leave it out" in alone.stderr
    again = CliRunner().invoke(main, asked)
    assert (again.exit_code, again.stdout) == (3, "")
    assert again.stderr.startswith(f"edgeskip: {tmp_path / 'made'}: already exists")
    assert again.stderr.count("\n") == 1
    assert [path.name for path in Path(tmp_path).iterdir()] == ["made"]
