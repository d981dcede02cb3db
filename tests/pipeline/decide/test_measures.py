"""Measures and rules of flagging, held against scikit-learn and loops."""

from __future__ import annotations

import numpy as np
import pytest
from hydra_pipe.pipeline.decide import measures
from hydra_pipe.pipeline.decide.flags import apply_flag, check_flag, separation
from hydra_pipe.pipeline.decide.measures import Truth, measure
from hydra_pipe.storage.errors import InputError, SpecError
from sklearn.metrics import average_precision_score, roc_auc_score


def truth(wrong: np.ndarray, original: np.ndarray | None = None) -> Truth:
    return Truth(
        wrong=wrong, original=np.full(len(wrong), -1) if original is None else original, source="the test"
    )


def drawn(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Suspicions with many ties, and which labels are wrong."""
    draw = np.random.default_rng(seed)
    wrong = draw.random(n) < 0.2
    return np.round(draw.normal(size=n) + 1.5 * wrong, 1), wrong


def test_measures_are_those_of_the_definitions():
    suspicion, wrong = drawn(200)
    order = np.argsort(-suspicion, kind="stable")
    found = measure(suspicion, order, np.full(200, -1), truth(wrong), seed=0)
    assert found.auroc.value == pytest.approx(roc_auc_score(wrong, suspicion), abs=1e-12)
    assert found.average_precision.value == pytest.approx(
        average_precision_score(wrong, suspicion), abs=1e-12
    )
    m = int(wrong.sum())
    assert found.precision.value == wrong[order[:m]].sum() / m
    for one, k in zip(found.recall, (10, 20, 40), strict=True):
        assert one.found.value == wrong[order[:k]].sum() / m
    assert found.curve[0] == (0.0, 0.0)
    assert found.curve[-1] == (1.0, 1.0)
    assert dict(found.curve)[0.1] == wrong[order[:20]].sum() / m
    assert found.suggested_right is None
    for one in (found.auroc, found.average_precision, found.precision):
        assert one.low < one.value < one.high


def test_resamples_are_measured_like_samples(monkeypatch):
    """Each draw by hand: the samples repeated, sorted, and given to scikit-learn."""
    suspicion, wrong = drawn(60, 1)
    order = np.argsort(-suspicion, kind="stable")
    suspicion, wrong = suspicion[order], wrong[order]
    kept = []
    real = measures._counts
    monkeypatch.setattr(measures, "_counts", lambda *given: (kept.append(real(*given)), kept[-1])[1])
    monkeypatch.setattr(measures, "TOGETHER", 60 * 7)  # in blocks, the last one shorter
    right = wrong & (np.arange(60) % 2 == 0)
    wanted = (int(wrong.sum()), 3, 12)
    found = measures._bootstrap(wrong, measures._groups(suspicion), right, wanted, 20, seed=3)
    counts = np.concatenate([a + b for a, b in zip(kept[::2], kept[1::2], strict=True)])
    m = wrong.sum()
    for row, times in zip(found, counts, strict=True):
        values, bad, good = (np.repeat(x, times) for x in (suspicion, wrong, right))
        assert (len(bad), bad.sum()) == (60, m)
        assert row[0] == pytest.approx(roc_auc_score(bad, values))
        assert row[1] == pytest.approx(average_precision_score(bad, values))
        assert row[2:5] == pytest.approx([bad[: wanted[0]].mean(), bad[:3].sum() / m, bad[:12].sum() / m])
        assert row[5] == pytest.approx(good[bad].mean())


def test_the_same_seed_draws_the_same_and_large_runs_draw_less(monkeypatch):
    suspicion, wrong = drawn(300)
    order = np.argsort(-suspicion, kind="stable")

    def found(seed):
        return measure(suspicion, order, np.full(300, -1), truth(wrong), seed=seed)

    assert found(0) == found(0)
    assert found(0).auroc.low != found(1).auroc.low
    assert found(0).draws == 1000
    monkeypatch.setattr(measures, "DRAWN", 300 * 150)
    assert found(0).draws == 150


def test_of_what_nothing_is_said_is_least_suspicious():
    suspicion = np.array([3.0, 2.0, np.nan, np.nan])
    wrong = np.array([True, False, True, False])
    found = measure(suspicion, np.array([0, 1, 2, 3]), np.full(4, -1), truth(wrong), seed=0)
    assert found.auroc.value == roc_auc_score(wrong, [3, 2, 0, 0])


def test_suggested_labels_count_where_the_right_ones_are_known():
    wrong = np.array([True, True, True, False])
    original = np.array([5, 6, -1, -1])
    suggested = np.array([5, 1, 2, 3])
    found = measure(np.arange(4.0), np.arange(4)[::-1], suggested, truth(wrong, original), seed=0)
    assert found.suggested_right.value == pytest.approx(1 / 3)
    found = measure(np.arange(4.0), np.arange(4)[::-1], suggested, truth(wrong), seed=0)
    assert found.suggested_right is None


def flagged(rule, ordered, **given):
    return apply_flag(rule, ordered, **{"share": None, "estimated": lambda: 7, "seed": 0, **given})


def test_each_rule_flags_by_its_own():
    draw = np.random.default_rng(0)
    ordered = -np.sort(-np.concatenate([draw.normal(9, 1, 40), draw.normal(0, 1, 160)])) * 1e-9
    assert flagged("two-means", ordered).count == 40
    assert flagged("mixture", ordered).count == 40
    assert flagged("known", ordered, share=0.124).count == 25
    assert flagged("confident", ordered).count == 7
    assert flagged("none", ordered).count == 0
    assert flagged("auto", ordered).rule == "none"
    assert flagged("auto", ordered, share=0.5).rule == "known"
    found = flagged("two-means", ordered)
    assert found.cut == ordered[39]
    assert found.separation == pytest.approx(9, rel=0.15)
    assert not found.inspect
    assert flagged("known", ordered, share=0.005).inspect
    assert not flagged("none", ordered).inspect


def test_a_wide_upper_part_does_not_flag_the_far_lower_end():
    draw = np.random.default_rng(1)
    ordered = -np.sort(-np.concatenate([draw.normal(3, 9, 80), draw.normal(0, 0.2, 400)]))
    found = flagged("mixture", ordered)
    assert 0 < found.count < 80
    assert found.cut > 0


def test_separation_is_in_pooled_standard_deviations():
    ordered = np.array([5.0, 3.0, 1.0, 1.0, 0.0, 1.0])
    above, below = ordered[:2], ordered[2:]
    pooled = np.sqrt((2 * above.var() + 4 * below.var()) / 4)
    assert separation(ordered, 2) == pytest.approx((4 - 0.75) / pooled)
    assert separation(ordered, 0) is None
    assert separation(np.zeros(4), 2) is None


def test_what_is_all_alike_is_not_parted():
    assert flagged("two-means", np.zeros(5)).count == 0
    assert flagged("mixture", np.full(3, np.nan)).count == 0


def test_an_unknown_share_and_wrong_words_are_refused():
    with pytest.raises(InputError, match="not known"):
        flagged("known", np.zeros(3))
    with pytest.raises(SpecError, match="did you mean 'mixture'"):
        check_flag("mixtures", None)
    with pytest.raises(SpecError, match="leave one of them out"):
        check_flag("none", 0.1)
    with pytest.raises(SpecError, match="above 0"):
        check_flag("known", 0)
