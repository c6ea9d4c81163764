"""The small piano: lengths that it can't play."""

import pytest

from pianodiff.synth import example_performance


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf"), 3601])
def test_a_length_that_cannot_be_played(seconds):
    with pytest.raises(ValueError, match=f"^seconds is {seconds}: give a length between 1/8000 and 3600 seconds$"):
        example_performance(seconds)
