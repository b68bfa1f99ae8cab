"""What a run's phases are predicted to take, and when networks come early."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitapack.runtime.pipeline.phases import PhaseMeter, memory_words, peaks


def by_phase(condition, denoise, decode):
    return {"condition": condition, "denoise": denoise, "decode": decode}


sizes = st.builds(by_phase, *[st.integers(0, 100)] * 3)


@given(st.integers(0, 50), sizes, sizes, st.booleans())
def test_what_comes_early_never_raises_the_largest_peak(base, weights, working, lean):
    late, none = peaks(base, weights, working, lean=lean, ahead=False)
    found, early = peaks(base, weights, working, lean=lean, ahead=True)
    assert not none
    assert max(found.values()) == max(late.values())
    for phase, following in (("condition", "denoise"), ("denoise", "decode")):
        more = weights[following] if phase in early else 0
        assert found[phase] == late[phase] + more
        assert phase in early or late[phase] + weights[following] > max(late.values())
    assert "decode" not in early


def test_resident_adds_up_and_lean_does_not():
    weights, working = by_phase(5, 3, 4), by_phase(1, 2, 1)
    assert peaks(10, weights, working, lean=False, ahead=False)[0] == by_phase(16, 20, 23)
    found, early = peaks(10, weights, working, lean=True, ahead=True)
    assert found == by_phase(16, 15, 15)
    assert not early
    weights["decode"] = 1
    found, early = peaks(10, weights, working, lean=True, ahead=True)
    assert found == by_phase(16, 16, 12)
    assert early == {"denoise"}


def test_a_meter_keeps_what_a_failed_phase_took():
    meter = PhaseMeter({"condition": 1 << 30})
    with pytest.raises(ValueError, match="x"), meter("condition"):
        raise ValueError("x")
    assert meter.seconds["condition"] > 0
    found = meter.bytes["condition"]
    assert found["predicted"] == 1 << 30
    assert found["reserved"] is None
    words = memory_words(found)
    assert words == "" if not found["peak"] else "(predicted 1.00)" in words
