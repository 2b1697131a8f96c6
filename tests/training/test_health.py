import pytest

from sagan_fast.training.health import Diverged, Guard

FINE = {"d_loss": 1.2, "g_loss": 0.3, "d_real": 0.4, "d_fake": -0.5}


@pytest.mark.parametrize("name", FINE)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_stops_at_once(name, value):
    with pytest.raises(Diverged, match=f"{name} is {value} at step 7"):
        Guard(patience=5).check(7, {**FINE, name: value})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"d_loss": 0.0, "d_real": 9.0, "d_fake": -9.0, "g_loss": 9.0}, "won outright by step 2"),
        ({"d_loss": 2.0, "d_real": 0.3, "d_fake": 0.3, "g_loss": -0.3}, "died by step 2: it gave real and fake"),
    ],
)
def test_a_collapsed_discriminator_stops_after_patience_and_a_good_line_starts_anew(values, message):
    guard = Guard(patience=3)
    for line in (values, values, FINE, values, values):
        guard.check(0, line)
    with pytest.raises(Diverged, match=message):
        guard.check(2, values)
