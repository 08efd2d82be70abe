"""The formulas of LayerSkip: layer dropout, early-exit loss weights and curricula (arXiv 2404.16710).

Section numbers are that paper's.

Layers are counted from 0, as in the paper: l = 0 .. L-1. An exit layer E stands for layers[:E], so its loss is that
of layer l = E-1. Where the paper counts steps, t of T, these functions take the step where something rotates and
`progress` = t / (T-1), 0 to 1, where something ramps up: a training limited by time has no T.
"""

from __future__ import annotations

from edgeskip.recipes.train.schema import LayerSkipRecipe

# Layer dropout: a sample skips layer l at step t with probability p(l, t) = S(t) D(l) p_max (section 4.1.1)


def dropout_by_layer(layer: int, num_layers: int) -> float:
    """D(l) = exp(l ln2 / (L-1)) - 1: from 0 at the first layer to 1 at the last."""
    return float(2 ** (layer / (num_layers - 1)) - 1)


def dropout_ramp(progress: float, from_scratch: bool) -> float:
    """S(t): exp(t ln2 / (T-1)) - 1 from scratch, 1 where a trained model is continued."""
    return 2**progress - 1 if from_scratch else 1.0


# Early-exit loss (section 4.1.2)


def exit_scale(layer: int, num_layers: int, e_scale: float) -> float:
    """e(l), how much the loss of layer l weighs before normalizing.

    e_scale * (0 + 1 + .. + l) for l < L-1, and L-1 + e_scale * (0 + 1 + .. + L-2) for the last layer.
    """
    last = num_layers - 1
    if layer < last:
        return e_scale * layer * (layer + 1) / 2
    return last + e_scale * (last - 1) * last / 2


def rotational(step: int, num_layers: int, rotation: int) -> frozenset[int]:
    """C_rot,R: every R-th layer has a loss, shifting by one layer each step; the last layer always has one."""
    return frozenset(range(step % rotation, num_layers, rotation)) | {num_layers - 1}


def gradual(progress: float, num_layers: int) -> frozenset[int]:
    """C_grad: the layers with a loss grow in number, backwards from the last one, by one every T / 2L steps."""
    added = int(progress * 2 * num_layers)
    return frozenset(range(max(0, num_layers - 1 - added), num_layers))


def normalized_exit_weights(enabled: frozenset[int], num_layers: int, e_scale: float) -> dict[int, float]:
    """e~(l, t) = C(l, t) e(l) / sum_i C(i, t) e(i), for the layers where it is not 0."""
    scales = {layer: exit_scale(layer, num_layers, e_scale) for layer in sorted(enabled)}
    total = sum(scales.values())
    return {layer: scale / total for layer, scale in scales.items() if scale > 0}


def loss_weights(recipe: LayerSkipRecipe | None, num_layers: int, step: int, progress: float) -> dict[int, float]:
    """Layer -> weight of its cross entropy with the text, at this step; they sum to 1 less what is distilled.

    This is e~(l, t), scaled by 1 - sum(w) where shares w of the loss are set aside for exits in focus (not in the
    paper). Those shares are added here if they learn the text; if they learn the last layer's prediction, they
    are in `distillation_weights`.
    """
    if recipe is None:
        return {num_layers - 1: 1.0}
    if recipe.curriculum == "rotational":
        enabled = rotational(step, num_layers, recipe.rotation)
    else:
        enabled = gradual(progress, num_layers)
    remaining = 1 - sum(recipe.focus.values())
    exits = normalized_exit_weights(enabled, num_layers, recipe.e_scale)
    weights = {layer: remaining * weight for layer, weight in exits.items()}
    if recipe.focus_target == "labels":
        for exit_layer, share in recipe.focus.items():
            weights[exit_layer - 1] = weights.get(exit_layer - 1, 0.0) + share
    return weights


def distillation_weights(recipe: LayerSkipRecipe | None) -> dict[int, float]:
    """Layer -> weight of its cross entropy with the last layer's prediction (exits in focus, where they learn it)."""
    if recipe is None or recipe.focus_target != "last-layer":
        return {}
    return {exit_layer - 1: share for exit_layer, share in recipe.focus.items()}
