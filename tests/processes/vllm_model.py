"""Makes a tiny Llama with two sets of weights for vLLM, and says what each must answer; needs torch and transformers.

FOLDER/v1 and FOLDER/v2 are whole models. The last line of output is JSON: for each a prompt, its greedy continuation as
transformers computes it, and the logarithms of the probabilities.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

PROMPT = [5, 17, 3, 42]
STEPS = 8
TOKENS = 256


def main() -> None:
    folder = Path(sys.argv[1])
    config = LlamaConfig(
        vocab_size=TOKENS,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.1,  # far enough from 0 that two sets of weights answer differently
        bos_token_id=None,
        eos_token_id=None,
    )
    answers = {}
    for seed, version in enumerate(("v1", "v2")):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).eval()
        model.save_pretrained(folder / version)
        _save_tokenizer(folder / version)
        answers[version] = _continued(model)
    sys.stdout.write(json.dumps(answers) + "\n")


def _save_tokenizer(folder: Path) -> None:
    """Have each number stand for itself."""
    words = {str(each): each for each in range(TOKENS)}
    tokenizer: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "0"},
    }
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": TOKENS}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def _continued(model: LlamaForCausalLM) -> dict[str, list[Any]]:
    tokens = list(PROMPT)
    chosen: list[float] = []
    with torch.no_grad():
        for _ in range(STEPS):
            scores = model(torch.tensor([tokens])).logits[0, -1].log_softmax(-1)
            best = int(scores.argmax())
            chosen.append(float(scores[best]))
            tokens.append(best)
    return {"prompt": tokens[: len(PROMPT)], "tokens": tokens[len(PROMPT) :], "logprobs": chosen}


if __name__ == "__main__":
    main()
