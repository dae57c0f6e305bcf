"""The paper's workloads: settings, arrivals, lengths and who asks. Drawn from seeds; needs no JAX."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from slora_jax.model.modules import MODULES

SETTINGS = {"base": (), "S1": (8,), "S2": (64, 32, 16, 8), "S4": (64, 32, 16), "S5": (32,), "S6": (64,)}
"""Ranks of the adapters of each of the paper's settings, in turn; q, k, v and o. S1 and S2 are for the 7B model, S4, S5
and S6 for those of 13B, 30B and 70B."""

ADAPTED = ("q", "k", "v", "o")
"""Modules that the paper's adapters change."""

WARM_UP_REQUESTS = 64
_SHORTEST = 8
_ANY_RANK = "rank"


@dataclass(frozen=True)
class Lengths:
    """Of requests: prompt and output are each drawn uniformly from a range ``(first, behind the last)`` of tokens."""

    prompt: tuple[int, int]
    output: tuple[int, int]

    @classmethod
    def below(cls, longest: int) -> "Lengths":
        """The paper's: both in [8, longest)."""
        return cls((_SHORTEST, longest), (_SHORTEST, longest))

    @classmethod
    def parse(cls, text: str) -> "Lengths":
        """``PROMPT:OUTPUT``, such as ``1600:600``: so many tokens each, of all requests.

        Raises:
          ValueError: it is not; the message says what is.
        """
        prompt, _, output = text.partition(":")
        if not (prompt.isdecimal() and output.isdecimal() and int(prompt) and int(output)):
            raise ValueError(f"lengths are the tokens of a prompt and of an answer, such as 1600:600; got {text!r}")
        return cls((int(prompt), int(prompt) + 1), (int(output), int(output) + 1))

    def __str__(self):
        (first, behind), (first_output, behind_output) = self.prompt, self.output
        if behind == first + 1 and behind_output == first_output + 1:
            return f"{first}:{first_output}"
        return f"[{first}, {behind}) and [{first_output}, {behind_output})"


PAPER_LENGTHS = Lengths.below(512)

CHAT_ADAPTERS = 26
_CHAT_SIGMA = 1.0
_NORMAL = NormalDist()


@dataclass(frozen=True)
class WorkItem:
    """One request: its tokens, how many to generate, its adapter (None: the base), and when it comes, in seconds.

    ``priority`` and ``slo_ms`` are the request's own.
    """

    prompt: tuple[int, ...]
    num_output: int
    adapter: int | None
    arrival: float = 0.0
    priority: int = 0
    slo_ms: float | None = None


@dataclass(frozen=True)
class OpenTrace:
    """Arrivals with Gamma intervals of ``rate`` a second and coefficient of variation ``cv``.

    Adapter i is asked for in proportion to ``(i + 1) ** -alpha``: 0 is uniform.
    """

    rate: float
    cv: float
    alpha: float


@dataclass(frozen=True)
class Case:
    """So many adapters of a setting's ranks in turn: one of the paper's settings, or ``rankR``, all of rank R.

    ``modules`` are what they change.
    """

    setting: str
    num_adapters: int
    modules: tuple[str, ...] = ADAPTED

    @classmethod
    def parse(cls, text: str, modules: tuple[str, ...] = ADAPTED) -> "Case":
        """``base``, or ``SETTING:N`` such as ``S2:100`` or ``rank16:100``, with or without ``@MODULE,...``.

        Raises:
          ValueError: neither; the message says what is.
        """
        case, at, named = text.partition("@")
        modules = parsed_modules(named) if at else modules
        setting, _, number = case.partition(":")
        ranks = ranks_of(setting)
        known = ranks is not None and (number.isdecimal() if ranks else not number)
        if not known or (number and int(number) < 1):
            raise ValueError(
                "a case is base, or a setting or a rank, and how many adapters, such as S2:100 or rank16:100; "
                f"got {text!r}"
            )
        return cls(setting, int(number or 0), modules)

    @property
    def ranks(self) -> tuple[int, ...]:
        """Of its adapters, in turn."""
        ranks = ranks_of(self.setting)
        assert ranks is not None, "cases are of known settings"
        return ranks

    def __str__(self):
        if not self.num_adapters:
            return self.setting
        modules = "" if self.modules == ADAPTED else f"@{','.join(self.modules)}"
        return f"{self.setting}:{self.num_adapters}{modules}"

    @property
    def num_spare(self) -> int:
        """Adapters more for the warm-up, so that each of the others is copied to the device in the timed part."""
        return min(self.num_adapters, WARM_UP_REQUESTS)

    def adapter_name(self, index: int) -> str:
        return f"{self}-{index}".replace(",", "+")

    def rank(self, index: int) -> int:
        """Of an adapter."""
        return self.ranks[index % len(self.ranks)]


