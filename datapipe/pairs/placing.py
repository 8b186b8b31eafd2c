"""The search's steps on Ray, which is started for the first one that has anything to do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import ray
from ray.exceptions import RayError
from rich.progress import track

from datapipe import cluster
from datapipe.progress import say
from datapipe.run import in_one_line

Row = dict[str, Any]


class Placing:
    """address: of a Ray cluster; default: Ray starts in this process. workers: how many at a time; default: one for
    each GPU or, without any, for each CPU core."""

    def __init__(self, address: str | None, workers: int | None, resources: ExitStack) -> None:
        self._address, self._workers, self._resources = address, workers, resources
        self._connected = False

    def map(
        self,
        what: str,
        worker: type,
        rows: Sequence[Row],
        *,
        needs_gpu: bool = False,
        whole_nodes: bool = False,
        **arguments: Any,
    ) -> None:
        """Gives each row to one of the workers, which are made with these arguments, and says how far it is; a single
        one that needs no GPU to a worker in this process. Raises SddError.

        needs_gpu: a worker has a GPU to itself where there are any; whole_nodes: it has all cores of a node.
        """
        if not rows:
            return
        say(f"{what}: {len(rows):,} to do")
        if len(rows) == 1 and not needs_gpu:
            worker(**arguments)(rows[0])  # not worth a process
            return
        if not self._connected:
            self._resources.enter_context(cluster.connected(self._address))
            self._connected = True
        nodes = cluster.nodes()
        gpus = sum(g for _, g in nodes) if needs_gpu else 0
        cpus = max(c for c, _ in nodes) if whole_nodes else 1.0
        most = gpus or sum(c // cpus for c, _ in nodes)
        dataset = ray.data.from_items(list(rows), override_num_blocks=len(rows)).map(
            worker,
            fn_constructor_kwargs=arguments,
            compute=cluster.pool_of(max(1, min(self._workers or int(most), len(rows)))),
            num_cpus=cpus,
            num_gpus=1 if gpus else 0,
        )
        try:
            for _ in track(dataset.iter_rows(), what, len(rows), transient=True):
                pass
        except RayError as error:
            raise in_one_line(error) from None


@contextmanager
def ray_when_needed(address: str | None, workers: int | None) -> Iterator[Placing]:
    with ExitStack() as resources:
        yield Placing(address, workers, resources)
