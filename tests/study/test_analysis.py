"""Statistics of a study, on published examples and on simulated raters."""

import numpy as np
import pytest

from fourdfy.study.analysis import (
    FEW,
    Votes,
    agreement,
    bradley_terry,
    holm,
    krippendorff_alpha,
    log_strengths,
    preference,
    vote_weights,
)


def simulated(generator, share, *, raters=20, prompts=15, spread=0.0, ties=0.1):
    """Votes for method 0 with a probability; ``spread`` is the deviation of raters' and prompts' own ones."""
    rater, prompt = (grid.reshape(-1) for grid in np.meshgrid(range(raters), range(prompts), indexing="ij"))
    own = (spread * generator.standard_normal(count) for count in (raters, prompts))
    chance = share + next(own)[rater] + next(own)[prompt]
    score = (generator.random(len(rater)) < chance).astype(float)
    score[generator.random(len(rater)) < ties] = 0.5
    return Votes(rater, prompt, np.zeros_like(rater), np.ones_like(rater), score)


def found(votes, samples=400):
    return preference(votes, 0, 1, vote_weights(votes, samples))


def test_a_planted_preference_is_recovered():
    generator = np.random.default_rng(1)
    results = [found(simulated(generator, 0.65, ties=0.0)) for _ in range(100)]
    assert np.mean([result.share.value for result in results]) == pytest.approx(0.65, abs=0.01)
    assert sum(result.p < 0.05 for result in results) >= 98
    assert sum(result.share.low > 0.5 for result in results) >= 95


def test_a_null_rejects_in_about_5_percent():
    generator = np.random.default_rng(2)
    results = [found(simulated(generator, 0.5), samples=1) for _ in range(2000)]
    assert 0.03 < np.mean([result.p < 0.05 for result in results]) < 0.06


def test_intervals_hold_where_raters_and_prompts_differ_and_the_sign_test_does_not():
    generator = np.random.default_rng(3)
    results = [found(simulated(generator, 0.5, raters=30, prompts=30, spread=0.15)) for _ in range(200)]
    assert np.mean([result.share.low <= 0.5 <= result.share.high for result in results]) > 0.9
    assert np.mean([result.p < 0.05 for result in results]) > 0.2


def test_intervals_of_fewer_than_five_raters_or_prompts_are_too_narrow():
    generator = np.random.default_rng(6)

    def holds(raters, prompts):
        votes = (simulated(generator, 0.5, raters=raters, prompts=prompts, spread=0.3) for _ in range(200))
        return np.mean([of.share.low <= 0.5 <= of.share.high for of in map(found, votes)])

    assert holds(FEW, 15) > 0.92 < holds(20, FEW)
    assert holds(2, 15) < 0.9 > holds(20, 2)
    assert found(simulated(generator, 0.5, raters=3, prompts=7)).clusters == 3
    assert found(simulated(generator, 0.5, raters=7, prompts=2)).clusters == 2


def test_the_sign_test_leaves_ties_out_and_the_share_halves_them():
    score = np.array([1, 1, 1, 1, 1, 1, 0.5, 0.5, 0])
    zeros = np.zeros(9, int)
    result = found(Votes(np.arange(9), zeros, zeros, zeros + 1, score))
    assert (result.wins, result.ties, result.losses) == (6, 2, 1)
    assert result.p == pytest.approx(2 * (1 + 7) / 2**7) and result.share.value == pytest.approx(7 / 9)


def test_holm_is_that_of_the_textbook():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1, 1]


def test_alpha_is_that_of_krippendorff_s_example():
    rows = "12332141 2 _ _ _|12332241 2 5 _ 3|_3332342 2 5 1 _|12332441 2 5 1 _".replace(" ", "").split("|")
    pairs = [(unit, int(v)) for row in rows for unit, v in enumerate(row) if v != "_"]
    assert krippendorff_alpha(*np.array(pairs).T) == pytest.approx(0.743, abs=5e-4)


def test_agreement_is_0_by_chance_and_unknown_of_single_answers():
    generator = np.random.default_rng(4)
    assert agreement(simulated(generator, 0.5, raters=40, prompts=40)) == pytest.approx(0, abs=0.02)
    assert agreement(simulated(generator, 0.5, raters=1)) is None


def test_answers_on_other_pairs_of_a_prompt_need_not_agree():
    first, second, score = np.array([(0, 1, 1.0), (0, 2, 0.0)] * 5).T
    votes = Votes(np.arange(10), np.zeros(10, int), first.astype(int), second.astype(int), score)
    assert agreement(votes) == 1


def test_strengths_are_those_that_were_planted():
    planted = np.array([0.8, 0.1, -0.9])
    chance = 1 / (1 + np.exp(planted[None] - planted[:, None]))
    assert np.allclose(log_strengths(1000 * chance * (1 - np.eye(3))), planted, atol=1e-6)


def test_strengths_stay_finite_where_one_never_loses_and_have_intervals():
    first, second, score = np.array([(0, 1, 1.0), (0, 2, 1.0), (1, 2, 1.0), (1, 2, 0.0)] * 20).T
    rater = np.repeat(np.arange(20), 4)
    votes = Votes(rater, rater % 5, first.astype(int), second.astype(int), score)
    best, *others = bradley_terry(votes, 3, vote_weights(votes, 50))
    assert 2 < best.value < 10 and best.low > max(other.high for other in others)
    assert others[0].value == pytest.approx(others[1].value)