def parsed_modules(text: str) -> tuple[str, ...]:
    """Modules by name, such as ``q,k,v,o``.

    Raises:
      ValueError: one of them does not exist; the message says which do.
    """
    names = tuple(dict.fromkeys(text.split(",")))
    unknown = [name for name in names if name not in MODULES]
    if unknown:
        raise ValueError(f"no such modules: {', '.join(unknown)}; there are {', '.join(MODULES)}")
    return names


def ranks_of(setting: str) -> tuple[int, ...] | None:
    """The ranks of a setting's adapters, in turn; None: there is no such setting."""
    rank = setting.removeprefix(_ANY_RANK)
    if rank != setting and rank.isdecimal() and int(rank):
        return (int(rank),)
    return SETTINGS.get(setting)


def draw_workload(
    num_requests: int,
    num_adapters: int,
    vocab_size: int,
    seed: int,
    lengths: Lengths = PAPER_LENGTHS,
    trace: OpenTrace | None = None,
) -> list[WorkItem]:
    """Requests with random tokens; the order of the draws is part of the definition."""
    rng = np.random.default_rng(seed)
    prompts = rng.integers(*lengths.prompt, num_requests)
    outputs = rng.integers(*lengths.output, num_requests)
    if trace is None:
        adapters = rng.integers(0, max(1, num_adapters), num_requests)
        arrivals = np.zeros(num_requests)
    else:
        adapters = _popular_first(rng, num_requests, num_adapters, trace.alpha)
        arrivals = gamma_arrivals(num_requests, trace.rate, trace.cv, seed + 1)
    return _items(rng, prompts, outputs, adapters if num_adapters else None, arrivals, vocab_size)


def draw_chat_workload(
    num_requests: int, vocab_size: int, seed: int, rate: float, cv: float = 1.0, longest: int = 1024
) -> list[WorkItem]:
    """Like a chat service, as the paper describes its real trace: 26 adapters, some much more popular than others, and
    long-tailed lengths with means of 85 (prompt) and 165 (output) tokens, here log-normal and cut at ``longest``.

    The means are those after the cut; where it leaves too little room for that, half of ``longest``.
    """
    rng = np.random.default_rng(seed)
    prompts = _log_normal(rng, 85, num_requests, longest)
    outputs = _log_normal(rng, 165, num_requests, longest)
    adapters = _popular_first(rng, num_requests, CHAT_ADAPTERS, alpha=1.0)
    arrivals = gamma_arrivals(num_requests, rate, cv, seed + 1)
    return _items(rng, prompts, outputs, adapters, arrivals, vocab_size)


def gamma_arrivals(num_requests: int, rate: float, cv: float, seed: int) -> np.ndarray:
    """``[num_requests]`` seconds, increasing."""
    return np.cumsum(np.random.default_rng(seed).gamma(cv**-2, cv**2 / rate, num_requests))


def _popular_first(rng: np.random.Generator, num_requests: int, num_adapters: int, alpha: float) -> np.ndarray:
    weights = np.arange(1.0, max(1, num_adapters) + 1) ** -alpha
    return rng.choice(len(weights), num_requests, p=weights / weights.sum())


def _log_normal(rng: np.random.Generator, mean: float, count: int, longest: int) -> np.ndarray:
    lengths = rng.lognormal(_log_median(min(mean, longest / 2), longest), _CHAT_SIGMA, count)
    return np.clip(np.rint(lengths), 1, longest).astype(int)


def _log_median(mean: float, longest: int) -> float:
    """Logarithm of the median that log-normal lengths have whose mean, all above ``longest`` cut to that, is this."""
    low, high = 0.0, 2 * math.log(longest)
    for _ in range(60):
        middle = (low + high) / 2
        below = (math.log(longest) - middle) / _CHAT_SIGMA
        uncut = math.exp(middle + _CHAT_SIGMA**2 / 2) * _NORMAL.cdf(below - _CHAT_SIGMA)
        low, high = (middle, high) if uncut + longest * (1 - _NORMAL.cdf(below)) < mean else (low, middle)
    return low


def _items(rng, prompts, outputs, adapters, arrivals, vocab_size: int) -> list[WorkItem]:
    whose: Sequence[int | None] = [None] * len(prompts) if adapters is None else adapters.tolist()
    return [
        WorkItem(tuple(rng.integers(0, vocab_size, prompt).tolist()), int(output), adapter, float(arrival))
        for prompt, output, adapter, arrival in zip(prompts, outputs, whose, arrivals, strict=True)
    ]
