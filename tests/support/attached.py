"""Clients that are attached, but for their heartbeat: without Ray, over what stands for the broker."""

import threading
from types import SimpleNamespace
from typing import Any

from slime.cross_job.client.consumer import Consumer
from slime.cross_job.settings import Settings


def attached(kind: type, name: str, connection: Any, settings: Settings) -> Any:
    made = kind.__new__(kind)
    info = SimpleNamespace(client_id=name, node_id="n")
    vars(made).update(job_id="exp", settings=settings, connection=connection, info=info, metrics=False)
    vars(made).update(_fault=None, _activity="", _spans=[], _tracing=False, _waits={}, _at_work=False, _durably=None)
    vars(made).update(_ended=threading.Event(), _beaten=threading.Event())
    if kind is Consumer:
        made._prepare(())
    return made
