# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Ridge regression: against scikit-learn's and against leaving out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from scripts.measuring.ridge import fit_ridge, predicted_from_others

GENERATOR = np.random.default_rng(0)
FEATURES = GENERATOR.standard_normal((40, 6)) * [1, 10, 0.1, 1, 1, 1] + 3
TARGET = FEATURES @ [1.0, 0.2, 5.0, 0, 0, 0] + GENERATOR.standard_normal(40)


def test_weights_and_penalty_are_scikit_learn_s() -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    ours = fit_ridge(FEATURES, TARGET)
    standard = (FEATURES - FEATURES.mean(0)) / FEATURES.std(0)
    penalties = [10.0 ** (step / 2) * len(TARGET) for step in range(-8, 13)]  # singular values' mean square is N
    theirs = linear_model.RidgeCV(penalties).fit(standard, TARGET)
    assert ours.penalty == pytest.approx(theirs.alpha_)
    np.testing.assert_allclose(ours(FEATURES), theirs.predict(standard), rtol=1e-9)


def test_the_penalty_is_best_for_members_left_out_by_hand() -> None:
    standard = (FEATURES - FEATURES.mean(0)) / FEATURES.std(0)

    def error(penalty: float) -> float:
        told = []
        for one in range(40):
            rest = np.delete(np.arange(40), one)
            a, y = standard[rest] - standard[rest].mean(0), TARGET[rest]
            weights = np.linalg.solve(a.T @ a + penalty * np.eye(6), a.T @ (y - y.mean()))
            told.append(y.mean() + (standard[one] - standard[rest].mean(0)) @ weights)
        return float(np.mean((np.array(told) - TARGET) ** 2))

    best = fit_ridge(FEATURES, TARGET).penalty
    assert error(best) < min(error(best * 30), error(best / 30))


def test_features_that_say_nothing_tell_nothing() -> None:
    noise = np.random.default_rng(1).standard_normal((60, 5))
    told = predicted_from_others(noise, np.arange(60.0), seed=0)
    assert np.corrcoef(told, np.arange(60.0))[0, 1] < 0.3
    constant = fit_ridge(np.ones((5, 2)), np.arange(5.0))
    assert constant(np.ones((3, 2))) == pytest.approx([2.0] * 3)


def test_no_one_is_told_from_themselves() -> None:
    twice = np.repeat(np.random.default_rng(2).standard_normal((30, 200)), 2, axis=0)
    target = np.repeat(np.random.default_rng(3).standard_normal(30), 2)
    people = np.repeat(np.arange(30), 2).tolist()
    leaked, apart = (predicted_from_others(twice, target, 0, groups) for groups in (None, people))
    assert np.corrcoef(leaked, target)[0, 1] > 0.8 > 0.5 > np.corrcoef(apart, target)[0, 1]
