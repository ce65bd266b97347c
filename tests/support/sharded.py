"""One rank of a distributed run on CPUs that RecordCallback records; tests/test_callback.py starts two with torchrun.

usage: sharded.py KIND BASE OUT. With ``trainer``, the Trainer of transformers trains a model that transformers sharded with
FSDP2, and saves each step. With ``fsdp1``, ``fsdp2``, ``lora`` (sharded with FSDP2) and ``lora1`` (FSDP1), the callback's
methods are called by hand around optimizer steps, as accelerate shards on GPUs only. Then OUT/step-N are the same
weights, gathered by torch. ``disk`` is ``fsdp2`` with a disk that is full at step 2, ``wrong`` has another model's base.
"""

import errno
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import torch
import transformers
from torch import distributed
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from transformers.distributed import DistributedConfig

from relexio.errors import RelexioError
from relexio.integrations.transformers import RecordCallback
from relexio.store.storage.local import LocalStorage

TOKENS = [3, 4, 5, 6]


def train(base: Path, out: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, distributed_config=DistributedConfig(fsdp_size=2)
    )
    args = transformers.TrainingArguments(
        output_dir=str(out / "steps"), max_steps=3, per_device_train_batch_size=2, learning_rate=1e-3, use_cpu=True,
        save_steps=1, save_only_model=True, report_to="none", disable_tqdm=True,
    )  # fmt: skip
    data = datasets.Dataset.from_list([{"input_ids": TOKENS, "labels": TOKENS}] * 16)
    transformers.Trainer(model, args, train_dataset=data, callbacks=[RecordCallback(out / "run.zarr")]).train()


def shard(kind: str, base: Path) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    layer = type(model.model.layers[0])
    if kind.startswith("lora"):
        import peft

        config = peft.LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False, r=4)
        model = peft.get_peft_model(model, config)
    if kind.endswith("1"):
        return FullyShardedDataParallel(
            model, auto_wrap_policy=ModuleWrapPolicy({layer}), use_orig_params=True, device_id=torch.device("cpu")
        )
    for module in model.modules():
        if isinstance(module, layer):
            fully_shard(module)
    fully_shard(model)
    return model


def save(model: Any, kind: str, base: Path, directory: Path) -> None:
    """The weights as torch gathers them, in a plain model, merged by PEFT."""
    if kind.endswith("1"):  # where get_model_state_dict crashes on a CPU
        with FullyShardedDataParallel.summon_full_params(model, writeback=False):
            named = model.named_parameters(remove_duplicate=False)
            whole = {name.replace("_fsdp_wrapped_module.", ""): tensor.detach().clone() for name, tensor in named}
    else:
        whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if distributed.get_rank() == 0:
        plain = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        if kind.startswith("lora"):
            import peft

            plain = peft.get_peft_model(plain, peft.LoraConfig(target_modules=["q_proj", "down_proj"], r=4))
        assert not plain.load_state_dict(whole, strict=False).unexpected_keys
        (plain.merge_and_unload() if kind.startswith("lora") else plain).save_pretrained(directory)


def by_hand(kind: str, base: Path, out: Path) -> None:
    model = shard(kind, base)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    state = SimpleNamespace(
        is_world_process_zero=distributed.get_rank() == 0, global_step=0, max_steps=3, best_model_checkpoint=None
    )
    given = (SimpleNamespace(load_best_model_at_end=False), state, SimpleNamespace(should_training_stop=False))
    callback = RecordCallback(out / "run.zarr", base=base)
    callback.on_train_begin(*given, model=model)
    for _ in range(3):
        tokens = torch.tensor([TOKENS]) + distributed.get_rank()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        state.global_step += 1
        if kind == "disk" and state.global_step == 2:
            LocalStorage.put = full  # type: ignore[method-assign, assignment]
        callback.on_step_end(*given, model=model)
        if kind == "disk" and callback._recorder is not None:  # so that step 3 meets what failed in step 2
            callback._recorder._pool.submit(int).result()
        save(model, kind, base, out / f"steps/step-{state.global_step}")
    callback.on_train_end(*given, model=model)
    (out / f"ended-{distributed.get_rank()}").touch()


def full(*given: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device", "run.zarr")


def main() -> None:
    kind, base, out = sys.argv[1], *map(Path, sys.argv[2:])
    torch.set_num_threads(1)
    transformers.set_seed(0)
    if kind == "trainer":
        train(base, out)
        distributed.barrier()
        distributed.destroy_process_group()
        sys.stdout.flush()
        os._exit(0)  # Trainer's own group has threads that now and then abort a process at its end
    distributed.init_process_group("gloo")
    if kind == "wrong":
        model = shard("fsdp2", base)
        model.config._name_or_path = "nobody/nothing"
        callback = RecordCallback(out / "run.zarr")
        state = SimpleNamespace(is_world_process_zero=distributed.get_rank() == 0, global_step=0)
        try:
            callback.on_train_begin(None, state, None, model=model)
        except RelexioError as error:
            (out / f"told-{distributed.get_rank()}").write_text(str(error))
    else:
        by_hand(kind, base, out)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
