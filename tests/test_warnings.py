"""The settings of the tests: which warnings are errors."""

from __future__ import annotations

import warnings

import numpy as np
import pytest


def warn(module, stacklevel=1):
    """A warning by code of this module, or by what it calls."""
    frame = {"__name__": module, "warnings": warnings, "library": library, "stacklevel": stacklevel}
    exec("warnings.warn('old', DeprecationWarning)" if stacklevel == 1 else "library(stacklevel)", frame)


def library(stacklevel):
    warnings.warn("the argument is deprecated", FutureWarning, stacklevel=stacklevel)


@pytest.mark.parametrize("module", ["edgeskip", "edgeskip.cli", "edgeskip.runtime.host", "tests.conftest", __name__])
def test_a_warning_of_ours_is_an_error(module):
    with pytest.raises(DeprecationWarning, match="old"):
        warn(module)
    with pytest.raises(FutureWarning, match="deprecated"):  # as libraries do: it is about who called
        warn(module, stacklevel=2)


def test_a_calculation_that_overflows_is_an_error():
    with pytest.raises(RuntimeWarning, match="overflow"):
        np.float16(6e4) * np.float16(2)


@pytest.mark.parametrize("module", ["transformers.trainer", "edgeskipping", "testsuite"])
def test_a_warning_of_a_library_about_itself_is_none(module):
    with warnings.catch_warnings(record=True) as caught:
        warn(module)
    assert [str(warning.message) for warning in caught] == ["old"]
