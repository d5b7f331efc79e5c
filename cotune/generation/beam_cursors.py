"""The places of all beams of one search in a backbone's cache: who splits, who dies, whose memory comes back."""

from __future__ import annotations

from collections.abc import Sequence

from cotune.generation.protocols import Cursor


class BeamCursors:
    """The places in a backbone's cache of all running beams.

    Args:
        root: the cursor that the prompt is read with.

    Attributes:
        num_branchings: the step whose beams the cursors are of, for whoever branches from another thread.
    """

    def __init__(self, root: Cursor) -> None:
        self.cursors: list[Cursor] = [root]
        self.num_branchings = 0

    def branch(self, parents: Sequence[int]) -> None:
        """One cursor for each new beam, from that of its parent; those without children give their blocks back."""
        assert parents and min(parents) >= 0 and max(parents) < len(self.cursors)
        heirs: set[int] = set()
        children: list[Cursor] = []
        for parent in parents:
            # The first child goes on with its parent's own cursor.
            children.append(self.cursors[parent].fork() if parent in heirs else self.cursors[parent])
            heirs.add(parent)
        for i, cursor in enumerate(self.cursors):
            if i not in heirs:
                cursor.close()
        self.cursors[:] = children

    def shrink_to_root(self) -> None:
        """Keep one cursor only, as before the first branching."""
        for cursor in self.cursors[1:]:
            cursor.close()
        del self.cursors[1:]
        self.num_branchings = 0

    def close(self) -> None:
        """Give all blocks back."""
        for cursor in self.cursors:
            cursor.close()
