"""What a group has sent and how long it was waited for."""

from dataclasses import dataclass, field


@dataclass
class Counters:
    """Of one group on one rank, since it was made or `reset`.

    Bytes are those of messages that the group's own algorithms sent from this rank; what MPI's own algorithms
    send cannot be seen, so `payload_bytes` counts the arrays given to operations, by kind, for all of them.
    """

    bytes_sent: dict[str, int] = field(default_factory=dict)
    payload_bytes: dict[str, int] = field(default_factory=dict)
    operations: dict[str, int] = field(default_factory=dict)
    waited_seconds: float = 0.0
    """Time in which the caller stood still for this group's operations."""
    open_seconds: float = 0.0
    """Time from the start of operations to their end; operations that overlap count each."""

    @property
    def hidden_seconds(self) -> float:
        """Of the time that operations took, that in which the caller did something else."""
        return max(0.0, self.open_seconds - self.waited_seconds)

    def sent(self, kind: str, size: int) -> None:
        """Count `size` bytes of an operation's messages."""
        self.bytes_sent[kind] = self.bytes_sent.get(kind, 0) + size

    def started(self, kind: str, size: int) -> None:
        """Count an operation on an array of `size` bytes."""
        self.operations[kind] = self.operations.get(kind, 0) + 1
        self.payload_bytes[kind] = self.payload_bytes.get(kind, 0) + size

    def reset(self) -> None:
        """Begin at zero again, for instance for the next step."""
        self.bytes_sent.clear()
        self.payload_bytes.clear()
        self.operations.clear()
        self.waited_seconds = self.open_seconds = 0.0
