"""Names of slime that moved: where each is at the pins, newest place first."""

import importlib
from typing import Any

PLACES = {  # literal: scripts/patchset reads it, too
    "init_tracking": ("slime.observability.logging_utils", "slime.utils.logging_utils"),  # main; v0.3.1
    "log": ("slime.observability.logging_utils", "slime.utils.logging_utils"),  # to wandb and TensorBoard
    "init_wandb_primary": ("slime.observability.wandb_utils", "slime.utils.wandb_utils"),  # called up to v0.1.0
    "Box": ("slime.utils.misc", "slime.utils.ray_utils"),  # v0.3.1 and main; 079dbcf, v0.1.0
}
ALSO = (  # used by text, by hasattr or by what stands in its place, so that scripts/patchset does not see it elsewhere
    *("RolloutDataSource.sample_offset", "RolloutDataSource.sample_index", "RolloutDataSource.sample_group_index"),
    *("RolloutDataSourceWithBuffer|RolloutController|Buffer.buffer", "Dataset.shuffle"),
    *("UpdateWeightFromDisk.weight_version", "UpdateWeightFromDisk.rollout_engines"),
    *("UpdateWeightFromDistributed.rollout_engines", "RolloutServer.all_engines", "Lock.release", "Box.inner"),
    *("slime.ray.ray_actor.get_free_port", "slime.ray.ray_actor.is_port_available"),
    *("slime.utils.misc.get_free_port", "slime.utils.http_utils.is_port_available"),
    "slime.utils.data.process_rollout_data|slime.backends.utils.data.process_rollout_data",
    *("text slime-pp_", "text update_weights_from_disk", "text update_weights_from_distributed"),
    *("column partition", "column dp_size"),
)


def of_slime(name: str) -> Any:
    """What slime calls so at this pin.

    Raises:
        ImportError: this slime has it in none of its places; or importing one of them failed, as slime's own import
            would.
    """
    for module in PLACES[name]:
        try:
            found = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{module}.".startswith(f"{error.name}."):
                raise  # the place is there, and what it imports is not
            continue
        if hasattr(found, name):
            return getattr(found, name)
    raise ImportError(f"this slime has no {name} in {' or '.join(PLACES[name])}: is it one of the pins?")
