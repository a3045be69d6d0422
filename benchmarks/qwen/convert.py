"""A GGUF file as a folder of safetensors that redistill reads: `python convert.py FILE.gguf FOLDER`.

The weights are the quantised ones, made bfloat16. The end of a text is Qwen's end of turn.
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

END_OF_TURN = "<|im_end|>"


def convert(source: Path, folder: Path) -> None:
    """Write model and tokenizer of `source` to `folder`."""
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    tokenizer.eos_token = END_OF_TURN
    model = AutoModelForCausalLM.from_pretrained(
        source.parent,
        gguf_file=source.name,
        dtype=torch.bfloat16,
        # Without it a quantizer stays attached to the model, which then refuses to be saved.
        quantization_config=GgufConfig(dequantize=True),
    )
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
