"""What nobody can ask for any more, until the vaults and the durable stores are told to free it."""

from dataclasses import dataclass, field


@dataclass(eq=False)
class Garbage:
    """See the module."""

    drops: list[tuple[str, str]] = field(default_factory=list)
    store_drops: list[tuple[str, str]] = field(default_factory=list)

    def take_drops(self) -> list[tuple[str, str]]:
        """(vault, token) of payloads that nobody can ask for any more; each is told once."""
        drops, self.drops = self.drops, []
        return [(vault, token) for vault, token in drops if vault]  # what no vault holds needs no telling

    def take_store_drops(self) -> list[tuple[str, str]]:
        """(job id, name) of what may be freed in durable stores; each is told once."""
        drops, self.store_drops = self.store_drops, []
        return drops
