"""Reading transformers' configurations: every field is used, known to change nothing, or refused by name."""

import copy
import json

from .core import Refusal


NEUTRAL = {  # in any config.json: they name, describe, train or sample, and leave the logits as they are
    *"architectures model_type transformers_version torch_dtype dtype use_cache initializer_range".split(),
    *"_name_or_path name_or_path _commit_hash return_dict output_hidden_states output_attentions".split(),
    *"chunk_size_feed_forward id2label label2id num_labels problem_type tokenizer_class".split(),
    *"attn_implementation _attn_implementation _attn_implementation_autoset torchscript".split(),
    *"pad_token_id bos_token_id eos_token_id sep_token_id decoder_start_token_id task_specific_params".split(),
}
MUST_BE = {  # where they are given; anything else is another architecture or another way to store weights
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "is_decoder": (False, True),  # causal either way
    "cross_attention_hidden_size": (None,),
    "tie_encoder_decoder": (False,),
    "pruned_heads": ({},),
    "use_bfloat16": (False,),
    "tf_legacy_loss": (False,),
    "prefix": (None,),
    "finetuning_task": (None,),
}
COUNTS = {  # at least 1 wherever they are given
    *"vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim".split(),
    *"state_size conv_kernel expand n_groups num_heads time_step_rank chunk_size attn_layer_period".split(),
    *"expert_layer_period mamba_expand mamba_d_conv mamba_d_state mamba_d_head mamba_d_ssm mamba_n_heads".split(),
    *"mamba_n_groups mamba_chunk_size".split(),
}


def read(config: dict, model_type: str, used: str, neutral: str = "", called: str | None = None):
    """A config.json as transformers' own class reads it: defaults filled in, older spellings understood.

    Args:
        config: the fields of the file.
        model_type: whose class.
        used: the fields that the converter looks at.
        neutral: further ones of this family that leave the logits as they are.
        called: the name of the format in messages, where it is not that of the class.

    Raises:
        Refusal: a field is neither, or of a wrong type.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING, GenerationConfig

    sampling = GenerationConfig._get_default_generation_params()
    known = NEUTRAL | MUST_BE.keys() | set(sampling) | set(used.split()) | set(neutral.split())
    for name, value in config.items():
        if name not in known and value is not None:
            raise Refusal(
                f"config.json has {name} = {json.dumps(value)[:200]}, which this converter does not know for "
                f"{called or model_type}: it could change the logits. Remove the field if it is known not to."
            )
        if name in COUNTS and isinstance(value, int) and value < 1:
            raise Refusal(f"config.json has {name} = {value}; it must be at least 1.")
        if name in MUST_BE and value not in MUST_BE[name]:
            raise Refusal(f"config.json has {name} = {json.dumps(value)[:200]}; only {MUST_BE[name][0]} is converted.")
    config_class = CONFIG_MAPPING[model_type]
    try:
        return config_class(**config_class._decode_special_floats(copy.deepcopy(config)))
    except (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise Refusal(f"config.json is no {config_class.__name__}: {' '.join(str(error).split())}") from error


def write(model_type: str, architecture: str, fields: dict) -> dict:
    """Their config.json for these fields of transformers' class."""
    from transformers import CONFIG_MAPPING

    config = CONFIG_MAPPING[model_type](**copy.deepcopy(fields), architectures=[architecture])
    return json.loads(config.to_json_string())


def special_tokens(config) -> dict:
    """The ids of padding, beginning and end; a padding id outside the vocabulary, which some files have, means none."""
    pad = config.pad_token_id
    if pad is not None and not 0 <= pad < config.vocab_size:
        pad = None
    return {"pad_token_id": pad, "bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
