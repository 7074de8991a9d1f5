"""Sheep, wolves and grass on an island. Each herd is a task of its own; they rise and fall after one another.

    spark run examples/async_simulation.py                           until `q` or Ctrl-C
    spark run --exit examples/async_simulation.py -- --steps 500     until day 500; without --exit it then takes calls
    python examples/async_simulation.py --steps 500                  the same without the runtime

While it runs, change FOOD, BIRTHS, or how an animal moves, and save: the island goes on with the animals that it has.
Nothing is half done at an `await`, so at every checkpoint the island can be kept. From another terminal:

    spark ctl call picture                      the island, line by line
    spark ctl call release '["wolves", 20]'     put animals ashore
    spark ctl call wait_for 400                 answers on that day, also if the code is reloaded meanwhile
    spark ctl set days_per_second 200           turn the clock
"""

import argparse
import asyncio
import random
import sys
from dataclasses import dataclass, field

from spark_runtime import spark

WIDTH, HEIGHT = 64, 32
REGROWS = 8  # days, the grass
FOOD = {"sheep": 4, "wolves": 16}  # what a meal gives; a day costs 1
BIRTHS = 0.05  # a day

Place = tuple[int, int]


@dataclass
class Animal:
    """Where it is, and how many days it can live without a meal."""

    place: Place
    energy: int


@dataclass
class Island:
    """Everything that outlives the code."""

    day: int = 0
    grazed: dict[Place, int] = field(default_factory=dict)  # on which day
    herds: dict[str, list[Animal]] = field(default_factory=lambda: {"sheep": [], "wolves": []})
    counts: dict[str, int] = field(default_factory=dict)

    def settle(self, kind: str, count: int) -> None:
        """Put animals anywhere."""
        for _ in range(count):
            place = random.randrange(WIDTH), random.randrange(HEIGHT)
            self.herds[kind].append(Animal(place, random.randint(1, 2 * FOOD[kind])))

    def live_a_day(self, kind: str) -> None:
        """Every animal of a herd moves, eats if there is something, and may give birth; the starved and eaten go."""
        sheep = {each.place: each for each in self.herds["sheep"]}
        for each in list(self.herds[kind]):
            x, y = each.place
            each.place = (x + random.randint(-1, 1)) % WIDTH, (y + random.randint(-1, 1)) % HEIGHT
            each.energy -= 1
            if kind == "sheep" and self.day - self.grazed.get(each.place, -REGROWS) >= REGROWS:
                self.grazed[each.place] = self.day
                each.energy += FOOD[kind]
            elif kind == "wolves" and each.place in sheep:
                sheep.pop(each.place).energy = 0
                each.energy += FOOD[kind]
            if random.random() < BIRTHS:
                each.energy //= 2
                self.herds[kind].append(Animal(each.place, each.energy))
        self.herds = {name: [each for each in herd if each.energy > 0] for name, herd in self.herds.items()}
        self.counts.update({name: len(herd) for name, herd in self.herds.items()})


def first_island() -> Island:
    """Seed here, not in torch(): this runs once, and a reload goes on with the random numbers where they were."""
    random.seed(0)
    island = Island()
    island.settle("sheep", 150)
    island.settle("wolves", 50)
    return island


def island() -> Island:
    return spark.persist("island", first_island)


def picture() -> list[str]:
    """Return the island: w a wolf, s a sheep, a dot where there is grass."""
    look = {place: " " for place, day in island().grazed.items() if island().day - day < REGROWS}
    look |= {each.place: name[0] for name, herd in island().herds.items() for each in herd}
    return ["".join(look.get((x, y), ".") for x in range(WIDTH)) for y in range(HEIGHT)]


def release(kind: str = "sheep", count: int = 10) -> dict[str, int]:
    """Put animals ashore; return how many there were of each kind before."""
    before = dict(island().counts)
    island().settle(kind, count)
    return before


async def wait_for(day: int) -> dict[str, int]:
    """Return how many animals there are on a later day."""
    while island().day < day:
        await spark.checkpoint()
        await asyncio.sleep(0.01)
    return dict(island().counts)


async def sun(last: int) -> None:
    """A day begins when everybody has had time to live the last one."""
    while island().day < last:
        await spark.checkpoint()
        await asyncio.sleep(1 / spark.control("days_per_second", 50.0, min=1.0, max=1000.0))
        island().day += 1
        spark.log(**island().counts)
        if island().day % 50 == 0:
            print(f"day {island().day:5}   " + "   ".join(f"{n:4} {name}" for name, n in island().counts.items()))


async def herd(kind: str, last: int) -> None:
    """Live every day once."""
    lived = island().day
    while lived < last:
        await spark.checkpoint()
        await asyncio.sleep(0.0005)
        if lived < island().day:
            lived += 1
            island().live_a_day(kind)


async def torch() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=sys.maxsize, help="days")
    last = parser.parse_args().steps
    spark.expose(animals=island().counts, picture=picture, release=release, wait_for=wait_for)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(sun(last))
        for kind in FOOD:
            tasks.create_task(herd(kind, last))


if __name__ == "__main__":
    asyncio.run(torch())
