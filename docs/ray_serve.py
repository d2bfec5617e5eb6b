"""ptkit behind Ray Serve: a base and its adapters in each of two replicas.

    pip install -e '.[serve]' 'ray[serve]'
    cd docs && PTKIT_ADAPTERS=../adapters serve run ray_serve:deployment

Requests go to any replica, so adapters are not loaded or unloaded by request here (`read_only`):
every replica takes over changed files of a known adapter by itself, within a second.
"""

import os
from pathlib import Path

from fastapi import FastAPI
from ray import serve

from ptkit.serve.build import build_app


def app() -> FastAPI:
    """Called in each replica."""
    return build_app(
        os.environ.get("PTKIT_MODEL", "tiny-en"),
        Path(os.environ.get("PTKIT_ADAPTERS", "adapters")),
        read_only=True,
    )


@serve.deployment(
    num_replicas=2,
    # "num_gpus": 1 for one GPU each
    ray_actor_options={"num_cpus": 1},
    # Beyond these, a replica's own queue is full and answers 429.
    max_ongoing_requests=256,
)
@serve.ingress(app)
class Ptkit:
    """One base, its adapters, and one running batch."""


deployment = Ptkit.bind()
