"""The experiment with a GAN: its measures, its game and its tables."""

import keras
import numpy as np
import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("scipy")

from experiments import gan, report
from keras_lookahead_lazy import Lookahead

RANDOM = np.random.default_rng(0)


def test_energy_distance_of_two_points():
    x, y = np.array([[0.0, 0.0]]), np.array([[3.0, 4.0]])
    assert gan.energy_distance(x, y) == pytest.approx(10.0)
    assert gan.energy_distance(x, x) == 0.0


def test_real_points_are_found_in_all_bells_and_are_close():
    first, second = (gan.draw_points(RANDOM, (gan.POINTS,)) for _ in "ab")
    assert gan.bells_found(first) == gan.BELLS
    assert abs(gan.energy_distance(first, second)) < 0.01
    one_bell = first[np.linalg.norm(first - gan.centers()[0], axis=1) < 1]
    assert gan.bells_found(one_bell) == 1
    assert gan.energy_distance(one_bell, second) > 1


def test_optimizers_sync_where_they_are_evaluated():
    for name, k in gan.KS.items():
        built = gan.build_optimizer(name, 0.1)
        assert isinstance(built, Lookahead) == (k is not None)
        assert not k or gan.STEPS_AN_EPOCH % k == 0


@pytest.mark.skipif(
    keras.backend.backend() != "jax", reason="the GAN is written for it"
)
def test_both_players_move_at_once_and_sync_together():
    """One step of SGD for both, against gradients by differences in float64."""
    keras.utils.set_random_seed(0)
    game = gan.Game(lambda: Lookahead(keras.optimizers.SGD(1.0), k=1, alpha=0.25))
    real = gan.draw_points(RANDOM, (1, 8))
    noise = RANDOM.standard_normal((1, 8, gan.NOISE)).astype("float32")
    before = [[np.array(w, "float64") for w in weights] for weights, _ in game._state]
    game.play(real, noise)
    after = [[np.array(w) for w in weights] for weights, _ in game._state]

    def network(weights, x):
        for i in range(0, 6, 2):
            x = x @ weights[i] + weights[i + 1]
            x = np.maximum(x, 0) if i < 4 else x
        return x

    def losses(generator, discriminator):
        fake = network(discriminator, network(generator, noise[0]))
        true = network(discriminator, real[0])
        of_generator = np.logaddexp(0, -fake).mean()
        return of_generator, np.logaddexp(0, fake).mean() + np.logaddexp(
            0, -true
        ).mean()

    for player in (0, 1):
        bias = 5  # the last layer's, of the player that moves
        changed = [[w.copy() for w in weights] for weights in before]
        slopes = []
        for sign in (1, -1):
            changed[player][bias] = before[player][bias].copy()
            changed[player][bias][0] += sign * 1e-6
            slopes.append(losses(*changed)[player])
        slope = (slopes[0] - slopes[1]) / 2e-6
        moved = after[player][bias][0] - before[player][bias][0]
        np.testing.assert_allclose(moved, -0.25 * slope, rtol=1e-4)


def test_tables():
    def record(optimizer, rate, seed, distance):
        return {
            "settings": {"optimizer": optimizer, "learning_rate": rate, "seed": seed},
            "results": {"distance": distance, "bells": 8.0},
        }

    records = [
        record("adam", 0.1, 0, 0.5),
        record("adam", 0.2, 0, 0.4),
        record("adam", 0.2, 1, 0.5),
        record("adam", 0.2, 2, 0.7),
        record("lookahead-5", 0.1, 0, 0.2),
        record("lookahead-5", 0.2, 0, None),
        record("lookahead-5", 0.1, 1, 0.1),
        record("lookahead-5", 0.1, 2, 0.3),
    ]
    heading, adam, ours = report.gan_table(records)
    assert heading[1:] == ["0.1", "0.2"]
    assert adam[1:] == ["0.500, 8.0 bells", "0.533 ± 0.379, 8.0 bells"]
    assert ours[1:] == ["0.200 ± 0.248, 8.0 bells", "diverged"]
    groups = report._gan_groups(records)
    assert [group[0]["settings"]["learning_rate"] for group in groups.values()] == [
        0.1,
        0.1,
    ]
