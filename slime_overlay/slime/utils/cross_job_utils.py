"""The names of cross-job communication in one place, beside slime's other utilities.

    from slime.utils.cross_job_utils import setup_cross_job_communication

    broker = setup_cross_job_communication(namespace="slime_shared")
    broker.store_rollout_data("exp1", 0, ray.put(data))      # in the rollout job
    data = ray.get(broker.get_rollout_data("exp1", 0))       # in the train job

Only names live here; everything they stand for is in `slime.cross_job`.
"""

from slime.cross_job import errors
from slime.cross_job.batch import Batch
from slime.cross_job.client.consumer import Consumer, Rollout
from slime.cross_job.client.producer import Producer, Published, returned
from slime.cross_job.proposal.communicators import FileSystemCommunicator, RayJobCommunicator
from slime.cross_job.proposal.data_broker import CrossJobDataBroker, DataProducer, setup_cross_job_communication
from slime.cross_job.settings import Settings, add_arguments

__all__ = [
    "Batch",
    "Consumer",
    "CrossJobDataBroker",
    "DataProducer",
    "FileSystemCommunicator",
    "Producer",
    "Published",
    "RayJobCommunicator",
    "Rollout",
    "Settings",
    "add_arguments",
    "errors",
    "returned",
    "setup_cross_job_communication",
]
