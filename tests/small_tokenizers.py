"""Makes Hugging Face folders with small tokenizers of the kinds of Qwen, Llama and Gemma."""

import json
import pathlib

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers


KINDS = ("qwen", "llama", "gemma")
TEXTS = [
    "Ada has 7 eggs. How many eggs are there now? The answer is 12.",
    "the quick brown fox jumps over the lazy dog 0123456789",
    "user assistant system model tool <think> </think> {}[]()\"':;,!?",
    "über straße naïve café 東京 한국어 привет 👋🏽",
]
TEMPLATES = {
    "qwen": (
        "{%- if tools %}{{- '<|im_start|>system\\n' }}{% for tool in tools %}{{ tool | tojson }}\n"
        "{% endfor %}{{- '<|im_end|>\\n' }}{%- endif %}"
        "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' }}"
        "{%- if m.role == 'assistant' and loop.last and '</think>' not in m.content %}"
        "{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
        "{{- m.content + '<|im_end|>\\n' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
        "{%- if enable_thinking is defined and not enable_thinking %}"
        "{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{%- endif %}"
    ),
    "llama": (
        "{{ bos_token }}{% for m in messages %}"
        "{{ '<|start|>' + m['role'] + '<|end|>\\n\\n' + m['content'] | trim + '<|eot|>' }}"
        "{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|start|>assistant<|end|>\\n\\n' }}{% endif %}"
    ),
    "gemma": (
        "{{ bos_token }}{% for m in messages %}"
        "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
        "{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
        "{{ '<start_of_turn>' + role + '\\n' + m['content'] | trim + '<end_of_turn>\\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
    ),
}
SPECIAL = {
    "qwen": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "llama": ["<|begin|>", "<|end_of_text|>", "<|start|>", "<|end|>", "<|eot|>"],
    "gemma": ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"],
}
NAMES = {
    "qwen": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "bos_token": None},
    "llama": {"bos_token": "<|begin|>", "eos_token": "<|eot|>"},
    "gemma": {
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
    },
}
STOPS = {
    "qwen": ["<|im_end|>", "<|endoftext|>"],
    "llama": ["<|end_of_text|>", "<|eot|>"],
    "gemma": ["<eos>", "<end_of_turn>"],
}


def train(kind: str, vocab_size: int = 400) -> tokenizers.Tokenizer:
    """Trains a BPE tokenizer. Special tokens come last for Qwen and Llama, and first for Gemma."""
    if kind == "gemma":
        tokenizer = tokenizers.Tokenizer(
            models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True)
        )
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
        parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        tokenizer.decoder = decoders.Sequence(parts)
        alphabet: list[str] = []
        first = [*SPECIAL[kind], *(f"<0x{byte:02X}>" for byte in range(256))]
        vocab_size += 256
    else:
        tokenizer = tokenizers.Tokenizer(models.BPE())
        tokenizer.normalizer = normalizers.NFC() if kind == "qwen" else None
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet, first = pre_tokenizers.ByteLevel.alphabet(), []
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=first,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.add_special_tokens(SPECIAL[kind])
    if kind != "gemma":
        # As Qwen's: added, and still part of the text.
        tokenizer.add_tokens(["<think>", "</think>"])
    before = NAMES[kind]["bos_token"]
    if before is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{before} $A", special_tokens=[(before, tokenizer.token_to_id(before))]
        )
    return tokenizer


def write(folder: pathlib.Path, kind: str, tokenizer: tokenizers.Tokenizer | None = None):
    """Writes a folder with the files of the tokenizer, as on the Hub, and returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = tokenizer or train(kind)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        **NAMES[kind],
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": TEMPLATES[kind],
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    stops = [tokenizer.token_to_id(text) for text in STOPS[kind]]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
    return folder
