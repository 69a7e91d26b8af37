"""The plan of a study: everything that its numbers depend on, and its digest.

Every line of a results file carries the digest, so that lines of two plans are never mixed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass

from ..checks import check_choice
from .hypotheses import contestants
from .methods import BASELINE, HEADLINE, LORA_RANK, METHODS, PULL, RANK, method

# raised where a change of the code changes what a line means
VERSION = 1
# the end of the name of a pair whose images are for choosing a design
SEARCH = "-search"


@dataclass(frozen=True)
class Plan:
    """
    ks: training-set sizes, the headline's first. seeds: of subsets, noise and starts.
    checkpoints: steps at which a run is measured; the last is its length.
    bins, draws: ranges of noise levels; questions per range, about `draws` of the training set,
    `heldout_draws` per held-out image, `fold_draws` per image left out of a fold.
    samples, sample_steps: per checkpoint. folds, patience: of the choice of a step inside k.
    tuning_k, tuning_seeds: of the trials of learning rates, whose images are apart.
    contender: the method that the report's hypotheses are about; "": the four of the headline.
    compared: methods that the report sets against each other one, seed by seed; it judges nothing.
    """

    pair: str = "digits"
    ks: tuple[int, ...] = (20, 10, 50)
    seeds: tuple[int, ...] = tuple(range(10))
    methods: tuple[str, ...] = HEADLINE
    checkpoints: tuple[int, ...] = (25, 50, 75, 100, 150, 200, 300, 400)
    batch: int = 16
    warmup: int = 20
    bins: int = 5
    draws: int = 60
    heldout_draws: int = 1
    fold_draws: int = 4
    evaluation_batch: int = 100
    samples: int = 200
    sample_steps: int = 12
    guidance: float = 1.0
    folds: int = 3
    patience: int = 2
    tuning_k: int = 20
    tuning_seeds: tuple[int, ...] = (1000, 1001)
    contender: str = ""
    compared: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in self.methods:
            method(name)
        for name in self.compared:
            check_choice("compare", name, self.trained())
        if self.compared and (self.contender or self.search):
            raise ValueError(
                f"compare: expected none beside a contender or a search, got "
                f"{' '.join(self.compared)}"
            )
        if self.contender:
            check_choice("contender", self.contender, self.trained())
            if self.search:
                raise ValueError("contender: a search chooses one, and judges none")
            missing = [n for n in contestants(self.contender) if n not in self.methods]
            if missing:
                raise ValueError(
                    f"methods: expected those that {self.contender} is judged against too, got no "
                    f"{', '.join(missing)}"
                )
        if set(self.seeds) & set(self.tuning_seeds):
            raise ValueError("tuning_seeds: expected seeds that no run has, got some of them")
        if list(self.checkpoints) != sorted(set(self.checkpoints)) or self.checkpoints[0] < 1:
            raise ValueError(f"checkpoints: expected rising steps, got {self.checkpoints}")
        lists = {
            "k": self.ks, "seeds": self.seeds, "methods": self.methods, "compare": self.compared
        }  # fmt: skip
        for name, found in lists.items():
            if len(set(found)) < len(found):
                raise ValueError(f"{name}: expected each once, got {' '.join(map(str, found))}")
        # the folds are of the k images, and need one each
        if min(self.ks) < self.folds:
            raise ValueError(f"k: expected at least the {self.folds} folds, got {min(self.ks)}")
        for name, value in (("folds", self.folds), ("samples", self.samples)):
            if value < 2:
                raise ValueError(f"{name}: expected at least 2, got {value}")
        if not math.isfinite(self.guidance):
            raise ValueError(f"guidance: expected a finite number, got {self.guidance}")

    def digest(self) -> str:
        """Of all that a line means, and not of which lines there are."""
        facts = dataclasses.asdict(self)
        for name in ("ks", "seeds", "methods", "contender", "compared"):
            del facts[name]
        facts |= {"version": VERSION, "rank": RANK, "lora_rank": LORA_RANK, "pull": PULL}
        text = json.dumps(facts, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @property
    def search(self) -> bool:
        """Whether it looks for a design, and judges no hypothesis."""
        return self.pair.endswith(SEARCH)

    @property
    def judges(self) -> bool:
        """Whether hypotheses are judged."""
        return not (self.search or self.compared)

    def runs(self) -> Iterator[tuple[str, int, int]]:
        """(method, k, seed), in an order in which any beginning is of use: all methods of a seed
        side by side, the first k first."""
        for k in self.ks:
            for seed in self.seeds:
                for name in self.methods:
                    yield name, k, seed

    def trials(self) -> Iterator[tuple[str, float, int]]:
        """(method, learning rate, seed)."""
        for seed in self.tuning_seeds:
            for name in self.methods:
                for rate in METHODS[name].trials:
                    yield name, rate, seed

    def trained(self) -> tuple[str, ...]:
        return tuple(name for name in self.methods if name != BASELINE)
