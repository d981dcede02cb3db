"""Rules: whom they are for, what they do with them, what they refuse and what they warn of."""

from __future__ import annotations

import numpy as np
import pytest
from hydra_pipe.pipeline.decide.rules import LEAST_WEIGHT, Rule, apply_rule, the_rule
from hydra_pipe.pipeline.decide.suspects import Suspects, listed
from hydra_pipe.pipeline.reading.unit_values import DetectionValues
from hydra_pipe.storage.errors import InputError, SpecError

N = 40
ORDER = np.random.default_rng(3).permutation(N)
"""Train indices, most suspicious first; the last four were not judged."""
JUDGED = N - 4


def suspects(flagged: int = 3, **changes) -> Suspects:
    rank = np.zeros(N, dtype=np.int64)
    rank[ORDER[:JUDGED]] = np.arange(1, JUDGED + 1)
    score = np.where(rank > 0, (rank - 1) / JUDGED, np.nan)
    values = {
        "name": "d",
        "values": DetectionValues(by="d"),
        "given": np.arange(N) % 4,
        "suggested": (np.arange(N) + 1) % 4,
        "suspicion": 1 - score,
        "score": score,
        "rank": rank,
        "flagged": (rank > 0) & (rank <= flagged),
        "reason": [""] * N,
    }
    return Suspects(**{**values, **changes})


def dropped(cut, of=None) -> list[int]:
    ruling = apply_rule(Rule(kind="drop", cut=cut), of or suspects())
    gone = np.flatnonzero(ruling.action == "drop")
    assert (ruling.weight == (ruling.action != "drop")).all()
    assert sum(one.dropped for one in ruling.classes) == len(gone)
    assert sum(one.after for one in ruling.classes) == N - len(gone)
    return gone.tolist()


@pytest.mark.parametrize(
    ("cut", "count"),
    [("flagged", 3), ("25%", 9), (0.25, 9), ("0.25", 9), ("1%", 1), (5, 5), ("5", 5), ("36", 36)],
)
def test_a_cut_takes_the_most_suspicious_of_those_judged(cut, count):
    assert dropped(cut) == sorted(ORDER[:count].tolist())


def test_a_cut_may_be_a_list_or_a_file(tmp_path):
    file = tmp_path / "7"  # a name like a number
    file.write_text("# bad\n11\n2\n")
    assert dropped([11, 2]) == dropped(np.array([2, 11])) == dropped(str(file)) == [2, 11]


@pytest.mark.parametrize(
    ("cut", "said"),
    [
        ("0", "whole number from 1 to the 36 judged"),
        ("37", "whole number from 1 to the 36 judged"),
        (1.5, "whole number from 1"),
        ("-0.1", "share above 0"),
        ("nan", "must be flagged"),
        ("0%", "above 0% and below 100%"),
        ("100%", "above 0% and below 100%"),
        ("nothing-here.txt", "file that is there"),
        ([40], "outside 0 to 39"),
        ([1, 1], "already at"),
        ([], "no sample is named"),
    ],
)
def test_a_cut_that_is_none_is_refused(cut, said):
    with pytest.raises(SpecError, match=said) as caught:
        dropped(cut)
    assert "\n" not in str(caught.value)
    assert "--drop" in str(caught.value)


def test_nothing_flagged_and_everything_dropped_are_refused():
    with pytest.raises(InputError, match="flagged none of 36 samples; give a share"):
        dropped("flagged", suspects(flagged=0))
    with pytest.raises(InputError, match="nothing would be left"):
        dropped(range(N))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "not none"),
        ({"drop": "5%", "relabel": True}, "--drop and --relabel"),
        ({"relabel": "5%", "downweight": 3}, "--relabel and --downweight"),
    ],
)
def test_exactly_one_rule_is_given(given, said):
    with pytest.raises(SpecError, match=said):
        the_rule(given.get("drop"), given.get("relabel", False), given.get("downweight", False))


def test_without_a_cut_the_flagged_ones_are_meant():
    assert the_rule(None, True, False).cut == "flagged"
    assert the_rule(None, False, "5%").cut == "5%"


def test_relabel_gives_the_suggested_label_and_says_who_keeps_theirs():
    found = suspects()
    found.suggested[ORDER[0]] = -1
    found.suggested[ORDER[1]] = found.given[ORDER[1]]
    ruling = apply_rule(Rule(kind="relabel", cut=5), found)
    changed = np.sort(ORDER[2:5])
    assert np.flatnonzero(ruling.action == "relabel").tolist() == changed.tolist()
    assert (ruling.label[changed] == found.suggested[changed]).all()
    assert (np.delete(ruling.label, changed) == np.delete(found.given, changed)).all()
    assert (ruling.weight == 1).all()
    assert ruling.notes == ("2 of 5 samples have no other label suggested and are kept as they are",)
    assert sum(one.after for one in ruling.classes) == N


def test_relabel_without_any_suggestion_is_refused():
    with pytest.raises(InputError, match="suggests no other label for any of 3 samples"):
        apply_rule(Rule(kind="relabel", cut="flagged"), suspects(suggested=np.full(N, -1)))


def test_downweight_weighs_by_score_and_keeps_the_mean():
    found = suspects()
    ruling = apply_rule(Rule(kind="downweight", cut=10), found)
    by_hand = np.ones(N)
    by_hand[ORDER[:10]] = np.maximum(found.score[ORDER[:10]], LEAST_WEIGHT)
    assert ruling.weight == pytest.approx(by_hand / by_hand.mean())
    assert ruling.weight.mean() == pytest.approx(1)
    assert ruling.weight.min() > 0
    assert (ruling.action == "downweight").sum() == 10


def test_downweight_leaves_what_was_not_judged():
    alone = ORDER[JUDGED:].tolist()
    ruling = apply_rule(Rule(kind="downweight", cut=[*alone, int(ORDER[0])]), suspects())
    assert np.flatnonzero(ruling.action == "downweight").tolist() == [ORDER[0]]
    assert "4 of 5 samples were not judged" in ruling.notes[0]
    with pytest.raises(InputError, match="none of 4 samples has a score"):
        apply_rule(Rule(kind="downweight", cut=alone), suspects())


@pytest.mark.parametrize(
    ("kind", "cut"), [("drop", "5%"), ("drop", 3), ("relabel", "flagged"), ("downweight", "flagged")]
)
def test_a_list_can_be_dropped_and_nothing_else(kind, cut):
    of_list = listed([5, 1, 30], np.arange(N) % 4, "--list")
    assert dropped("flagged", of_list) == [1, 5, 30]
    with pytest.raises(InputError, match="a list has no order, score or suggestion; use --drop flagged"):
        apply_rule(Rule(kind=kind, cut=cut), of_list)


def test_a_class_that_loses_much_is_warned_of():
    """Class 0 loses 6 of 10: more than half. Class 1 loses 5 of 10 of 40 with 11 lost: 1.8 times its share."""
    ruling = apply_rule(Rule(kind="drop", cut=[*range(0, 24, 4), *range(1, 21, 4)]), suspects())
    assert ruling.warnings == (
        "class 0 loses 6 of 10 samples, more than half: look at them first",
        "class 1 loses 5 of 10 samples, 1.8 times its share: look at them first",
    )
    assert apply_rule(Rule(kind="drop", cut=[0, 4, 8, 12]), suspects()).warnings == ()  # four are few
    assert apply_rule(Rule(kind="drop", cut=list(range(20))), suspects()).warnings == ()  # all lose alike
