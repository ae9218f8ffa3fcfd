"""How the processes of a run exchange texts, so that all of them do the same."""

import jax
import numpy as np

LENGTH = 600
"""Bytes of a text that are told."""


def said_by_all(text: str) -> list[str]:
    """The texts of all processes in their order; every one must call it. The ends of long ones are cut off."""
    if jax.process_count() == 1:
        return [text]
    from jax.experimental import multihost_utils

    told = np.frombuffer(text.encode()[:LENGTH].ljust(LENGTH, b"\0"), np.uint8)
    return [
        bytes(row).rstrip(b"\0").decode(errors="ignore") for row in np.asarray(multihost_utils.process_allgather(told))
    ]


def first_said(text: str) -> str:
    """The first text of any process that is not empty; every one must call it."""
    return next(filter(None, said_by_all(text)), "")
