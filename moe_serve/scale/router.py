"""Ray Serve's request router: a prompt goes to the replica that has its prefix, bounded by load."""

from __future__ import annotations

from typing import Any

from ray.serve.request_router import FIFOMixin, PendingRequest, ReplicaID, RequestRouter, RunningReplica

from moe_serve.scale.affinity import Affinity
from moe_serve.scale.exchange import Request


class PrefixRouter(FIFOMixin, RequestRouter):  # type: ignore[misc]
    """Ranks replicas by `Affinity`. Ray tells queue lengths and takes the next replica where one is full or gone."""

    def initialize_state(self, max_extra_load: int = 8, **kwargs: Any) -> None:
        """`max_extra_load`: as in `Affinity`; from --prefix-max-extra-load."""
        self._affinity: Affinity[ReplicaID] = Affinity(max_extra_load)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """One replica a rank, the best first."""
        found = {replica.replica_id: replica for replica in candidate_replicas}
        if not found:
            return []
        loads = {name: self.replica_queue_len_cache.get(name) or 0 for name in found}
        return [[found[name]] for name in self._affinity.rank(_hashes(pending_request), loads)]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        """The replica has the prefix from now on."""
        self._affinity.note(_hashes(pending_request), replica_id)

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        super().on_replica_actor_died(replica_id)
        self._affinity.forget(replica_id)


def _hashes(pending: PendingRequest | None) -> tuple[bytes, ...]:
    request = pending.args[0] if pending is not None and pending.args else None
    return request.hashes if isinstance(request, Request) else ()
