"""A character model that learns to write Python from the standard library's text. NumPy only, gradients by hand.

    spark run examples/charmodel_numpy.py                            until `q` or Ctrl-C
    spark run --exit examples/charmodel_numpy.py -- --steps 2000     until step 2000; without --exit it then takes calls
    python examples/charmodel_numpy.py --steps 2000                  the same without the runtime

While it trains, change BATCH, the activation in `forward`, or what is printed, and save: the new code goes on with the
same weights, and draws the batches that the old code would have drawn. From another terminal:

    spark ctl call sample '["def ", 200]'       let it write
    spark ctl call evaluate                     the loss on text that it never sees
    spark ctl set rate 0.0005                   turn the learning rate
"""

import argparse
import os
import random
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from spark_runtime import spark

CONTEXT, EMBED, HIDDEN, SYMBOLS = 12, 16, 192, 128
BATCH = 128

# The top level of new code runs while the old code still trains, so reading the text holds nobody up.
LIBRARY = sorted(Path(os.__file__).parent.glob("*.py"))
TEXT = np.frombuffer(b"\n".join(path.read_bytes() for path in LIBRARY), np.uint8) % SYMBOLS
TRAINING, HELD_OUT = np.split(TEXT, [int(0.95 * len(TEXT))])


@dataclass
class Model:
    """Everything that outlives the code: weights, Adam's two moments of each, and how far the training is."""

    weights: dict[str, np.ndarray]
    moments: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    step: int = 0
    loss: float = float(np.log(SYMBOLS))


def fresh_model() -> Model:
    """Seed here, not in torch(): this runs once, and a reload goes on with the random numbers where they were."""
    np.random.seed(0)
    shapes = {"embed": (SYMBOLS, EMBED), "inner": (CONTEXT * EMBED, HIDDEN), "outer": (HIDDEN, SYMBOLS)}
    return Model({name: np.random.normal(0, s[0] ** -0.5, s).astype(np.float32) for name, s in shapes.items()})


def cut(text: np.ndarray, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the characters from each start, and the one that follows them."""
    return text[starts[:, None] + np.arange(CONTEXT)], text[starts + CONTEXT]


def forward(weights: dict[str, np.ndarray], context: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the input, the hidden layer, and how likely each character is to come next."""
    given = weights["embed"][context].reshape(len(context), -1)
    hidden = np.tanh(given @ weights["inner"])
    scores = hidden @ weights["outer"]
    odds = np.exp(scores - scores.max(1, keepdims=True))
    return given, hidden, odds / odds.sum(1, keepdims=True)


def train_step(model: Model, rate: float) -> float:
    """Move the weights once; return the loss of the batch."""
    context, wanted = cut(TRAINING, np.random.randint(len(TRAINING) - CONTEXT, size=BATCH))
    given, hidden, guess = forward(model.weights, context)
    rows = np.arange(len(wanted))
    loss = float(-np.log(guess[rows, wanted]).mean())
    guess[rows, wanted] -= 1
    back = guess @ model.weights["outer"].T * (1 - hidden**2)
    slopes = {"embed": np.zeros((SYMBOLS, EMBED), np.float32), "inner": given.T @ back, "outer": hidden.T @ guess}
    np.add.at(slopes["embed"], context, (back @ model.weights["inner"].T).reshape(*context.shape, EMBED))
    model.step += 1
    for name, slope in slopes.items():
        mean, square = model.moments.setdefault(name, (np.zeros_like(slope), np.zeros_like(slope)))
        mean += 0.1 * (slope / BATCH - mean)
        square += 0.01 * ((slope / BATCH) ** 2 - square)
        move = mean / (1 - 0.9**model.step) / (np.sqrt(square / (1 - 0.99**model.step)) + 1e-8)
        model.weights[name] -= np.float32(rate) * move
    return loss


def evaluate() -> float:
    """Return the loss, in nats per character, on text that is never trained on."""
    context, wanted = cut(HELD_OUT, np.linspace(0, len(HELD_OUT) - CONTEXT - 1, 4096, dtype=int))
    guess = forward(spark.persist("model", fresh_model).weights, context)[2]
    return float(-np.log(guess[np.arange(len(wanted)), wanted]).mean())


def sample(text: str = "def ", n: int = 200) -> str:
    """Go on with *text* for *n* characters. The dice are its own, so the training is the same as without it."""
    model, dice = spark.persist("model", fresh_model), random.Random(0)
    written = [ord("\n")] * CONTEXT + list(text.encode("ascii", "replace"))
    for _ in range(n):
        guess = forward(model.weights, np.array([written[-CONTEXT:]]))[2][0]
        written += dice.choices(range(SYMBOLS), (guess**1.3).tolist())  # a little bolder than it is sure
    return bytes(written[CONTEXT:]).decode()


def torch() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=sys.maxsize)
    steps = parser.parse_args().steps
    model = spark.persist("model", fresh_model)
    spark.expose(model=model, evaluate=evaluate, sample=sample)
    while model.step < steps:
        spark.checkpoint()
        loss = train_step(model, spark.control("rate", 0.002, min=0.0, max=0.1))
        model.loss += 0.05 * (loss - model.loss)
        spark.log(loss=loss)
        if model.step == 1 or model.step % 200 == 0:
            print(f"step {model.step:6}   loss {model.loss:.3f}")


if __name__ == "__main__":
    torch()
