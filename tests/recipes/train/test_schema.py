import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from edgeskip.recipes.train.schema import LayerSkipRecipe, load_recipe
from edgeskip.runtime.errors import RecipeError

RECIPES = Path(__file__).parents[3] / "recipes/train"
SCRATCH = """
[data]
folder = "text"
context = 32
[model]
hidden_size = 32
intermediate_size = 64
num_hidden_layers = 4
num_attention_heads = 4
num_key_value_heads = 2
head_dim = 8
max_position_embeddings = 64
[layerskip]
p_max = 0.1
focus = { 2 = 0.25 }
[optimizer]
learning_rate = 1e-3
[run]
batch_size = 4
max_steps = 10
"""


def load(folder: Path, text: str) -> object:
    (folder / "x.toml").write_text(text)
    return load_recipe(folder / "x.toml")


def test_values_and_defaults(tmp_path: Path) -> None:
    recipe = load(tmp_path, SCRATCH)
    assert recipe.data.folder == tmp_path / "text"  # relative to the recipe
    assert recipe.model.hidden_size == 32
    assert recipe.model.tie_word_embeddings
    assert recipe.layerskip == LayerSkipRecipe(p_max=0.1, focus={2: 0.25})
    assert recipe.optimizer.learning_rate == 1e-3
    assert recipe.run.max_minutes is None
    assert recipe.checkpoint is None


def test_whole_number_is_a_number(tmp_path: Path) -> None:
    recipe = load(tmp_path, SCRATCH.replace("p_max = 0.1", "p_max = 1"))
    assert isinstance(recipe.layerskip.p_max, float)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("p_max", "p_mox", "x.toml: layerskip: unknown key 'p_mox'; did you mean 'p_max'?"),
        ("[layerskip]", "[layer_skip]", "x.toml: unknown key 'layer_skip'; did you mean 'layerskip'?"),
        ("head_dim = 8\n", "", "x.toml: model: key 'head_dim' is missing"),
        ("[optimizer]\nlearning_rate = 1e-3\n", "", "x.toml: table 'optimizer' is missing"),
        ("batch_size = 4", "batch_size = 4.5", "x.toml: run.batch_size: found 4.5; wanted a whole number"),
        ("batch_size = 4", "batch_size = true", "x.toml: run.batch_size: found True; wanted a whole number"),
        ("batch_size = 4", "batch_size = 0", "x.toml: run.batch_size: found 0; wanted 1 to 65536"),
        ('folder = "text"', "folder = 3", "x.toml: data.folder: found 3; wanted a path"),
        ("p_max = 0.1", "p_max = 1.5", "x.toml: layerskip.p_max: found 1.5; wanted 0 to 1"),
        ("p_max = 0.1", "p_max = nan", "x.toml: layerskip.p_max: found nan; wanted 0 to 1"),
        ("2 = 0.25", "two = 0.25", "x.toml: layerskip.focus: found the key 'two'; wanted whole numbers as keys"),
        ("2 = 0.25", "2 = 1.0", "x.toml: layerskip.focus: the shares add up to 1.0; wanted less than 1"),
        ("2 = 0.25", "4 = 0.25", "x.toml: layerskip.focus: found exit layer 4; wanted 1 to 3, of 4 layers"),
        ("2 = 0.25", "0 = 0.25", "x.toml: layerskip.focus: found exit layer 0; wanted at least 1"),
        (
            "p_max = 0.1",
            'curriculum = "rotatonal"',
            "x.toml: layerskip.curriculum: found 'rotatonal'; wanted 'rotational' or 'gradual'; "
            "did you mean 'rotational'?",
        ),
        (
            "num_key_value_heads = 2",
            "num_key_value_heads = 3",
            "x.toml: model.num_key_value_heads: 4 heads cannot share 3 evenly; wanted a divisor of num_attention_heads",
        ),
        ("max_steps = 10", "", "x.toml: run.max_steps: no end is set; wanted max_steps, max_minutes or both"),
        ("context = 32", "context = 65", "x.toml: data.context: found 65; wanted at most max_position_embeddings = 64"),
        (
            "[data]",
            'checkpoint = "model"\n[data]',
            "x.toml: a model and a checkpoint; wanted a [model] table or `checkpoint`, the folder to continue",
        ),
    ],
)
def test_faults_are_named(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in SCRATCH
    with pytest.raises(RecipeError) as caught:
        load(tmp_path, SCRATCH.replace(old, new))
    assert str(caught.value) == f"{tmp_path}/{message}"


def test_unreadable_recipes_are_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"nowhere\.toml: no such file"):
        load_recipe(tmp_path / "nowhere.toml")
    with pytest.raises(RecipeError, match=r"x\.toml: is not TOML: "):
        load(tmp_path, "[data")


def test_shipped_recipes() -> None:
    recipe = load_recipe(RECIPES / "python-10m.toml")
    assert recipe.layerskip
    assert recipe.model
    assert load_recipe(RECIPES / "python-10m-baseline.toml") == replace(recipe, layerskip=None)
    example = load_recipe(RECIPES / "finetune-example.toml")
    assert example.layerskip == LayerSkipRecipe(p_max=0.1, e_scale=0.2, curriculum="rotational", rotation=8)


def test_reading_a_recipe_needs_no_torch() -> None:
    code = "import sys, edgeskip.recipes.train.schema, edgeskip.recipes.train.layerskip; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
