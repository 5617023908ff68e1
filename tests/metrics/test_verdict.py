"""The three verdicts: what each needs, what none may do, and how often they are wrong."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lori_manager.metrics.multiple import holm
from lori_manager.metrics.paired import mcnemar_exact, sign_flip
from lori_manager.metrics.power import rows_to_decide
from lori_manager.metrics.verdict import Compared, decide, judge, judge_family, measure

NAN = math.nan


def pair(rows, lost, gained):
    """Right/wrong outcomes with these counts; the rest stays right."""
    before, after = np.ones(rows), np.ones(rows)
    before[:gained] = 0
    after[gained : gained + lost] = 0
    return before, after


def test_an_unchanged_task_is_safe_once_its_rows_can_show_it():
    few, many = (judge(*pair(n, 0, 0), margin=0.02) for n in (100, 150))
    assert (few.verdict, few.rows_needed) == ("undecided", 149)
    assert "149 rows would decide it if still none changed" in few.note
    assert few.lower < -0.02 < 0 == few.difference
    assert (many.verdict, many.rows_needed) == ("safe", None)


def test_a_clear_drop_is_regressed_and_a_small_one_is_undecided():
    clear, small = judge(*pair(200, 20, 4), margin=0.02), judge(*pair(200, 6, 4), margin=0.02)
    assert clear.verdict == "regressed"
    assert clear.difference == pytest.approx(-0.08)
    assert clear.p == clear.p_holm == mcnemar_exact(20, 4, "less") <= 0.05
    assert clear.upper < 0
    assert small.verdict == "undecided"
    assert small.rows_needed > 200
    assert f"{small.rows_needed} rows would decide it with probability 0.8" in small.note
    assert "5.0%" in small.note


def test_rows_that_would_decide_are_more_than_there_are():
    j = judge(*pair(50, 6, 1), margin=0.2)  # the chance says 47, and 50 did not do
    assert j.verdict == "undecided"
    assert rows_to_decide(6 / 50, 1 / 50, 0.2) < 50 < j.rows_needed == 51


def test_a_real_drop_within_the_margin_is_safe():
    j = judge(*pair(2000, 30, 10), margin=0.03)
    assert j.p < 0.05
    assert j.upper < 0
    assert j.verdict == "safe"


def test_holm_over_the_family_takes_a_lone_drop_back():
    drop, flat = Compared(*pair(200, 12, 3), 0.01), Compared(*pair(200, 5, 5), 0.01)
    alone, among = judge_family([drop])[0], judge_family([drop, *[flat] * 9])[0]
    assert alone.verdict == "regressed"
    assert among.verdict == "undecided"
    assert among.p == alone.p <= 0.05 < among.p_holm == pytest.approx(10 * alone.p)
    assert among.rows_needed == rows_to_decide(0.06, 0.015, 0.01, tests=10) > 200


def test_a_task_without_common_rows_is_undecided_and_no_member_of_the_family():
    drop = Compared(*pair(200, 12, 3), 0.01)
    empty = Compared([1, 0, NAN, NAN, NAN], [NAN, NAN, 1, 1, NAN], 0.01)
    family = judge_family([drop, empty, empty])
    assert family[0].verdict == "regressed"
    assert family[0].p_holm == family[0].p
    nothing = family[1]
    assert (nothing.verdict, nothing.rows, nothing.rows_needed) == ("undecided", 0, None)
    assert math.isnan(nothing.p)
    assert math.isnan(nothing.lower)
    assert (nothing.rows_only_before, nothing.rows_only_after) == (2, 2)
    assert nothing.note == "no row was measured on both sides"


def test_rows_scored_on_one_side_are_told_whichever_way_the_scorer_points():
    before, after = [1, 0, NAN, 1, 1], [1, NAN, 1, NAN, 0]
    for higher in (True, False):
        j = judge(before, after, 0.1, higher_is_better=higher)
        assert (j.rows, j.rows_only_before, j.rows_only_after) == (2, 2, 1)
        assert j.difference == (-0.5 if higher else 0.5)


def test_errors_count_as_right_wrong_outcomes_of_which_fewer_are_better():
    before, after = pair(200, 20, 4)
    right = judge(before, after, 0.02)
    wrong = judge(1 - before, 1 - after, 0.02, higher_is_better=False)
    assert wrong == right


def test_perplexity_weighs_rows_by_their_tokens():
    random = np.random.default_rng(0)
    tokens = random.integers(5, 200, 150)
    before = random.gamma(4, 0.5, 150)
    worse = before + 0.05 + random.normal(0, 0.05, 150)
    lower = {"weights": tokens, "higher_is_better": False}
    j = judge(before, worse, 0.01, **lower)
    assert j.verdict == "regressed"
    assert j.test == "sign-flip"
    assert j.difference == pytest.approx(-np.average(worse - before, weights=tokens))
    assert j.lower < j.difference < j.upper < 0
    assert judge(worse, before, 0.01, **lower).verdict == "safe"
    assert judge(before, worse, 0.08, **lower).verdict == "safe"
    moved = random.normal(0, 0.05, 150)
    p = judge(before, before + moved, 0.01, **lower).p
    assert p == pytest.approx(sign_flip(-tokens * moved, "less"), rel=0.05) != 1.0
    assert p != pytest.approx(sign_flip(-moved, "less"), rel=0.05)
    # A row of weight 0 counts as not measured.
    weights = np.append(tokens, 0)
    assert judge([*before, 0.0], [*worse, 9.0], 0.01, weights=weights, higher_is_better=False) == j


def test_numbers_that_never_move_do_not_pass_for_safe_on_few_rows():
    scores = np.tile([0.2, 0.9, 0.5], 10)
    j = judge(scores, scores, 0.02)
    assert j.verdict == "undecided"
    assert j.lower < -0.02
    assert judge(scores, scores, 0.02).rows_needed > 30
    assert judge(np.tile(scores, 20), np.tile(scores, 20), 0.02).verdict == "safe"
    constant = judge([0.5] * 30, [0.5] * 30, 0.02)
    assert (constant.verdict, constant.rows_needed) == ("undecided", None)
    assert "same number" in constant.note
    single = judge([0.4], [0.5], 0.02)
    assert (single.verdict, single.rows_needed) == ("undecided", None)
    assert "single row" in single.note


def test_the_same_seed_gives_the_same_verdict_and_measuring_first_changes_nothing():
    random = np.random.default_rng(1)
    tasks = [
        Compared(a := random.random(60), a + random.normal(0, 0.1, 60), 0.03) for _ in range(3)
    ]
    assert judge_family(tasks) == judge_family(tasks) == decide([measure(t) for t in tasks])
    assert judge_family(tasks, seed=1)[0].lower != judge_family(tasks)[0].lower
    assert judge_family([]) == []


def test_confidence_is_taken_at_its_word():
    strict, loose = (judge(*pair(200, 9, 2), 0.01, confidence=c) for c in (0.99, 0.9))
    assert strict.lower < loose.lower < loose.upper < strict.upper
    assert (strict.verdict, loose.verdict) == ("undecided", "regressed")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"margin": -0.1}, "`margin` must be a finite number of at least 0, got -0.1"),
        ({"margin": NAN}, "`margin`"),
        ({"margin": 0.1, "confidence": 0.5}, "`confidence` must be above .5"),
        ({"margin": 0.1, "weights": [1.0]}, "`weights` must have one number per row"),
    ],
)
def test_what_makes_no_sense_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        judge([1, 0], [1, 1], **options)


@st.composite
def families(draw):
    tasks = []
    for _ in range(draw(st.integers(1, 6))):
        rows = draw(st.integers(1, 120))
        lost = draw(st.integers(0, rows))
        tasks.append(
            Compared(*pair(rows, lost, draw(st.integers(0, rows - lost))), draw(st.floats(0, 0.3)))
        )
    return tasks


@settings(max_examples=150)
@given(families())
def test_every_verdict_follows_from_the_numbers_beside_it(tasks):
    judged = judge_family(tasks)
    assert [j.p_holm for j in judged] == holm([j.p for j in judged]).tolist()
    for j in judged:
        assert j.lower <= j.difference <= j.upper
        assert (j.verdict == "safe") == (j.lower > -j.margin)
        regressed = j.lower <= -j.margin and j.p_holm <= 1 - j.confidence
        assert (j.verdict == "regressed") == regressed
        if j.p <= 1 - j.confidence:
            assert j.upper < 0  # right/wrong: the test and the bound do not quarrel
        if j.verdict == "undecided":
            assert j.rows_needed is None or j.rows_needed > j.rows
        else:
            assert j.rows_needed is None


@pytest.mark.parametrize("tasks", [1, 10, 30])
def test_a_family_of_equal_models_is_called_regressed_at_most_so_often(tasks):
    random = np.random.default_rng(tasks)
    kept = {}

    def measured(lost, gained):
        if (lost, gained) not in kept:
            kept[lost, gained] = measure(Compared(*pair(300, lost, gained), 0.01))
        return kept[lost, gained]

    alarms = 0
    for family in random.multinomial(300, [0.05, 0.05, 0.9], (1000, tasks)).tolist():
        judged = decide([measured(b, c) for b, c, _ in family])
        alarms += any(j.verdict == "regressed" for j in judged)
    assert alarms / 1000 <= 0.05


def test_a_drop_of_exactly_the_margin_is_called_safe_at_most_so_often():
    random = np.random.default_rng(3)
    for rows, lost, gained, margin in ((150, 0.02, 0.0, 0.02), (300, 0.06, 0.03, 0.03)):
        counts = random.multinomial(rows, [lost, gained, 1 - lost - gained], 1500).tolist()
        said = [judge(*pair(rows, b, c), margin).verdict for b, c, _ in counts]
        assert said.count("safe") / 1500 <= 0.055  # 1500 draws wander by .006
