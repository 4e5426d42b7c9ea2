"""Train the models that benchmarks/quantizer.py measures on: offline, on Python's standard library.

    python benchmarks/train_models.py wide OUT      OLMoE with rows of 512 weights, about 50 minutes on one core
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from demo_model import Settings, bits_per_byte, split, standard_library_text, train

WIDE = Settings(layers=2, experts=8, hidden=512, width=512, heads=8, steps=2400, learning_rate=1.5e-3)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=("wide",))
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    text, held_out = split(standard_library_text())
    model = train(WIDE, text)
    model.bfloat16().save_pretrained(options.out)
    loss, _ = bits_per_byte(model.float(), held_out, list, windows=768)
    print(f"{options.out}: {loss:.4f} bits per held-out byte")


if __name__ == "__main__":
    main()
