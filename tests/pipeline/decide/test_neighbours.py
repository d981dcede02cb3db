"""knn: neighbours among the last layer's inputs, their vote, and what cannot be asked."""

from __future__ import annotations

import numpy as np
import pytest
from hydra_pipe.pipeline.decide.outputs import neighbours, vote
from hydra_pipe.storage.errors import InputError, RecipeError, SpecError
from torch import nn

from tests.end_to_end.support import serial
from tests.pipeline.decide.test_own_gradients import SCORERS, case
from tests.recipes import Small


def test_neighbours_are_the_nearest_by_cosine_of_standardised_features():
    features = np.random.default_rng(0).normal(size=(30, 4)) * [1, 10, 100, 0] + [5, 0, -3, 2]
    wide = (features - features.mean(0))[:, :3] / features.std(0)[:3]
    wide /= np.linalg.norm(wide, axis=1)[:, None]
    cosine = wide @ wide.T
    np.fill_diagonal(cosine, -np.inf)
    near, similar = neighbours(features, 5)
    right = np.argsort(-cosine, axis=1)[:, :5]
    assert np.array_equal(near, right)
    assert np.allclose(similar, (1 + np.take_along_axis(cosine, right, 1)) / 2)


def test_the_vote_counts_neighbours_and_breaks_ties_by_nearness():
    label = np.array([0, 0, 1, 1, 5])
    near = np.array([[1, 2], [0, 2], [3, 0], [2, 4], [2, 3]])
    similar = np.array([[0.9, 0.6], [0.6, 0.9], [0.9, 0.8], [0.9, 0.1], [0.9, 0.8]])
    found = vote(label, near, similar)
    assert np.allclose(found.suspicion, [(1 + 0.4) / 3, (1 + 0.6) / 3, (1 + 8 / 17) / 3, (1 + 0.1) / 3, 1])
    assert found.suggested.tolist() == [-1, 1, -1, -1, 1]
    assert found.reason[4] == "2 of 2 nearest samples have another label, 2 of them 1"
    assert found.reason[0] == "1 of 2 nearest samples have another label"


class Wrong(Small):
    """Small, on clusters far apart, with two labels moved on."""

    def train_dataset(self):
        dataset = super().train_dataset()
        inputs, targets = dataset.tensors
        inputs += 4 * (inputs.new_tensor(np.eye(3, 6))[targets])
        targets[[5, 11]] = (targets[[5, 11]] + 1) % 3
        return dataset


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    return serial(tmp_path_factory.mktemp("knn") / "r", Wrong(), epochs=2)


def test_wrong_labels_are_found_and_the_right_ones_suggested(done):
    found = SCORERS["knn"].score(case(done, Wrong()))
    assert set(np.argsort(-found.suspicion)[:2]) == {5, 11}
    given = done.samples()["label"].to_numpy()
    assert found.suggested[[5, 11]].tolist() == ((given[[5, 11]] - 1) % 3).tolist()
    few = SCORERS["knn"].score(case(done, Wrong(), tracked=[0, 1, 2, 5], neighbours=10))
    assert few.notes == {"neighbours": 3}  # all others there are


def test_what_has_no_neighbours(done):
    for options, error, words in (
        ({"neighbours": 0}, SpecError, r"neighbours 0: must be at least 1"),
        ({"tracked": [3]}, InputError, r"knn: 1 sample is judged, and it takes at least 2"),
        ({"given": [2] * 45}, InputError, r"knn: all 45 samples have label 2; it takes 2 classes"),
    ):
        with pytest.raises(error, match=words):
            SCORERS["knn"].score(case(done, Wrong(), **options))


class Logs(Small):
    def model(self):
        return nn.Sequential(nn.Linear(6, 3), nn.LogSoftmax(1))

    def losses(self, model, batch):
        return nn.functional.nll_loss(model(batch[0]), batch[1], reduction="none")


class Apart(Small):
    def losses(self, model, batch):
        return nn.functional.cross_entropy(model[2](model[:2](batch[0])), batch[1], reduction="none")


class Listed(Small):
    """Its output is that of no layer."""

    def model(self):
        class Summed(nn.Sequential):
            def forward(self, x):
                return super().forward(x) + 1

        return Summed(nn.Linear(6, 3))


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        (Logs, r"its output, of shape \(B, 3\), is that of layer '1', a LogSoftmax; "),
        (Apart, r"losses\(\) does not call the model as a whole; "),
        (Listed, r"its output, of shape \(B, 3\), is what no layer returned; "),
    ],
)
def test_a_model_without_a_last_linear_layer_is_named(recipe, words, tmp_path):
    run = serial(tmp_path / "r", recipe(), epochs=1)
    with pytest.raises(RecipeError, match=rf"the model has no last linear layer: {words}.*use another --by"):
        SCORERS["knn"].score(case(run, recipe()))
