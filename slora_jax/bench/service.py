"""What a service is measured by, from each request's times: the paper's metrics (section 7.1)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass
class Times:
    """Of one request, in seconds since the start of the run: arrival, first and last token.

    A request that was given up has a ``last`` and ``gave_up``.
    """

    arrival: float
    first: float | None = None
    last: float | None = None
    gave_up: bool = False


@dataclass(frozen=True)
class Service:
    """Metrics of one run.

    Attributes:
      throughput: requests answered a second, from the first arrival to the last answer: draining is included.
      mean_latency, mean_first_token: seconds from arrival to last and first token, of those answered; None if none.
      attainment: share of all requests whose first token came within the objective. One given up did not.
      satisfaction: mean over all of ``1 - (first token / objective)²``, 0 beyond the objective.
      num_requests, num_given_up: counts.
    """

    throughput: float
    mean_latency: float | None
    mean_first_token: float | None
    attainment: float
    satisfaction: float
    num_requests: int
    num_given_up: int

    @classmethod
    def of(cls, times: Sequence[Times], slo_s: float) -> "Service":
        answered = [t for t in times if not t.gave_up]
        # To the objective; late ones and those given up have used all of it.
        used = np.array([1.0 if t.gave_up else min(1.0, (t.first - t.arrival) / slo_s) for t in times])
        end = max(t.last for t in times)
        return cls(
            throughput=len(answered) / (end - min(t.arrival for t in times)),
            mean_latency=float(np.mean([t.last - t.arrival for t in answered])) if answered else None,
            mean_first_token=float(np.mean([t.first - t.arrival for t in answered])) if answered else None,
            attainment=float(np.mean(used < 1.0)),
            satisfaction=float(np.mean(1 - used**2)),
            num_requests=len(times),
            num_given_up=len(times) - len(answered),
        )
