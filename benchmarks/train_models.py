"""Train the models that benchmarks/quantizer.py measures on: offline, on Python's standard library.

    python benchmarks/train_models.py wide OUT      OLMoE with rows of 512 weights, half an hour on one core
    python benchmarks/train_models.py switch OUT    a Switch Transformer, 15 minutes on one core

Both read bytes. The Switch model sees 128 of them in its encoder, and its decoder goes on with 128. All is
computed in float32 (autocast to bfloat16 is no faster for products as small as these on a CPU) and saved in
bfloat16 at the end. With --seconds the training is done in pieces: how far it has come lies in OUT.state, and
the same command goes on from there; it exits with 75 while there is more to do.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import torch
from demo_model import WINDOW, Settings, olmoe, optimize, split, standard_library_text
from transformers import PreTrainedModel, SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

WIDE = Settings(layers=2, experts=8, hidden=512, width=512, heads=8, steps=1600, learning_rate=1.5e-3)
SWITCH = Settings(
    layers=2, experts=8, hidden=256, width=512, heads=4, steps=1500, warmup=100, learning_rate=1.5e-3
)


def switch(settings: Settings) -> SwitchTransformersForConditionalGeneration:
    """An untrained encoder-decoder on bytes; every second layer is sparse, each token goes to one expert."""
    torch.manual_seed(settings.seed)
    sparse = settings.layers // 2
    model = SwitchTransformersForConditionalGeneration(
        SwitchTransformersConfig(
            vocab_size=256,
            d_model=settings.hidden,
            d_kv=settings.hidden // settings.heads,
            d_ff=settings.width,
            num_heads=settings.heads,
            num_layers=settings.layers,
            num_decoder_layers=settings.layers,
            num_sparse_encoder_layers=sparse,
            num_sparse_decoder_layers=sparse,
            num_experts=settings.experts,
            expert_capacity=64,
            dropout_rate=0.0,
            router_jitter_noise=0.01,
            router_aux_loss_coef=0.01,
            tie_word_embeddings=False,
            pad_token_id=0,  # a byte that text does not have
            decoder_start_token_id=0,
            eos_token_id=None,
        )
    )
    # T5 starts embeddings and head at a deviation of 1, for an optimizer whose steps grow with the weights:
    # AdamW's would hardly move them (after 400 steps 3.7 bits per byte).
    with torch.no_grad():
        model.shared.weight.mul_(0.05)
        model.lm_head.weight.mul_(0.05)
        # Likewise the biases of positions, which would take thousands of steps to tell near from far:
        # they start with a preference for near ones, of another strength in each head.
        slopes = torch.linspace(0, 1, settings.heads)
        for name, bias in model.named_parameters():
            if "relative_attention_bias" in name:
                one_way = len(bias) if "decoder" in name else len(bias) // 2  # buckets by rising distance
                bias.copy_(-(torch.arange(len(bias)) % one_way)[:, None] * slopes)
    return model


def continuation(tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """What a Switch model is given: the first half to read, the second to continue with."""
    return {
        "input_ids": tokens[:, :WINDOW],
        "labels": tokens[:, WINDOW:].contiguous(),
        "output_router_logits": True,
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=("wide", "switch"))
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, help="training steps, instead of the model's own number")
    parser.add_argument("--seconds", type=float, default=math.inf, help="leave off after so many")
    options = parser.parse_args()
    text, _ = split(standard_library_text())
    settings = WIDE if options.kind == "wide" else SWITCH
    if options.steps:
        settings = Settings(**{**vars(settings), "steps": options.steps})

    model: PreTrainedModel
    if options.kind == "wide":
        model = olmoe(settings)
        length, inputs = WINDOW + 1, lambda tokens: {"input_ids": tokens, "labels": tokens}
    else:
        model = switch(settings)
        length, inputs = 2 * WINDOW, continuation
    state = options.out.with_name(options.out.name + ".state")
    slower = None if options.kind == "wide" else {"Attention.q.": settings.heads**0.5 / settings.hidden**0.5}
    if not optimize(
        model, settings, text, length, inputs, slower=slower, state=state, seconds=options.seconds
    ):
        print(f"{state}: more to do", file=sys.stderr)
        return 75
    model.bfloat16().save_pretrained(options.out)
    state.unlink(missing_ok=True)
    print(f"{options.out}: trained for {settings.steps} steps; its loss: qmoe eval")
    return 0


if __name__ == "__main__":
    sys.exit(main())
