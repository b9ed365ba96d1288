"""A process's place among the ranks, from the variables that deepspeed's launcher and torchrun set. Knows no torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from moe_serve.errors import ConfigError

FRONT = "MOE_SERVE_FRONT"
"""host:port of the front; without it ranks look at MASTER_ADDR, one port above MASTER_PORT."""
SECRET = "MOE_SERVE_RANK_SECRET"
"""Word that ranks must say to the front."""
STORE = "MOE_SERVE_RANK_STORE"
"""File in which ranks that the front starts meet; see rendezvous.py."""
NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, slots=True)
class RankAddress:
    """One rank of a group. Example: rank 5 of 8, the second on its machine."""

    rank: int
    world_size: int
    local_rank: int
    master_addr: str
    master_port: int

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def variables(self) -> dict[str, str]:
        """As a launcher would set them."""
        values = (self.rank, self.world_size, self.local_rank, self.master_addr, self.master_port)
        return dict(zip(NAMES, map(str, values), strict=True))


def is_launched() -> bool:
    """Whether a launcher started this process as one rank of several."""
    return all(os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))


def read_place(environ: Mapping[str, str] = os.environ) -> RankAddress:
    """ConfigError names the variable that is missing or is no number."""
    values: dict[str, int] = {}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"):
        text = environ.get(name, "0" if name == "LOCAL_RANK" else "")
        if not text.isdigit():
            raise ConfigError(f"{name}={text!r} in the environment is no number; start the ranks with a launcher")
        values[name] = int(text)
    if values["RANK"] >= values["WORLD_SIZE"]:
        raise ConfigError(f"RANK={values['RANK']} in the environment is not below WORLD_SIZE={values['WORLD_SIZE']}")
    address = environ.get("MASTER_ADDR", "")
    if not address:
        raise ConfigError("MASTER_ADDR is not set; start the ranks with a launcher")
    return RankAddress(values["RANK"], values["WORLD_SIZE"], values["LOCAL_RANK"], address, values["MASTER_PORT"])


def front_address(place: RankAddress, environ: Mapping[str, str] = os.environ) -> tuple[str, int]:
    """Where a rank finds the front."""
    text = environ.get(FRONT)
    if text is None:
        return place.master_addr, place.master_port + 1
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError(f"{FRONT}={text!r} is not host:port")
    return host, int(port)
