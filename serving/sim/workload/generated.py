"""Workloads drawn from distributions."""

from serving.sim.workload.arrivals import Arrivals
from serving.sim.workload.draws import MOST_REQUESTS, stream, whole
from serving.sim.workload.lengths import Lengths
from serving.sim.workload.requests import Workload
from serving.sim.workload.table import RequestTable


def generated(
    name: str, prompts: Lengths, outputs: Lengths, arrivals: Arrivals, count: int, seed: int
) -> Workload:
    """`count` requests. Prompts, outputs and times are independent of each other.

    With the same seed, changing one of the three leaves the others as they were. Raises
    ConfigurationError if count or seed is out of range.
    """
    whole("count", count, most=MOST_REQUESTS)
    times = arrivals.draw(count, stream(seed, "arrivals"))
    table = RequestTable.plain(
        times[:-1],
        prompts.draw(count, stream(seed, "prompt lengths")),
        outputs.draw(count, stream(seed, "output lengths")),
    )
    return Workload(name, times.item(-1), table)
