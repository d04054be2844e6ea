"""A training step under any `tf.distribute` strategy, without `fit`."""

from collections.abc import Callable

import keras
import tensorflow as tf


def train_function(strategy: tf.distribute.Strategy, model: keras.Model) -> Callable:
    """A function of a batch that makes one step and returns the loss."""
    weights = model.trainable_variables
    with strategy.scope():
        model.optimizer.build(weights)  # `strategy.run` may not create variables

    def step(x: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape() as tape:
            # A Keras loss divides by the number of replicas; `apply` sums over them.
            loss = keras.losses.BinaryCrossentropy()(y, model(x, training=True))
        gradients = tape.gradient(loss, [weight.value for weight in weights])
        model.optimizer.apply(gradients, weights)
        return loss

    @tf.function
    def train(x: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
        return strategy.reduce("SUM", strategy.run(step, args=(x, y)), axis=None)

    return train
