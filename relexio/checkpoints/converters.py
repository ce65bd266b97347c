"""What other programs make a readable model of: the command of each, with its options and the user's paths.

docs/trainers.md says which of these commands were run. Each writes where the model of the step is then found.
"""

from pathlib import Path
from shlex import quote

from relexio.bounded import loads
from relexio.checkpoints.files import is_file
from relexio.errors import CheckpointError

#: For a run that goes on, where nothing makes a model of what is there.
HF_MODEL = (
    "verl's merger does not read it either: let verl write the model too, with "
    "'actor_rollout_ref.actor.checkpoint.save_contents=[model,optimizer,extra,hf_model]'"
)
_THEN = ", and then this again"


class MergeableError(CheckpointError):
    """A form that a converter reads. Whoever knows the directory adds the command."""


def verl_merger(backend: str, actor: Path, target: Path, *options: str) -> str:
    """verl's merger of the shards in an actor's directory: the model goes to ``target``, rounded to bf16."""
    paths = f"--local_dir {_path(actor)} --target_dir {_path(target)}"
    return " ".join(["python -m verl.model_merger merge --backend", backend, *options, paths])


def accelerate_merger(folder: Path, target: Path) -> str:
    """accelerate's merger of a DCP directory: ``model.safetensors`` in ``target``."""
    return f"accelerate merge-weights {_path(folder)} {_path(target)}{_THEN}"


def peft_merger(adapter: Path, step: int | None) -> str:
    """PEFT's merge of the adapter of a step (None: in the place of the base) into its base, as a model below it."""
    merged = adapter / "merged"
    code = (
        f"from peft import AutoPeftModelForCausalLM as M; M.from_pretrained({str(adapter)!r}).merge_and_unload()"
        f".save_pretrained({str(merged)!r})"
    )
    given = f"--base {_path(merged)}" if step is None else f"--checkpoint {quote(f'{step}={merged}')}"
    return f"merge it into its base: python -c {quote(code)}, and give {given}"


def verl_lora_merger(actor: Path, step: int | None) -> str:
    """verl's merger takes the adapter out of the shards in an actor's directory; PEFT merges it into BASE, the user's to fill in.

    Of the settings verl's merger writes rank and alpha, and of the base what was saved: nothing, if the adapter alone was.
    """
    taken, merged = actor / "taken", actor / "taken" / "merged"
    code = (
        "from peft import PeftModel as P; from transformers import AutoModelForCausalLM as M; "
        f"P.from_pretrained(M.from_pretrained('BASE', dtype='auto'), {str(taken / 'lora_adapter')!r}).merge_and_unload()"
        f".save_pretrained({str(merged)!r})"
    )
    given = f"--base {_path(merged)}" if step is None else f"--checkpoint {quote(f'{step}={merged}')}"
    config = _path(taken / "lora_adapter" / "adapter_config.json")
    return (
        f"merge it: {verl_merger('fsdp', actor, taken)}; if training had other settings than rank and alpha, write them into "
        f"{config}; python -c {quote(code)}; and give {given}"
    )


def adapter_to_safetensors(adapter: Path) -> str:
    """An adapter's ``.bin`` as safetensors."""
    code = (
        f"import torch; from safetensors.torch import save_file; p = {str(adapter / 'adapter_model')!r}; "
        "save_file(torch.load(p + '.bin', 'cpu', weights_only=True), p + '.safetensors')"
    )
    return f"python -c {quote(code)}{_THEN}"


def of_partitions(model: Path) -> str | None:
    """What makes a model of ZeRO's partitions below a directory, or in it; None if there are none.

    Without ``--safe_serialization``, which cannot write a head that is tied.
    """
    files = sorted(model.glob("**/*_optim_states.pt"))
    if not files:
        return None
    tag = files[0].parent
    script = tag.parent / "zero_to_fp32.py"
    program = _path(script) if is_file(script) else "-m deepspeed.utils.zero_to_fp32"
    return f"python {program} {_path(tag.parent)} {_path(model)} --tag {quote(tag.name)}{_THEN}"


def of_dcp(model: Path) -> str | None:
    """What makes a model of a torch distributed checkpoint below a directory, or beside it; None if there is none.

    BASE, NAME and FLAVOR are the user's to fill in: nothing there tells them.
    """
    files = sorted([*model.glob("**/*.distcp"), *(model.parent / "dist_ckpt").glob("*.distcp")])
    if not files:
        return None
    folder, target = files[0].parent, _path((model / "huggingface").absolute())
    if folder.name == "dist_ckpt":
        beside = folder.parent / "huggingface"
        actor = folder.parent.parent if folder.parent.name == "model" else folder.parent
        return verl_merger("megatron", actor, beside, *["--tie-word-embedding"] * _is_tied(beside)) + _THEN
    here, megatron = _path(folder.absolute()), is_file(folder / "common.pt")
    top = next((above.parent.parent for above in (folder, *folder.parents) if above.parts[-2:] == _NEMO), None)
    if top is not None:
        config, out = _path((top / "config.yaml").absolute()), _path((top / "policy" / "huggingface").absolute())
        program = (
            "--extra mcore examples/converters/convert_megatron_to_hf.py"
            if megatron
            else "examples/converters/convert_dcp_to_hf.py"
        )
        kind = "megatron" if megatron else "dcp"
        return f"in NeMo-RL, uv run {program} --config={config} --{kind}-ckpt-path={here} --hf-ckpt-path={out}{_THEN}"
    if megatron:
        command = f"scripts/conversion/convert.sh export --hf-model BASE --megatron-path {here} --hf-path {target}"
        return f"in Megatron-Bridge, {command}{_THEN}"
    if any(above.name.startswith("step-") for above in (folder, *folder.parents)):
        command = f"python scripts/checkpoint_conversion/convert_to_hf.py {here} {target}"
        return f"in torchtitan, {command} --hf_assets_path BASE --model_name NAME --model_flavor FLAVOR{_THEN}"
    return f"if its tensors have Hugging Face's names, {accelerate_merger(folder, model)}"


_NEMO = ("policy", "weights")


def _is_tied(model: Path) -> bool:
    try:
        config = loads((model / "config.json").read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("tie_word_embeddings") is True


def _path(path: Path) -> str:
    return quote(str(path))
