"""What a calibrated recipe is given: some experts' matrices, and what calibration knows of their inputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class MatrixGroup:
    """The same projection of a group of E experts of one layer: R rows, C columns.

    All errors are measured where they arrive: ``hessian`` and ``row_weight`` make
    ``sum_r row_weight[r] * e_r @ hessian @ e_r`` the mean squared error, per calibration token, that an error
    e [R, C] of the weights causes in the layer's output. So errors of different matrices can be added.

    Attributes
    ----------
    names : tuple of str
        The E tensors' names in the source.
    weight : Tensor
        float32 [E, R, C].
    hessian : Tensor
        float32 [E, C, C]: sum of g^2 x x^T over the tokens that were routed to the expert, divided by the
        number of calibration tokens; x is the projection's input and g the router's weight.
    prior : Tensor
        float32 [E, C, C] or, where all experts share it, [1, C, C]: mean of g^2 x x^T over a sample of all of
        the layer's tokens, whether they were routed to the expert or not. Stands in for tokens that an expert
        has not seen.
    tokens : Tensor
        int64 [E]: tokens in ``hessian``.
    calibration_tokens : int
        Tokens of the whole calibration run.
    row_weight : Tensor
        float32 [E, R]: how a squared error in an output of this projection arrives in the layer's output; one
        for the last projection of an expert. An expert that saw few tokens takes it from the prior's, too.
    drift, prior_drift : Tensor, optional
        float32 [E, C, C]: as ``hessian`` and ``prior``, but of (x' - x) x^T, where x' is what the projection
        would be given if the expert's other projections were not ternary. None where x' = x.
    """

    names: tuple[str, ...]
    weight: torch.Tensor
    hessian: torch.Tensor
    prior: torch.Tensor
    tokens: torch.Tensor
    calibration_tokens: int
    row_weight: torch.Tensor
    drift: torch.Tensor | None = None
    prior_drift: torch.Tensor | None = None

    def select(self, experts: list[int]) -> MatrixGroup:
        """The group of some of the experts, by their indices."""
        shared = len(self.prior) == 1 and len(self.weight) > 1
        return MatrixGroup(
            names=tuple(self.names[expert] for expert in experts),
            weight=self.weight[experts],
            hessian=self.hessian[experts],
            prior=self.prior if shared else self.prior[experts],
            tokens=self.tokens[experts],
            calibration_tokens=self.calibration_tokens,
            row_weight=self.row_weight[experts],
            drift=None if self.drift is None else self.drift[experts],
            prior_drift=None if self.prior_drift is None else self.prior_drift[experts],
        )
