"""Grows almost-instantaneous variable-to-fixed dictionaries (AIVF) for a memoryless ternary source.

After Yamamoto and Yokoo, "Average-sense optimality and competitive optimality for almost instantaneous VF
codes", IEEE Trans. Inf. Theory 47 (2001), with the restrictions of spec 3.2: at most 126 trits and three
non-zeros to a phrase, and one threshold that separates the codewords of both trees.

Two trees are grown together. A step adds one codeword: either a leaf becomes incomplete and gets a child for
0, or an incomplete node becomes complete. The value of a step is the gain in trits per codeword, where being
sent on to T1 rather than T0 is worth `v` trits; `v` is found as a fixed point. Growing uses additions and
multiplications of doubles in a fixed order only, so a dictionary is the same on every machine.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

from .errors import ArgumentError
from .layout import MAXIMUM_NONZEROS, MAXIMUM_PHRASE

LEAF, INCOMPLETE, COMPLETE = 0, 1, 2


class ParseTree:
    """One parse tree that grows greedily.

    Parameters
    ----------
    p_zero : float
        Probability of a zero.
    second : bool
        Whether this is T1, whose first trit is never zero.
    value : float
        What being sent on to T1 rather than T0 is worth, in trits; negative as a rule.
    """

    def __init__(self, p_zero: float, second: bool, value: float) -> None:
        self.p_zero = p_zero
        self._child = (p_zero, (1 - p_zero) / 2, (1 - p_zero) / 2)
        self._gain_incomplete = p_zero + (1 - p_zero) * value
        self._gain_complete = (1 - p_zero) * (1 - value)
        # The root is node 0 and complete; T1's root lacks the child for 0.
        self.kind = [COMPLETE]
        self.probability = [1.0]
        self.length = [0]
        self.nonzeros = [0]
        self.children = [[-1, -1, -1]]
        self.leaves = 0
        self.codewords = 0
        self._heap: list[tuple[float, int]] = []
        first = (0.0, 0.5, 0.5) if second else self._child
        for trit in range(int(second), 3):
            self._add(0, trit, first[trit])
        self.leaves = self.codewords = 3 - int(second)

    def _add(self, parent: int, trit: int, probability: float) -> None:
        node = len(self.kind)
        self.kind.append(LEAF)
        self.probability.append(probability)
        self.length.append(self.length[parent] + 1)
        self.nonzeros.append(self.nonzeros[parent] + (trit != 0))
        self.children.append([-1, -1, -1])
        self.children[parent][trit] = node
        if self.length[node] < MAXIMUM_PHRASE:
            heapq.heappush(self._heap, (-probability * self._gain_incomplete, node))

    def grow(self, codewords: int, leaves: int | None = None) -> bool:
        """Add codewords until there are `codewords`, with exactly `leaves` leaves if given.

        Returns
        -------
        bool
            Whether the tree came out as asked; limits on phrases can prevent it.
        """
        heap, kind = self._heap, self.kind
        while self.codewords < codewords and heap:
            missing = None if leaves is None else (leaves - self.leaves) // 2
            if missing is not None and missing == codewords - self.codewords:
                return self._complete_only(missing)
            _, node = heapq.heappop(heap)
            probability = self.probability[node]
            if kind[node] == LEAF:
                kind[node] = INCOMPLETE
                self._add(node, 0, probability * self._child[0])
                if self.nonzeros[node] < MAXIMUM_NONZEROS:
                    heapq.heappush(heap, (-probability * self._gain_complete, node))
            elif missing == 0:
                continue
            else:
                self._complete(node)
            self.codewords += 1
        return self.codewords == codewords and leaves in (None, self.leaves)

    def _complete(self, node: int) -> None:
        self.kind[node] = COMPLETE
        for trit in (1, 2):
            self._add(node, trit, self.probability[node] * self._child[trit])
        self.leaves += 2

    def _complete_only(self, steps: int) -> bool:
        """Spend the last steps on completing nodes, the likeliest first."""
        candidates = [
            (-self.probability[node], node)
            for node, kind in enumerate(self.kind)
            if kind == INCOMPLETE and self.nonzeros[node] < MAXIMUM_NONZEROS
        ]
        for _, node in heapq.nsmallest(steps, candidates):
            self._complete(node)
            self.codewords += 1
        return len(candidates) >= steps

    def expectation(self) -> tuple[float, float]:
        """Mean phrase length in trits, and probability that the next phrase comes from T1."""
        length = onward = 0.0
        for node in range(1, len(self.kind)):
            if self.kind[node] == LEAF:
                length += self.probability[node] * self.length[node]
            elif self.kind[node] == INCOMPLETE:
                sent = self.probability[node] * (1 - self.p_zero)
                length += sent * self.length[node]
                onward += sent
        return length, onward

    def preorder(self) -> list[int]:
        """Node codes in preorder without the root (spec 3.2)."""
        codes: list[int] = []
        stack = [child for child in reversed(self.children[0]) if child > 0]
        while stack:
            node = stack.pop()
            codes.append(self.kind[node])
            stack.extend(child for child in reversed(self.children[node]) if child > 0)
        return codes


@dataclass(frozen=True)
class GrownTrees:
    """Both trees, and the threshold that they share."""

    trees: tuple[ParseTree, ParseTree]
    threshold: int

    @property
    def trits_per_codeword(self) -> float:
        """Mean trits per codeword on the source that the trees were grown for."""
        (length0, onward0), (length1, onward1) = (tree.expectation() for tree in self.trees)
        second = onward0 / (1 + onward0 - onward1)
        return (1 - second) * length0 + second * length1


def grow_trees(p_zero: float, bits: int) -> GrownTrees:
    """Grow the pair of trees with 2**bits codewords that sends the most trits per codeword.

    T0 has an odd number of leaves and T1 an even one, so the counts can differ by one at best: the threshold
    is the larger, and the tree with fewer leaves leaves one codeword unused.
    """
    codewords = 1 << bits
    value, fewer, more = -0.5, 0, 0
    for _ in range(30):
        trees = [ParseTree(p_zero, second, value) for second in (False, True)]
        for tree in trees:
            tree.grow(codewords)
        fewer, more = sorted(tree.leaves for tree in trees)
        (length0, onward0), (length1, onward1) = (tree.expectation() for tree in trees)
        previous, value = value, length1 - length0 + (onward1 - onward0) * value
        if abs(value - previous) < 1e-3:
            break
    # Between the two costs least; limits on phrases can prevent it.
    for threshold in ((fewer + more) // 2, fewer):
        grown = _balance(p_zero, codewords, value, threshold)
        if grown is not None:
            return grown
    raise ArgumentError("no pair of trees", field="p_zero", value=p_zero, expected="a density that occurs")


def _balance(p_zero: float, codewords: int, value: float, threshold: int) -> GrownTrees | None:
    """Grow both trees with (nearly) `threshold` leaves each, or None where limits prevent it.

    Simply taking the best steps of each kind until their number is used up costs nothing against shifting the
    balance between the kinds from the start (measured: the same rate to five digits).
    """
    trees = []
    for second in (False, True):
        leaves = threshold if (threshold % 2 == 0) == second else threshold - 1
        unused = threshold - leaves
        tree = ParseTree(p_zero, second, value)
        if not tree.grow(codewords - unused, leaves):
            return None
        trees.append(tree)
    return GrownTrees((trees[0], trees[1]), threshold)
