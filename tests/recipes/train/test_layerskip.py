"""The formulas of arXiv 2404.16710, against values worked out by hand."""

import pytest

from edgeskip.recipes.train.layerskip import (
    distillation_weights,
    dropout_by_layer,
    dropout_ramp,
    exit_scale,
    gradual,
    loss_weights,
    normalized_exit_weights,
    rotational,
)
from edgeskip.recipes.train.schema import LayerSkipRecipe


def test_dropout_grows_with_depth() -> None:
    # exp(l ln2 / 4) - 1 for l = 0..4
    assert [dropout_by_layer(layer, 5) for layer in range(5)] == pytest.approx(
        [0, 0.189207, 0.414214, 0.681793, 1], abs=1e-6
    )


def test_dropout_ramps_from_scratch_only() -> None:
    assert [dropout_ramp(t, from_scratch=True) for t in (0, 0.5, 1)] == pytest.approx([0, 0.414214, 1], abs=1e-6)
    assert [dropout_ramp(t, from_scratch=False) for t in (0, 0.5, 1)] == [1, 1, 1]


def test_exit_scale() -> None:
    # L = 5, e_scale = 0.2: 0.2 * (0, 1, 1+2, 1+2+3), and 4 + 0.2 * (1+2+3) for the last
    assert [exit_scale(layer, 5, 0.2) for layer in range(5)] == pytest.approx([0, 0.2, 0.6, 1.2, 5.2])
    assert [exit_scale(layer, 3, 0.0) for layer in range(3)] == [0, 0, 2]


def test_weights_are_normalized_over_the_enabled_layers() -> None:
    assert normalized_exit_weights(frozenset({0, 2, 4}), 5, 0.2) == pytest.approx({2: 0.6 / 5.8, 4: 5.2 / 5.8})
    assert normalized_exit_weights(frozenset({1, 3}), 4, 0.0) == {3: 1.0}


def test_rotational_shifts_each_step_and_keeps_the_last() -> None:
    enabled = [rotational(step, 7, 3) for step in range(4)]
    assert enabled == [{0, 3, 6}, {1, 4, 6}, {2, 5, 6}, {0, 3, 6}]
    assert rotational(5, 4, 8) == {3}


def test_gradual_adds_a_layer_each_t_by_2l() -> None:
    # L = 4: one more at t = T/8, 2T/8, 3T/8; all from there on
    points = (0, 0.124, 0.125, 0.25, 0.374, 0.375, 1)
    assert [len(gradual(t, 4)) for t in points] == [1, 1, 2, 3, 3, 4, 4]
    assert gradual(0.25, 4) == {1, 2, 3}


def test_without_focus_the_loss_is_the_paper_s() -> None:
    recipe = LayerSkipRecipe(e_scale=0.2, curriculum="rotational", rotation=2)
    assert loss_weights(recipe, 5, step=0, progress=0) == pytest.approx({2: 0.6 / 5.8, 4: 5.2 / 5.8})
    assert loss_weights(recipe, 5, step=1, progress=0) == pytest.approx({1: 0.2 / 6.6, 3: 1.2 / 6.6, 4: 5.2 / 6.6})
    ramp = LayerSkipRecipe(e_scale=0.2, curriculum="gradual")
    assert loss_weights(ramp, 5, step=7, progress=0.1) == pytest.approx({3: 1.2 / 6.4, 4: 5.2 / 6.4})
    assert distillation_weights(recipe) == {}


def test_without_layerskip_only_the_last_layer_learns() -> None:
    assert loss_weights(None, 5, step=3, progress=0.5) == {4: 1.0}
    assert distillation_weights(None) == {}


def test_focus_takes_its_share() -> None:
    recipe = LayerSkipRecipe(e_scale=0.2, rotation=2, focus={3: 0.25, 2: 0.15})
    expected = {1: 0.15, 2: 0.6 * 0.6 / 5.8 + 0.25, 4: 0.6 * 5.2 / 5.8}
    assert loss_weights(recipe, 5, step=0, progress=0) == pytest.approx(expected)
    assert distillation_weights(recipe) == {}
    assert sum(expected.values()) == pytest.approx(1)


def test_focus_on_the_last_layer_s_prediction_is_kept_apart() -> None:
    recipe = LayerSkipRecipe(e_scale=0.2, rotation=2, focus={3: 0.4}, focus_target="last-layer")
    assert loss_weights(recipe, 5, step=0, progress=0) == pytest.approx({2: 0.6 * 0.6 / 5.8, 4: 0.6 * 5.2 / 5.8})
    assert distillation_weights(recipe) == {2: 0.4}
