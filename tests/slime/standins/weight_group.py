"""An engine's end of the process groups over which `--update-weight-transport nccl` sends weights; gloo carries them.

Stands for what SGLang does at /init_weights_update_group, /update_weights_from_distributed and
/destroy_weights_update_group. As there, a group is made beside torch's default one, a name is taken until its group is
destroyed, and destroying what is not there is an error.

Not here: more than one rank an engine, load formats, flattened buckets, and the session (/begin_weight_update) that
SGLang asks for since a release after those of slime's pins.
"""

import torch


class WeightGroups:
    """The groups that this engine is in, by their names."""

    def __init__(self) -> None:
        self.groups: dict[str, torch.distributed.ProcessGroup] = {}

    def join(self, body: dict) -> dict:
        """Returns when all members have come."""
        from slime.utils.distributed_utils import init_process_group  # only where such a group is asked for

        name, address = body["group_name"], f"tcp://{body['master_address']}:{body['master_port']}"
        if name in self.groups:
            raise ValueError(f"the group {name} has already been created")
        self.groups[name] = init_process_group(
            body["backend"], address, world_size=body["world_size"], rank=body["rank_offset"], group_name=name
        )
        return {"success": True, "message": "Succeeded to initialize custom process group."}

    def leave(self, body: dict) -> dict:
        torch.distributed.destroy_process_group(self.groups.pop(body["group_name"]))
        return {"success": True, "message": "Succeeded to destroy custom process group."}

    def receive(self, body: dict) -> dict[str, torch.Tensor]:
        """The tensors that rank 0, a training rank, broadcasts."""
        group, received = self.groups[body["group_name"]], {}
        for name, dtype, shape in zip(body["names"], body["dtypes"], body["shapes"], strict=True):
            received[name] = torch.empty(shape, dtype=getattr(torch, dtype))
            torch.distributed.broadcast(received[name], 0, group=group)
        return received
