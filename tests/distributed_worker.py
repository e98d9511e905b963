"""One of two processes that train B'MOJO together: `python -m torch.distributed.run --nproc-per-node 2 distributed_worker.py FILE`.

The first writes to FILE, as JSON, for every case how far the processes were from one that did all by itself.
"""

import copy
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel


sys.path.insert(0, str(Path(__file__).resolve().parent))
from conftest import TINY


VARIANTS = {
    "bmojo": {},
    "untied": {"tie_attn_weights": False, "tie_word_embeddings": False},
    "learnable": {"innovation_predictor": "learnable"},
    "mamba": {"ssm_type": "mamba"},
    "deltanet": {"ssm_type": "gated_deltanet"},
    "kalmanet": {"ssm_type": "gated_kalmanet", "tie_attn_weights": False, "fading_query": True, "kv_proj_rank": 3},
    "others": {
        "layers_block_type": ["mamba", "mamba2", "sliding_attention", "full_attention"],
        "num_hidden_layers": 4,
    },
}
RATE = 0.1


def make_model(fields: dict):
    """The tiny model of conftest.py with these fields, in training."""
    from bmojo.configuration_bmojo import BMojoConfig
    from bmojo.modeling_bmojo import BMojoForCausalLM

    torch.manual_seed(0)
    return BMojoForCausalLM(BMojoConfig(**TINY | fields)).train()


def step(model, batches):
    """A step of gradient descent on the mean of the batches' losses."""
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    for ids in batches:
        (model(input_ids=ids, labels=ids).loss / len(batches)).backward()
    optimizer.step()


def dynamics(model) -> list:
    """The modules of A_log, D and dt_bias, which are in float32 whatever the other weights are in."""
    return [module for name, module in model.named_modules() if name.endswith(".dynamics")]


def shard(model, policy: MixedPrecisionPolicy):
    """FSDP2 by layers; A_log, D and dt_bias are units of their own, which mixed precision leaves in float32."""
    for module in dynamics(model):
        fully_shard(module, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))
    for layer in model.model.layers:
        fully_shard(layer, mp_policy=policy)
    fully_shard(model, mp_policy=policy)


def largest_error(got: dict, want: dict) -> float:
    return max((got[name].double() - want[name].double()).abs().max().item() for name in want)


def decode(model, ids):
    """Logits of a prompt and then one token at a time, through the cache."""
    cache, logits = None, []
    with torch.no_grad():
        for part in (ids[:, :2], *ids[:, 2:].split(1, 1)):
            out = model(part, cache=cache, use_cache=True)
            cache, logits = out.cache, [*logits, out.logits]
    return torch.cat(logits, 1)


def compare(kind: str, fields: dict, ids) -> dict[str, float]:
    """What two processes make of a batch each, against one process with both."""
    model, rank = make_model(fields), dist.get_rank()
    if kind == "fsdp, bfloat16 weights":
        model.to(torch.bfloat16)
        for module in dynamics(model):
            module.float()
    plain = copy.deepcopy(model)
    before = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    step(plain, ids)
    if kind.startswith("ddp"):
        if kind == "ddp, checkpointing":
            model.activation_checkpointing_enable()
        step(DistributedDataParallel(model), [ids[rank]])
        weights = model.state_dict()
    else:
        mixed = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32}
        shard(model, MixedPrecisionPolicy(**mixed if kind == "fsdp, mixed precision" else {}))
        step(model, [ids[rank]])
        weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    model.eval()
    with torch.no_grad():
        whole = model(ids[0]).logits
    cached = decode(model, ids[0])
    if rank:
        return {}
    return {
        "weights": largest_error(weights, plain.state_dict()),
        "change": largest_error(before, plain.state_dict()),
        "decoding": ((cached - whole).norm() / whole.norm()).item(),
    }


def main():
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    kinds = ["ddp", "ddp, checkpointing", "fsdp", "fsdp, mixed precision", "fsdp, bfloat16 weights"]
    found = {}
    for name, fields in VARIANTS.items():
        for kind in kinds:
            for length in (3, 29):
                ids = torch.randint(3, 97, (2, 2, length), generator=torch.Generator().manual_seed(1))
                found[f"{kind}: {name}, {length} tokens"] = compare(kind, fields, ids)
    if dist.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
