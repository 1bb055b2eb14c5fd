"""Random decoder-only models of every family as Hugging Face folders, and their outputs."""

import numpy as np
import torch
import transformers


VOCAB = 97  # odd, and no multiple of anything
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 42,
    "intermediate_size": 52,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,  # H / K = 3
    "head_dim": 12,  # not hidden_size / heads
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": [5, 9],
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
SLIDING = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
NO_HEAD_DIM = {"head_dim": 10, "hidden_size": 60}  # Qwen 2 has no head_dim of its own
# Of each model: transformers' configuration class, and what it is given.
MODELS = {
    "llama": ("LlamaConfig", {"rope_parameters": LLAMA3, "attention_bias": True, "mlp_bias": True}),
    "llama_tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "mistral": ("MistralConfig", {"sliding_window": 7}),
    "qwen2": ("Qwen2Config", {**NO_HEAD_DIM, **SLIDING}),
    "qwen2_yarn": ("Qwen2Config", {**NO_HEAD_DIM, "rope_parameters": YARN}),
    "qwen3": ("Qwen3Config", {"tie_word_embeddings": True}),
    "qwen3_sliding": ("Qwen3Config", {**SLIDING, "attention_bias": True, "rope_parameters": YARN}),
    "gemma2": ("Gemma2Config", {"sliding_window": 5, "query_pre_attn_scalar": 24}),
    "gemma2_untied": ("Gemma2Config", {"sliding_window": 5, "tie_word_embeddings": False}),
    "gemma3": (
        "Gemma3TextConfig",
        {
            "sliding_window": 5,
            "query_pre_attn_scalar": 24,
            "num_hidden_layers": 7,
            "final_logit_softcapping": 3.0,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
}


def theirs(name, **more):
    """A transformers model with random weights.

    Norms and biases are random, too: at their initial values, an exchange of two would not show.
    """
    class_name, changes = MODELS[name]
    config = getattr(transformers, class_name)(**{**COMMON, **changes, **more})
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, value in model.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            if "norm" in key:
                value += 0.3 * noise
            elif key.endswith("bias"):
                value.copy_(0.3 * noise)
            elif "embed" in key:
                value.copy_(noise * (0.2 if name.startswith("gemma") else 0.5))
            else:
                value.copy_(noise * value.shape[-1] ** -0.5 * 1.5)
    return model


def save(model, folder, **options):
    model.save_pretrained(folder, **options)
    return str(folder)


def prompts_and_targets(rng, lengths=(11, 4, 1), target_length=26):
    """Random ids of the whole vocabulary, with 0, because the padding id is an ordinary token."""
    inputs = rng.integers(0, VOCAB, (len(lengths), max(lengths))).astype(np.int32)
    targets = rng.integers(0, VOCAB, (len(lengths), target_length)).astype(np.int32)
    return inputs, np.asarray(lengths, np.int32), targets


def their_logits(model, inputs, lengths, targets):
    """The logits of transformers that predict each target, row by row and without padding."""
    found = []
    for row, length in enumerate(lengths):
        text = np.concatenate([inputs[row, :length], targets[row]])[None]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor(text, dtype=torch.long)).logits[0].float()
        found.append(logits[length - 1 : length - 1 + targets.shape[1]].numpy())
    return np.stack(found)


def their_tokens(model, inputs, lengths, num_tokens, eos_ids):
    """The greedy tokens of transformers for each row, with 0 after the end."""
    found = np.zeros((len(lengths), num_tokens), np.int32)
    for row, length in enumerate(lengths):
        prompt = torch.tensor(inputs[row : row + 1, :length], dtype=torch.long)
        tokens = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=num_tokens,
            do_sample=False,
            eos_token_id=list(eos_ids),
            pad_token_id=0,
        )[0, length:].numpy()
        found[row, : len(tokens)] = tokens
    return found
