"""What a calibrated run can be told, apart from the recipe. Light: nothing here needs torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace

from qmoe_codec.errors import ArgumentError

from .text import TextOptions

BATCH_TOKENS = 4096
COMPUTE_DTYPES = ("float32", "bfloat16")
DEVICES = ("cpu", "cuda")


@dataclass(frozen=True)
class StreamOptions:
    """How the model is run.

    Attributes
    ----------
    device : {"cpu", "cuda"}
    dtype : {"float32", "bfloat16"}
        What the dense layers compute in, and hidden states are kept in. Sums are always float32.
    batch : int, optional
        Windows that go through a layer at once; by default as many as make 4096 tokens.
    """

    device: str = "cpu"
    dtype: str = "float32"
    batch: int | None = None

    def __post_init__(self) -> None:
        for name, choices in (("device", DEVICES), ("dtype", COMPUTE_DTYPES)):
            value = getattr(self, name)
            if value not in choices:
                raise ArgumentError("unknown", field=name, value=value, expected=" or ".join(choices))
        if self.batch is not None and self.batch < 1:
            raise ArgumentError("illegal", field="batch", value=self.batch, expected="at least 1")

    def batch_windows(self, length: int) -> int:
        """Windows of `length` tokens in a batch."""
        return self.batch or max(1, BATCH_TOKENS // length)


@dataclass(frozen=True)
class HessianOptions:
    """How Hessians are gathered.

    Attributes
    ----------
    experts_per_batch : int
        Experts that are in memory at once.
    max_tokens_per_expert : int, optional
        An expert that more tokens reach is calibrated on so many of them, drawn at random, and the sum is
        scaled up. All of them still go through the ternary expert to the next layer.
    gate_weighting : bool
        Whether a token counts with its squared router weight, as its error does in the output.
    seed : int
    """

    experts_per_batch: int = 16
    max_tokens_per_expert: int | None = None
    gate_weighting: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("experts_per_batch", "max_tokens_per_expert"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ArgumentError("illegal", field=name, value=value, expected="at least 1")


@dataclass(frozen=True)
class CalibrationOptions:
    """What is known of the experts' inputs, and how.

    Attributes
    ----------
    text : TextOptions, optional
        Text that is run through the model, and through the ternary experts as they come to be.
    store : str, optional
        Instead: a file of :class:`qmoe_quantize.store.Store`.
    stream : StreamOptions
    hessian : HessianOptions
    """

    text: TextOptions | None = None
    store: str | None = None
    stream: StreamOptions = field(default_factory=StreamOptions)
    hessian: HessianOptions = field(default_factory=HessianOptions)

    def weighted(self, gate_weighting: bool) -> CalibrationOptions:
        """The same with Hessians as a recipe wants them."""
        return replace(self, hessian=replace(self.hessian, gate_weighting=gate_weighting))

    def to_json(self) -> dict[str, object]:
        """All that decides what comes out, but for the text itself."""
        values = {**asdict(self.hessian), **asdict(self.stream)}
        return {**values, "calibration": "store" if self.store else "text"}
