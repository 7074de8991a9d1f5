"""A character model that learns to write Python from the standard library's text. A small GRU in PyTorch.

    spark run examples/charmodel_torch.py                            until `q` or Ctrl-C
    spark run --exit examples/charmodel_torch.py -- --steps 500      until step 500; without --exit it then takes calls
    python examples/charmodel_torch.py --steps 500                   the same without the runtime

While it trains, change BATCH, LENGTH, `loss_of`, or what is printed, and save: weights, Adam, step and random numbers
go on where they are. PyTorch is imported as `pt`, since `torch` is the name of the function that the runtime calls.
From another terminal:

    spark ctl call sample '["def ", 200]'       let it write
    spark ctl call evaluate                     the loss on text that it never sees
    spark ctl set rate 0.0005                   turn the learning rate
"""

import argparse
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch as pt
from torch import Tensor, nn

from spark_runtime import spark

EMBED, HIDDEN, SYMBOLS = 32, 128, 128
BATCH, LENGTH = 16, 48

# The top level of new code runs while the old code still trains, so reading the text holds nobody up.
LIBRARY = sorted(Path(os.__file__).parent.glob("*.py"))
TEXT = pt.frombuffer(bytearray(b"\n".join(path.read_bytes() for path in LIBRARY)), dtype=pt.uint8) % SYMBOLS
TRAINING, HELD_OUT = TEXT.split([int(0.95 * len(TEXT)), len(TEXT) - int(0.95 * len(TEXT))])


class Writer(nn.Module):
    """Reads characters, and after each says how likely every character is to come next."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(SYMBOLS, EMBED)
        self.memory = nn.GRU(EMBED, HIDDEN, batch_first=True)
        self.guess = nn.Linear(HIDDEN, SYMBOLS)

    def forward(self, text: Tensor, before: Tensor | None = None) -> tuple[Tensor, Tensor]:
        seen, after = self.memory(self.embed(text), before)
        return self.guess(seen), after


@dataclass
class Progress:
    """How far the training is."""

    step: int = 0
    loss: float = 0.0


def fresh_writer() -> Writer:
    """Seed here, not in torch(): this runs once, and a reload goes on with the random numbers where they were."""
    pt.manual_seed(0)
    return Writer()


def loss_of(writer: Writer, text: Tensor, starts: Tensor) -> Tensor:
    """Return the loss, in nats per character, of the writer on the text from each start."""
    lines = text[starts[:, None] + pt.arange(LENGTH + 1)].long()
    guesses, _ = writer(lines[:, :-1])
    return nn.functional.cross_entropy(guesses.flatten(0, 1), lines[:, 1:].flatten())


@pt.no_grad()
def evaluate() -> float:
    """Return the loss on text that is never trained on."""
    writer = spark.persist("writer", fresh_writer)
    return loss_of(writer, HELD_OUT, pt.arange(0, len(HELD_OUT) - LENGTH, 512)).item()


@pt.no_grad()
def sample(text: str = "def ", n: int = 200) -> str:
    """Go on with *text* for *n* characters. The dice are its own, so the training is the same as without it."""
    writer, dice = spark.persist("writer", fresh_writer), pt.Generator().manual_seed(0)
    written = list(text.encode("ascii", "replace")) or [ord("\n")]
    guesses, memory = writer(pt.tensor([written]))
    for _ in range(n):
        odds = (1.3 * guesses[0, -1]).softmax(0)  # a little bolder than it is sure
        written.append(int(pt.multinomial(odds, 1, generator=dice)))
        guesses, memory = writer(pt.tensor([written[-1:]]), memory)
    return bytes(written).decode()


def torch() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=sys.maxsize)
    steps = parser.parse_args().steps
    writer = spark.persist("writer", fresh_writer)
    adam = spark.persist("adam", lambda: pt.optim.Adam(writer.parameters()))  # goes on with the same weights
    progress = spark.persist("progress", Progress)
    spark.expose(progress=progress, evaluate=evaluate, sample=sample)
    while progress.step < steps:
        spark.checkpoint()
        adam.param_groups[0]["lr"] = spark.control("rate", 0.005, min=0.0, max=0.1)
        loss = loss_of(writer, TRAINING, pt.randint(len(TRAINING) - LENGTH, (BATCH,)))
        adam.zero_grad()
        loss.backward()
        adam.step()
        progress.step += 1
        progress.loss += (loss.item() - progress.loss) / min(progress.step, 20)
        spark.log(loss=loss.item())
        if progress.step == 1 or progress.step % 50 == 0:
            print(f"step {progress.step:6}   loss {progress.loss:.3f}")


if __name__ == "__main__":
    torch()
