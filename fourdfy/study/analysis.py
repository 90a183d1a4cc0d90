"""Statistics of paired comparisons.

V votes on one question, M methods, B samples of a bootstrap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray
from scipy.stats import binomtest

SAMPLES = 2000
SEED = 0
FEW = 5
"""With fewer raters or prompts than that, the intervals of a bootstrap are too narrow (``docs/study.md``)."""


@dataclass(frozen=True)
class Votes:
    """Answers to one question. Raters, prompts and methods are numbers from 0 on."""

    rater: Int[ndarray, "V"]
    prompt: Int[ndarray, "V"]
    first: Int[ndarray, "V"]
    second: Int[ndarray, "V"]
    """Methods, the first with the lower number."""
    score: Float[ndarray, "V"]
    """1 if the first was preferred, 0 if the second, 0.5 for a tie."""


@dataclass(frozen=True)
class Estimate:
    """With the ends of its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Preference:
    """Of one method over another, on one question."""

    share: Estimate
    """Of votes for the first; a tie counts half. The interval is that of ``vote_weights``."""
    wins: int
    ties: int
    losses: int
    p: float
    """Of a two-sided sign test without ties (exact binomial); votes count as independent."""
    clusters: int
    """Number of raters or of prompts, whichever is smaller."""


def preference(votes: Votes, first: int, second: int, weights: Float[ndarray, "B V"]) -> Preference | None:
    """None without votes."""
    chosen = (votes.first == first) & (votes.second == second)
    score = votes.score[chosen]
    if not len(score):
        return None
    wins, losses = int((score == 1).sum()), int((score == 0).sum())
    p = binomtest(wins, wins + losses).pvalue if wins + losses else 1.0
    of_pair = weights[:, chosen]
    with np.errstate(invalid="ignore"):  # a sample may have none of these votes
        samples = of_pair @ score / of_pair.sum(1)
    share = _estimate(score.mean(), samples)
    clusters = min(len(np.unique(of[chosen])) for of in (votes.rater, votes.prompt))
    return Preference(share, wins, len(score) - wins - losses, losses, float(p), clusters)


def vote_weights(votes: Votes, samples: int = SAMPLES, seed: int = SEED) -> Float[ndarray, "B V"]:
    """How often each vote is in each sample of a bootstrap that draws raters and, independently, prompts (the
    pigeonhole bootstrap, Owen 2007): votes of one rater, or on one prompt, are not independent."""
    generator = np.random.default_rng(seed)
    weights = np.ones((samples, len(votes.score)))
    for cluster in (votes.rater, votes.prompt):
        _, index = np.unique(cluster, return_inverse=True)
        count = index.max(initial=0) + 1
        weights *= generator.multinomial(count, np.full(count, 1 / count), samples)[:, index]
    return weights


def holm(p: Sequence[float]) -> list[float]:
    """P-values corrected for their number (Holm 1979), in the same order."""
    order = np.argsort(p)
    stepped = np.asarray(p, float)[order] * np.arange(len(p), 0, -1)
    corrected = np.empty(len(p))
    corrected[order] = np.minimum(np.maximum.accumulate(stepped), 1)
    return corrected.tolist()


def bradley_terry(votes: Votes, methods: int, weights: Float[ndarray, "B V"]) -> list[Estimate]:
    """Log strengths, of mean 0: one method is preferred to another with odds of exp(difference). A tie is
    half a win for each; so is one more tie of each two, which keeps the strengths of those who never lose
    finite."""
    everything = np.concatenate([np.ones((1, len(votes.score))), weights])
    wins = np.zeros((len(everything), methods, methods))
    for i in range(methods):
        for j in range(i + 1, methods):
            chosen = (votes.first == i) & (votes.second == j)
            wins[:, i, j] = everything[:, chosen] @ votes.score[chosen] + 0.5
            wins[:, j, i] = everything[:, chosen] @ (1 - votes.score[chosen]) + 0.5
    values, *samples = log_strengths(wins)
    return [_estimate(value, of) for value, of in zip(values, np.stack(samples, 1), strict=True)]


def log_strengths(wins: Float[ndarray, "*B M M"]) -> Float[ndarray, "*B M"]:
    """The maximum of the likelihood by Hunter's MM algorithm (2004, eq. 3).

    Args:
        wins: how often the row was preferred to the column; none is 0 off the diagonal.
    """
    games, won = wins + wins.swapaxes(-1, -2), wins.sum(-1)
    values = np.zeros(won.shape)
    for _ in range(1000):
        strength = np.exp(values)
        faced = (games / (strength[..., :, None] + strength[..., None, :])).sum(-1)
        new = np.log(won / faced)
        new -= new.mean(-1, keepdims=True)
        change, values = np.abs(new - values).max(), new
        if change < 1e-8:
            break
    return values


def agreement(votes: Votes) -> float | None:
    """Krippendorff's alpha of nominal answers (2011): 1 if raters always agree, 0 as by chance; None if no
    comparison has two answers, or all are alike."""
    unit = np.stack([votes.prompt, votes.first, votes.second], 1)
    _, index = np.unique(unit, axis=0, return_inverse=True)
    return krippendorff_alpha(index.reshape(-1), (votes.score * 2).astype(int))


def krippendorff_alpha(unit: Int[ndarray, "V"], value: Int[ndarray, "V"]) -> float | None:
    """See ``agreement``.

    Args:
        unit: what each value is of.
    """
    counts = np.zeros((unit.max(initial=0) + 1, value.max(initial=0) + 1))
    np.add.at(counts, (unit, value), 1)
    counts = counts[counts.sum(1) > 1]
    of_unit, of_value, total = counts.sum(1), counts.sum(0), counts.sum()
    expected = (total**2 - (of_value**2).sum()) / max(total - 1, 1)
    observed = ((of_unit**2 - (counts**2).sum(1)) / (of_unit - 1)).sum()
    return float(1 - observed / expected) if expected else None


def _estimate(value: float, samples: Float[ndarray, "B"]) -> Estimate:
    low, high = np.nanpercentile(samples, [2.5, 97.5])
    return Estimate(float(value), float(low), float(high))
