"""The demo's own model: a small OLMoE on bytes, trained from nothing; and how models generate."""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import OlmoeConfig, OlmoeForCausalLM, PreTrainedModel

WINDOW = 128


@dataclass(frozen=True)
class Settings:
    """How large the model is and how long it is trained."""

    # Held-out bits per byte after about 150 s on two idle cores: these settings 2.05; learning rate 3e-3 and
    # 4 heads 2.12, 6e-3 2.21; half the batch, more steps 2.22; hidden 192, 3 layers 2.18. Hidden 128 with 4
    # layers gave 2.06, but in rows so short that levels and index take it above one bit per weight.

    layers: int = 2
    experts: int = 8
    hidden: int = 256
    width: int = 512
    heads: int = 8
    batch: int = 16
    steps: int = 540
    warmup: int = 50
    learning_rate: float = 2e-3
    seed: int = 0


def standard_library_text() -> bytes:
    """The source of Python's own standard library: a few megabytes of text that are always at hand."""
    folder = Path(os.path.dirname(os.__file__))
    text = b"".join(file.read_bytes() for file in sorted(folder.glob("*.py")))
    if len(text) < 100_000:
        raise SystemExit(f"{folder}: {len(text)} bytes of *.py files, expected the standard library's source")
    return text


def split(text: bytes) -> tuple[bytes, bytes]:
    """The first 95 % to train on, and the rest, which is held out."""
    cut = len(text) * 95 // 100
    return text[:cut], text[cut:]


Inputs = Callable[[torch.Tensor], dict[str, torch.Tensor]]


def olmoe(settings: Settings) -> OlmoeForCausalLM:
    """An untrained model whose tokens are bytes."""
    torch.manual_seed(settings.seed)
    return OlmoeForCausalLM(
        OlmoeConfig(
            vocab_size=256,
            hidden_size=settings.hidden,
            intermediate_size=settings.width,
            num_hidden_layers=settings.layers,
            num_attention_heads=settings.heads,
            num_key_value_heads=settings.heads,
            num_experts=settings.experts,
            num_experts_per_tok=2,
            norm_topk_prob=True,
            max_position_embeddings=1024,
            output_router_logits=True,  # so that the loss keeps the experts evenly used
            router_aux_loss_coef=0.01,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
        )
    )


def train(settings: Settings, text: bytes) -> OlmoeForCausalLM:
    """Train a model whose tokens are bytes."""
    model = olmoe(settings)
    optimize(model, settings, text, WINDOW + 1, lambda tokens: {"input_ids": tokens, "labels": tokens})
    return model.eval()


def optimize(
    model: PreTrainedModel,
    settings: Settings,
    text: bytes,
    length: int,
    inputs: Inputs,
    *,
    slower: Mapping[str, float] | None = None,
    state: Path | None = None,
    seconds: float = math.inf,
) -> bool:
    """Train on windows of `length` bytes from all over `text`; `inputs` makes the model's arguments of them.

    Parameters that have a key of `slower` in their name learn at that share of the learning rate. After
    `seconds` the training is left in `state`, from where another call goes on. Tells whether it is done.
    """
    groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        share = next((share for part, share in (slower or {}).items() if part in name), 1.0)
        groups.setdefault((share, 0.1 if parameter.ndim > 1 else 0.0), []).append(parameter)
    optimizer = torch.optim.AdamW(
        [
            {"params": parameters, "weight_decay": decay, "lr": share * settings.learning_rate}
            for (share, decay), parameters in groups.items()
        ],
        betas=(0.9, 0.95),
        fused=True,
    )

    def rate(step: int) -> float:
        rise = min((step + 1) / settings.warmup, 1)
        return rise * (0.05 + 0.95 * (1 + math.cos(math.pi * step / settings.steps)) / 2)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    generator = torch.Generator().manual_seed(settings.seed)
    model.train()
    first, smooth = 0, math.log(256)
    if state and state.exists():
        known = torch.load(state, weights_only=True)
        model.load_state_dict(known["model"])
        optimizer.load_state_dict(known["optimizer"])
        schedule.load_state_dict(known["schedule"])
        generator.set_state(known["generator"])
        torch.set_rng_state(known["noise"])
        first, smooth = known["step"], known["smooth"]
    end = time.monotonic() + seconds
    with tqdm(range(first, settings.steps), desc="training", unit="step") as bar:
        for step in bar:
            if state and time.monotonic() > end:
                known = {"step": step, "smooth": smooth, "noise": torch.get_rng_state()}
                known |= {"model": model.state_dict(), "generator": generator.get_state()}
                known |= {"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
                torch.save(known, state.with_suffix(".partial"))
                os.replace(state.with_suffix(".partial"), state)
                return False
            starts = torch.randint(len(data) - length + 1, (settings.batch, 1), generator=generator)
            tokens = data[starts + torch.arange(length)].long()
            output = model(**inputs(tokens), use_cache=False)
            optimizer.zero_grad()
            output.loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            smooth += 0.05 * (output.loss.item() - smooth)
            bar.set_postfix_str(f"{smooth / math.log(2):.2f} bits/byte")
    return True


Encode = Callable[[bytes], list[int]]
Decode = Callable[[list[int]], str]


@torch.inference_mode()
def generation_rate(model: PreTrainedModel, prompt: bytes, encode: Encode, tokens: int) -> float:
    """Tokens per second that the model generates one after the other: the median of nine times, warmed up."""
    ids = torch.tensor([encode(prompt)])

    def generate(count: int) -> float:
        start = time.perf_counter()
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            min_new_tokens=count,
            max_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
        )
        return count / (time.perf_counter() - start)

    generate(8)
    return statistics.median(generate(tokens) for _ in range(9))


@torch.inference_mode()
def sample(model: PreTrainedModel, prompt: bytes, encode: Encode, decode: Decode, tokens: int) -> str:
    """Text that the model goes on with; the same draws for every model."""
    torch.manual_seed(0)
    ids = torch.tensor([encode(prompt)])
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        do_sample=True,
        temperature=0.6,
        pad_token_id=0,
    )
    return decode(output[0].tolist())
