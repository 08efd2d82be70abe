"""Recipes as files: extending, kinds, the commands that list, show, copy and validate them, and export by a recipe."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
from click.testing import CliRunner

from edgeskip.cli import main
from edgeskip.recipes.deployment import Device, load_device
from edgeskip.recipes.library import FOLDERS, recipe_file, shipped_recipes, validate
from edgeskip.recipes.reader import read_recipe, read_table
from edgeskip.runtime.bundle.manifest import read_bundle
from edgeskip.runtime.errors import RecipeError

CARD = """# A card
name = "Card"
compute_capability = 86
memory_gb = 8.0
reserved_gb = 0.5
bandwidth_gb_per_s = 300.0
fp16_tflops = 30.0
backends = ["tensorrt-rtx"]
[kernels]
call_us = 10.0
layer_us = 20.0
"""
SHIPPED = list(shipped_recipes())


def run(*arguments):
    return CliRunner().invoke(main, [*map(str, arguments)])


def write(folder, **texts):
    for name, text in texts.items():
        (folder / f"{name}.toml").write_text(text)


# Extending


def test_a_recipe_extends_a_base_beside_it(tmp_path):
    write(tmp_path, base=CARD, wide='extends = "base"\nname = "Wide"\n[kernels]\nlayer_us = 5.0\n')
    wide = read_recipe(tmp_path / "wide.toml", Device)
    assert (wide.name, wide.memory_gb, wide.backends) == ("Wide", 8.0, ("tensorrt-rtx",))
    assert (wide.kernels.call_us, wide.kernels.layer_us) == (10.0, 5.0)  # tables are merged


def test_a_recipe_extends_one_that_ships_and_bases_extend_too(tmp_path):
    write(
        tmp_path,
        mine='extends = "orin-nano-8gb"\nreserved_gb = 2.0\n',
        other='extends = "mine"\nmax_length = 100\n',
    )
    nano, other = load_device("orin-nano-8gb"), load_device(str(tmp_path / "other.toml"))
    assert (other.reserved_gb, other.max_length) == (2.0, 100)
    assert other.sources == nano.sources


def test_lists_are_replaced_not_joined(tmp_path):
    write(tmp_path, base=CARD, other='extends = "base"\nbackends = ["onnxruntime"]\n')
    assert read_recipe(tmp_path / "other.toml", Device).backends == ("onnxruntime",)


def test_a_base_that_leads_back_is_refused(tmp_path):
    write(tmp_path, a='extends = "b"', b='extends = "a"', c='extends = "c"')
    for name in "ac":
        with pytest.raises(RecipeError, match=r"extends: '[abc]' leads back to itself"):
            read_table(tmp_path / f"{name}.toml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('extends = "orin-nano-8g"', "extends: no 'orin-nano-8g'; .* did you mean 'orin-nano-8gb'?"),
        ("extends = 3", "extends: found 3; wanted the name of a recipe"),
        ('extends = "nowhere/x.toml"', r"nowhere/x\.toml: no such file"),
        (CARD.replace("bandwidth_gb_per_s", "bandwith_gb_per_s"), "unknown key 'bandwith_gb_per_s'; did you mean"),
        (CARD.replace("tensorrt-rtx", "tensort"), "found 'tensort'; .* did you mean 'tensorrt'?"),
        (
            CARD.replace("reserved_gb = 0.5", "reserved_gb = 9.0"),
            "reserved_gb: found 9.0; wanted less than memory_gb 8.0",
        ),
        ('extends = "orin-nano-8gb"\ntensorrt = "new"', "tensorrt: found 'new'; wanted a version, such as 10.3"),
        ('extends = "orin-nano-8gb"\n[jetpacks]\n8 = ""', "jetpacks.8: found ''; wanted a version, such as 10.3"),
        (CARD.replace('["tensorrt-rtx"]', "[]"), "backends: found none; wanted at least one"),
        (CARD.replace("86", "8.6"), "compute_capability: found 8.6; wanted a whole number"),
    ],
)
def test_bad_recipes_are_one_line(text, message, tmp_path):
    write(tmp_path, x=text)
    with pytest.raises(RecipeError, match=message.replace("?", r"\?")) as caught:
        read_recipe(tmp_path / "x.toml", Device)
    assert str(tmp_path) in str(caught.value)


# What ships


@pytest.mark.parametrize("recipe", SHIPPED, ids=lambda recipe: f"{recipe.kind}-{recipe.name}")
def test_every_shipped_recipe_is_valid_and_titled(recipe):
    assert validate(recipe.path) == recipe.kind
    assert len(recipe.title) > 10
    comment = " ".join(recipe.path.read_text().replace("#", "").split())
    assert comment.startswith((f"{recipe.title}. ", f"{recipe.title} name = "))  # a sentence, whole


def test_every_figure_of_a_device_has_a_source():
    figures = {"memory_gb", "reserved_gb", "bandwidth_gb_per_s", "copy_share", "fp16_tflops", "backends"}
    for recipe in SHIPPED:
        if recipe.kind == "device":
            assert figures <= read_recipe(recipe.path, Device).sources.keys(), recipe.name


def test_every_command_in_a_recipe_names_recipes_that_there_are():
    """The commands in the comments: `--recipe` and `--device` of each exist."""
    found = 0
    for recipe in SHIPPED:
        words = recipe.path.read_text().split()
        for option, value in pairwise(words):
            if option in ("--recipe", "--device") and recipe.kind != "training":
                kind = "model" if option == "--recipe" else "device"
                assert (FOLDERS[kind] / f"{value}.toml").is_file(), f"{recipe.name}: {option} {value}"
                found += 1
    assert found > 30


def test_names_find_files_of_every_kind():
    assert recipe_file("orin-nano-8gb") == FOLDERS["device"] / "orin-nano-8gb.toml"
    assert recipe_file("python-10m") == FOLDERS["model"] / "python-10m.toml"
    assert recipe_file("training/python-10m") == FOLDERS["training"] / "python-10m.toml"
    assert recipe_file("x/y.toml") == Path("x/y.toml")


def test_a_file_needs_no_suffix_and_hides_no_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("mine", "python-10m"):
        Path(name).write_text(recipe_file("llama3.2-1b").read_text())
    assert recipe_file("mine") == Path("mine")
    assert recipe_file("python-10m") == FOLDERS["model"] / "python-10m.toml"
    assert "exit layer 4 of 16" in run("plan", "--recipe", "mine", "--device", "h100").output


# The commands


def test_list_shows_them_all():
    lines = run("recipes", "list").output.splitlines()
    assert len(lines) == len(SHIPPED)
    assert any(line.startswith("device    orin-nano-8gb") for line in lines)


def test_show_prints_the_text_and_what_the_base_adds(tmp_path):
    write(tmp_path, base=CARD, wide='# Mine\nextends = "base"\nname = "Wide"\n')
    shown = run("recipes", "show", tmp_path / "wide.toml").output
    assert shown.startswith("# Mine\n")
    assert "#   memory_gb = 8.0" in shown
    assert "#   name" not in shown
    text = recipe_file("llama3.2-1b-int4").read_text()
    assert run("recipes", "show", "llama3.2-1b-int4").output.startswith(text)
    of_its_own = recipe_file("python-10m").read_text()  # of no published shape, and extends none
    assert run("recipes", "show", "python-10m").output == of_its_own


def test_copy_writes_a_recipe_that_works_and_overwrites_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("recipes", "copy", "orin-nx-16gb").exit_code == 0
    copied = tmp_path / "orin-nx-16gb.toml"
    assert load_device(str(copied)) == load_device("orin-nx-16gb")
    copied.write_text("mine")
    again = run("recipes", "copy", "orin-nx-16gb")
    assert again.exit_code == 7
    assert "orin-nx-16gb.toml: is there already" in again.output
    assert copied.read_text() == "mine"
    assert run("recipes", "copy", "python-10m", "mine.toml").exit_code == 0
    assert run("recipes", "validate", "mine.toml").exit_code == 0
    assert run("recipes", "copy", "python-10m", "no/such/folder.toml").exit_code == 7
    (tmp_path / "noise.toml").write_bytes(b"\xff\x00")
    for source in ("noise.toml", "nowhere.toml"):
        refused = run("recipes", "copy", source, "new.toml")
        assert refused.exit_code == 7
        assert refused.output.startswith(f"edgeskip: {source}: ")
        assert not (tmp_path / "new.toml").exists()


def test_validate_names_every_fault(tmp_path):
    assert run("recipes", "validate").exit_code == 0
    recipe = 'checkpoint = "x/y"\nexit_layer = 4\nsource = "me"\nshape = "llama3.2-1b"\n'
    write(
        tmp_path,
        deep=recipe.replace("4", "16"),
        rates=f"{recipe}[match_rates]\n17 = 0.5\n",
        shape=recipe.replace("llama3.2-1b", "llama3.2-1c"),
        good=recipe,
        key=f"exit_layers = 3\n{recipe}",
        twice=f"other_exits = [6, 4]\n{recipe}",
        others=f"other_exits = [2, 8]\n{recipe}",
        broken="[",
    )
    done = run("recipes", "validate", *sorted(tmp_path.glob("*.toml")))
    assert done.exit_code == 7
    for message in (
        "deep.toml: exit_layer: found exit layer 16; wanted 1 to 15",
        "rates.toml: match_rates: found exit layer 17",
        "did you mean 'llama3.2-1b'?",
        "unknown key 'exit_layers'; did you mean 'exit_layer'?",
        "twice.toml: other_exits: found exit layer 4 twice; wanted each exit layer once",
        "others.toml: a model recipe",
        "broken.toml: is not TOML",
        "good.toml: a model recipe",
    ):
        assert message in done.output
    assert "Traceback" not in done.output


# Export


def test_export_by_recipe_and_device(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run("export", "--recipe", "python-10m", "--device", "orin-nano-8gb")
    assert done.exit_code == 0, done.output
    manifest = read_bundle(tmp_path / "python-10m-orin-nano-8gb").manifest
    assert (manifest.exit_layer, manifest.num_speculations, manifest.dtype) == (3, 4, "fp16")
    assert manifest.max_length == 1024


def test_what_is_given_goes_before_the_recipe_and_the_device(checkpoints, tmp_path):
    write(tmp_path, r='checkpoint = "nowhere"\nexit_layer = 2\nsource = "me"\nmax_length = 64\n', d=CARD)
    settings = ("--recipe", tmp_path / "r.toml", "--device", tmp_path / "d.toml")
    done = run("export", checkpoints("llama-gqa"), tmp_path / "b", *settings, "-e", 1, "--dtype", "bf16", "-k", 2)
    assert done.exit_code == 0, done.output
    manifest = read_bundle(tmp_path / "b").manifest
    assert (manifest.exit_layer, manifest.dtype, manifest.max_length, manifest.num_speculations) == (1, "bf16", 64, 2)


QUANTIZED = """checkpoint = "nowhere"
exit_layer = 2
source = "me"
weights = "int4"
layers = ["0-1=int8"]
"""


def formats_of(bundle):
    formats = read_bundle(bundle).manifest.formats
    return [formats[f"model.layers.{i}.self_attn.o_proj.weight"] for i in (0, 3)], formats["lm_head.weight"]


def test_a_recipe_says_how_weights_are_stored_and_options_go_before_it(checkpoints, tmp_path):
    write(tmp_path, r=QUANTIZED)
    common = (checkpoints("llama-gqa"), tmp_path / "b", "--recipe", tmp_path / "r.toml")
    assert run("export", *common).exit_code == 0
    assert formats_of(tmp_path / "b") == (["int8", "int4-32"], "int8")
    other = (common[0], tmp_path / "c", *common[2:], "--head", "int4", "--layers", "3=int8")
    assert run("export", *other).exit_code == 0
    assert formats_of(tmp_path / "c") == (["int4-32", "int8"], "int4-32")


def test_a_recipe_says_where_drafts_come_from_and_all_goes_before_it(tmp_path):
    write(tmp_path, r='extends = "python-10m"\ndraft_vocabulary = 512\nkeep_token_ids = true\n')
    recipe = ("--recipe", tmp_path / "r.toml")
    said = run("export", *recipe, tmp_path / "b").output
    assert "Drafts are among the 512 tokens that have the first ids." in said
    assert read_bundle(tmp_path / "b").manifest.draft_vocabulary == 512
    assert run("export", *recipe, tmp_path / "c", "--draft-vocabulary", "all").exit_code == 0
    assert read_bundle(tmp_path / "c").manifest.draft_vocabulary is None
    plans = [run("plan", *asked, "-d", "h100").output for asked in (recipe, (*recipe, "--draft-vocabulary", "all"))]
    assert ["draft_head" in plan for plan in plans] == [True, False]
    assert "neither a whole number nor all" in run("export", "c", "b", "-e", 1, "--draft-vocabulary", "auto").stderr


def test_texts_of_a_recipe_lie_beside_it_and_are_read_where_something_asks_for_them(tmp_path):
    (tmp_path / "texts.txt").write_text("def add(a, b):\n    return a + b\n" * 100)
    texts = 'extends = "python-10m"\ncalibration = "texts.txt"\n'
    write(tmp_path, r=f"{texts}draft_vocabulary = 512\n", q=f'{texts}quantizer = "gptq"\nweights = "int4"\n')
    assert run("export", "--recipe", tmp_path / "r.toml", tmp_path / "b").exit_code == 0
    assert read_bundle(tmp_path / "b").manifest.renumbered
    assert run("export", "--recipe", tmp_path / "q.toml", "--quantizer", "search", tmp_path / "c").exit_code == 0
    (tmp_path / "texts.txt").unlink()
    done = run("export", "--recipe", tmp_path / "r.toml", tmp_path / "d")
    assert done.exit_code == 5
    assert f"{tmp_path / 'texts.txt'}: no such file" in done.output


@pytest.mark.parametrize("change", ['calibration = "texts"', 'calibration = " "\ndraft_vocabulary = 512'])
def test_texts_that_nothing_reads_and_texts_without_a_name_are_refused(change, tmp_path):
    write(tmp_path, r=f'extends = "python-10m"\n{change}\n')
    done = run("recipes", "validate", tmp_path / "r.toml")
    assert done.exit_code == 7
    assert "wanted a file or folder of texts, beside weights" in done.output


@pytest.mark.parametrize(
    ("backends", "wanted"), [('["onnxruntime", "tensorrt"]', 32), ('["tensorrt", "onnxruntime"]', 64)]
)
def test_the_block_size_is_what_suits_the_device(backends, wanted, tmp_path):
    write(tmp_path, d=CARD.replace('["tensorrt-rtx"]', backends))
    device = ("--device", tmp_path / "d.toml", "--weights", "int4")
    assert run("export", "--recipe", "python-10m", *device, tmp_path / "b").exit_code == 0
    assert set(read_bundle(tmp_path / "b").manifest.formats.values()) == {f"int4-{wanted}", "int8"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ('weights = "int3"', "weights: found 'int3'; wanted 'int4' or 'int8'"),
        ('weights = "int4"\nblock_size = 16', "block_size: found 16; wanted 32 or 64 or 128"),
        ('weights = "int4"\nblock_size = 32.0', "block_size: found 32.0; wanted 32 or 64 or 128"),
        ('layers = ["0-1"]', "layers[0]: found '0-1'; wanted a layer or a range"),
        ('layers = ["0-12=int8"]', "layers: '0-12=int8'; wanted layers in order, of 0 to 11"),
        ("draft_vocabulary = 4096", "draft vocabulary: 4096; wanted 128 to 4095 rows, or all: the vocabulary has 4096"),
        ("max_length = 1025", "max length: 1025; wanted 2 to 1024: the model's context"),
        ("other_exits = [2]", "other_exits: found exit layer 2 twice"),
        ('head = "int4"\nblock_size = 128\nweights = "int4"', "down_proj.weight: 704 columns, which blocks of 128"),
    ],
)
@pytest.mark.parametrize("checkpoint", ["model", "python-10m"])
def test_a_recipe_is_checked_with_its_checkpoint(checkpoint, change, message, tmp_path):
    """One that lies beside it, and one that ships."""
    shutil.copytree(FOLDERS["model"] / "checkpoints" / "python-10m", tmp_path / "model")
    write(tmp_path, r=f'checkpoint = "{checkpoint}"\nexit_layer = 2\nsource = "me"\n{change}\n')
    done = run("recipes", "validate", tmp_path / "r.toml")
    assert done.exit_code == 7
    assert message in done.output
    assert done.output.count("\n") == 1


def test_a_checkpoint_beside_the_recipe_is_found(checkpoints, tmp_path):
    (tmp_path / "model").symlink_to(checkpoints("llama-gqa"))
    write(tmp_path, r='checkpoint = "model"\nexit_layer = 2\nsource = "me"\n')
    done = run("export", "--recipe", tmp_path / "r.toml", tmp_path / "bundle")
    assert done.exit_code == 0, done.output
    assert read_bundle(tmp_path / "bundle").manifest.dtype == "fp32"


def test_the_capacity_is_cut_to_what_fits_unless_it_was_asked_for(checkpoints, tmp_path):
    # Room for 50 tokens of the device's 90, so far as caches go.
    write(
        tmp_path,
        r='checkpoint = "x"\nexit_layer = 2\nsource = "me"\n',
        d=CARD.replace("300.0", "300.0\nmax_length = 90"),
    )
    plan = json.loads(run("plan", checkpoints("llama-gqa"), "-d", tmp_path / "d.toml", "--json", "-").stdout)
    assert plan["recommended"]["weights"] == "dtype"
    used, cache = sum(plan["memory"].values()), plan["memory"]["caches"] // plan["max_length"]
    room = used - 40 * cache
    write(tmp_path, small=f'extends = "d"\nmemory_gb = {room / 1e9 + 0.5:.9f}\n')
    common = (checkpoints("llama-gqa"), tmp_path / "b", "-r", tmp_path / "r.toml", "-d", tmp_path / "small.toml")
    done = run("export", *common, "--weights", "dtype")
    assert done.exit_code == 0, done.output
    assert 2 <= read_bundle(tmp_path / "b").manifest.max_length < 90
    refused = run("export", common[0], tmp_path / "c", *common[2:], "--max-length", 90, "--weights", "dtype")
    assert refused.exit_code == 5
    assert "Card: " in refused.output
    assert "give --max-length" in refused.output
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "give CHECKPOINT and BUNDLE, or --recipe"),
        (["a"], 2, "give CHECKPOINT and BUNDLE, or --recipe"),
        (["a", "b", "c"], 2, "give CHECKPOINT and BUNDLE"),
        (["a", "b"], 2, "give --exit-layer or --recipe"),
        (["b", "--recipe", "llama3.2-1c"], 7, "did you mean 'llama3.2-1b'?"),
        (["b", "--recipe", "llama3.2-1b", "--device", "orin"], 7, "device: no 'orin'"),
    ],
)
def test_bad_export_commands_are_one_line(arguments, code, message):
    done = run("export", *arguments)
    assert done.exit_code == code
    assert message in done.output
