"""Named sizes have the published numbers of parameters and those of transformers' models."""

import pytest
import torch
import transformers

from gkd_jax.convert import decoder_fields
from gkd_jax.models import decoder_sizes, lm


PUBLISHED = {
    ("qwen3", "0.6b"): 596_049_920,
    ("qwen3", "1.7b"): 1_720_574_976,
    ("qwen3", "4b"): 4_022_468_096,
    ("qwen3", "8b"): 8_190_735_360,
    ("qwen3", "14b"): 14_768_307_200,
    ("qwen3", "32b"): 32_762_123_264,
    ("qwen2_5", "0.5b"): 494_032_768,
    ("qwen2_5", "1.5b"): 1_543_714_304,
    ("qwen2_5", "7b"): 7_615_616_512,
    ("llama3", "1b"): 1_235_814_400,
    ("llama3", "3b"): 3_212_749_824,
    ("llama3", "8b"): 8_030_261_248,
    ("llama3", "70b"): 70_553_706_496,
    ("gemma2", "2b"): 2_614_341_888,
    ("gemma2", "9b"): 9_241_705_984,
    ("gemma2", "27b"): 27_227_128_320,
    ("gemma3", "270m"): 268_098_176,
    ("gemma3", "1b"): 999_885_952,
    ("gemma3", "4b"): 3_880_263_168,
    ("gemma3", "12b"): 11_766_034_176,
    ("gemma3", "27b"): 27_009_346_304,
}


@pytest.mark.parametrize(("family", "size"), PUBLISHED)
def test_sizes_have_the_published_number_of_parameters(family, size):
    config = getattr(decoder_sizes, family)(size)
    assert lm.num_params(lm.abstract_params(config)) == PUBLISHED[family, size]
    # A class of transformers has these switches, and as many parameters with them.
    fields = decoder_fields.config_fields(config, "float32")
    assert decoder_fields.read(fields) == config
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(**fields)
        )
    assert sum(value.numel() for value in theirs.parameters()) == PUBLISHED[family, size]


def test_fields_are_replaced_and_other_sizes_refused():
    config = decoder_sizes.gemma3("tiny", vocab_size=128, num_layers=7)
    assert config.windows == (512, 512, 512, 512, 512, 0, 512)
    assert config.vocab_size == 128
    with pytest.raises(ValueError, match=r"size must be one of tiny, .*0\.6b.*, got 'small'"):
        decoder_sizes.qwen3("small")
